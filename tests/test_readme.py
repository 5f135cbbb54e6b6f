"""README, as a reader takes it: its Python runs in the checkout, and its links lead somewhere."""

import re
from pathlib import Path

from tests.python_process import run_python

MOST_LINES = 80  # one screen


def test_the_example_runs(repository: Path, tmp_path: Path) -> None:
    text = (repository / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```python\n(.*?)^```", text, flags=re.M | re.S)
    for name in ("data", "checkpoints"):
        (tmp_path / name).symlink_to(repository / name)
    run = run_python(["-c", example], cwd=tmp_path, timeout=600)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "walk.mp4").stat().st_size > 5000


def test_it_is_one_screen_and_its_links_lead_somewhere(repository: Path) -> None:
    text = (repository / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("https://")]
    assert len(links) > 10
    assert [link for link in links if not (repository / link.partition("#")[0]).is_file()] == []


def test_it_names_every_page_of_the_site(repository: Path) -> None:
    """A reader of GitHub finds what a reader of the site does."""
    text = (repository / "README.md").read_text(encoding="utf-8")
    pages = {f"docs/{page.name}" for page in (repository / "docs").glob("*.md")}
    assert {page for page in pages if f"({page}" not in text} == set()
