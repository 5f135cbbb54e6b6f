"""Puts the models and episodes that come with the package into its wheel; metadata are in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

# As `diffusers_far.shipped` names them; the larger of the two shipped models stays in the checkout.
SHIPPED = ("checkpoints/far-doom-maze-64-any-step", "data/samples")


class BuildWithShippedFiles(build_py):
    """`build_py`, but for installations that are the checkout itself."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for folder in SHIPPED:
                target = Path(self.build_lib, "diffusers_far", "shipped_files", folder)
                shutil.copytree(folder, target, dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithShippedFiles})
