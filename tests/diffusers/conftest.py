"""The markers of diffusers' tests; and a skip that no table explains is a failure."""

import re
from collections.abc import Generator
from typing import Any

import pytest

from tests.diffusers.upstream import checkout


def pytest_configure(config: pytest.Config) -> None:
    if (folder := checkout()) is not None:
        text = (folder / "tests/testing_utils.py").read_text(encoding="utf-8")
        for name in sorted(set(re.findall(r"pytest\.mark\.(\w+)\(test_case\)", text))):
            config.addinivalue_line("markers", f"{name}: of diffusers' own tests")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    report = yield
    explained = getattr(getattr(item, "module", None), "SKIPS", None)
    if report.skipped and explained is not None and not hasattr(report, "wasxfail"):
        name = getattr(item, "originalname", None) or item.name
        if name not in explained:
            report.outcome, report.longrepr = "failed", f"{item.nodeid} skips, and SKIPS does not say why"
    return report
