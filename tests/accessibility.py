"""A page on a phone, and what axe-core finds there."""

import os
from pathlib import Path
from typing import Literal

import pytest
from playwright.sync_api import Page

PHONE_WIDTH, PHONE_HEIGHT = 360, 740  # pixels
AXE = Path("web/node_modules/axe-core/axe.min.js")


def open_on_a_phone(page: Page, url: str, scheme: Literal["light", "dark"]) -> None:
    page.set_viewport_size({"width": PHONE_WIDTH, "height": PHONE_HEIGHT})
    page.emulate_media(color_scheme=scheme)
    page.goto(url)


def check_in_view(page: Page, *selectors: str) -> None:
    """Each first element of these is all in view without scrolling, and nothing is wider than the phone."""
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE_WIDTH
    for selector in selectors:
        box = page.locator(selector).first.bounding_box()
        assert box is not None and min(box["x"], box["y"]) >= 0, selector
        assert box["x"] + box["width"] <= PHONE_WIDTH and box["y"] + box["height"] <= PHONE_HEIGHT, selector


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
