"""What axe-core finds on a page in a browser."""

import os
from pathlib import Path

import pytest
from playwright.sync_api import Page

AXE = Path("web/node_modules/axe-core/axe.min.js")


def serious_findings(page: Page, repository: Path) -> list[tuple[str, list[str]]]:
    """Rules that are broken, serious ones alone, each with the elements that break it.

    Skipped where axe-core is not installed, an error under CI=true.
    """
    if not (repository / AXE).is_file():
        reason = "needs axe-core (Debian: apt-get install nodejs npm; then: make web)"
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
    page.add_script_tag(path=repository / AXE)
    found = page.evaluate("axe.run().then((result) => result.violations)")
    serious = [one for one in found if one["impact"] in ("serious", "critical")]
    return [(one["id"], [node["html"] for node in one["nodes"]]) for one in serious]
