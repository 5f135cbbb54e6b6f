"""What building the site does on top of mkdocs: where examples run, and links that lead out of the site."""

import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
GIVEN = ("checkpoints", "data")  # what examples read

_folder: tempfile.TemporaryDirectory[str] | None = None


def on_pre_build(config: Any) -> None:
    """Examples run in a folder of their own, with the checkpoints and the sample episodes, and no network."""
    global _folder
    os.environ["HF_HUB_OFFLINE"] = "1"
    # The commands of this environment, also where it is not activated.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    from diffusers.utils import logging

    from diffusers_far import FARVideoPipeline

    # Bars of progress would stand among the lines of the build.
    logging.disable_progress_bar()
    FARVideoPipeline._progress_bar_config = {"disable": True}
    _folder = tempfile.TemporaryDirectory(prefix="diffusers-far-site-")
    for name in GIVEN:
        Path(_folder.name, name).symlink_to(REPOSITORY / name)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Examples of a page run one after the other, as one program; what they print stands below them."""
    assert _folder is not None
    how = f'exec="on" source="above" workdir="{_folder.name}"'

    def options(block: re.Match[str]) -> str:
        session = f' session="{page.file.src_uri}"' if block[1] == "python" else ""
        shown = ' result="text"' if block[1] == "bash" or "print(" in block[2] else ""  # else an empty box
        return f"```{block[1]} {how}{session}{shown}\n{block[2]}```"

    return as_paths(re.sub(r'^```(python|bash) exec="on"\n(.*?)^```', options, markdown, flags=re.M | re.S))


def as_paths(markdown: str) -> str:
    """Links to files outside docs/ become their paths: these are in a checkout, but not on a site."""

    def as_path(link: re.Match[str]) -> str:
        target = (REPOSITORY / "docs" / link[2].partition("#")[0]).resolve()
        if not target.exists():
            raise ValueError(f"a page links to {link[2]}, which is not there")
        path = f"`{target.relative_to(REPOSITORY).as_posix()}`"
        return path if link[1] == path else f"{link[1]} ({path})"

    return re.sub(r"(?<!!)\[([^\]]+)\]\((\.\./[^)]+)\)", as_path, markdown)


def on_post_build(config: Any) -> None:
    _clean_up()


def on_build_error(error: Exception) -> None:
    _clean_up()


def _clean_up() -> None:
    if _folder is not None:
        _folder.cleanup()
