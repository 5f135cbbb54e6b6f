"""diffusers' own tests for models and pipelines, of a checkout of diffusers; its package has none.

The environment variable DIFFUSERS_CHECKOUT names the checkout. An editable install of diffusers is one, too.
"""

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import diffusers
import pytest

_PACKAGE = "diffusers_tests"  # not `tests`: that is ours


def checkout() -> Path | None:
    """The folder of the checkout, or None."""
    given = os.environ.get("DIFFUSERS_CHECKOUT")
    folder = Path(given) if given else Path(diffusers.__file__).resolve().parents[2]
    if (folder / "tests/models/testing_utils/__init__.py").is_file():
        return folder
    if given:
        raise FileNotFoundError(f"DIFFUSERS_CHECKOUT={given}: there is no tests/models/testing_utils in it")
    return None


def upstream(module: str) -> ModuleType:
    """A module of diffusers' tests, such as `models.testing_utils`; without one, who asks is skipped."""
    folder = checkout()
    if folder is None:
        pytest.skip("DIFFUSERS_CHECKOUT names no checkout of diffusers", allow_module_level=True)
    if _PACKAGE not in sys.modules:
        location = folder / "tests"
        spec = importlib.util.spec_from_file_location(
            _PACKAGE, location / "__init__.py", submodule_search_locations=[str(location)]
        )
        assert spec is not None and spec.loader is not None
        sys.modules[_PACKAGE] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[_PACKAGE])
    return importlib.import_module(f"{_PACKAGE}.{module}")


def classes_of_tests(tests: dict[str, type], configs: Iterable[type]) -> dict[str, type]:
    """A class for pytest of each class of tests, on each configuration, by name."""
    names = {
        f"Test{name}{config.__name__}": (config, each) for config in configs for name, each in tests.items()
    }
    return {name: type(name, bases, {}) for name, bases in names.items()}


def not_run(module: ModuleType, tests: dict[str, type]) -> set[str]:
    """Names that a module of theirs offers and that are no part of `tests`."""
    run = {base for each in tests.values() for base in each.__mro__}
    return {name for name in module.__all__ if getattr(module, name) not in run}


def table(*reasons: tuple[str, str]) -> dict[str, str]:
    """The reason of each test, of pairs of a reason and the names of its tests."""
    return {name: reason for reason, names in reasons for name in names.split()}
