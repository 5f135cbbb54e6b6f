"""What building the site adds to mkdocs: examples that fail stop it, and links lead somewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from docs.docstring_links import linked
from docs.site_hooks import as_paths

GOOD = """# Page

```python exec="on"
steps = 6 * 7
```

```python exec="on"
from diffusers_far import preset

print("the answer is", steps, preset("far-b-ucf101-64").transformer["num_layers"])
```

```bash exec="on"
ls checkpoints/far-doom-maze-64
```
"""
BAD = """# Other

```python exec="on"
raise ValueError("this example is wrong")
```
"""


def test_examples_run_and_one_that_fails_stops_the_build(repository: Path, tmp_path: Path) -> None:
    """With the settings of the project's site."""
    settings = yaml.safe_load((repository / "mkdocs.yml").read_text(encoding="utf-8"))
    for name in ("nav", "site_dir"):
        del settings[name]
    settings["hooks"] = [str(repository / hook) for hook in settings["hooks"]]
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/index.md").write_text(GOOD, encoding="utf-8")
    (tmp_path / "docs/other.md").write_text(BAD, encoding="utf-8")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode != 0 and "Aborted with 1 warnings" in run.stdout
    assert "this example is wrong" in run.stderr
    page = (tmp_path / "site/index.html").read_text(encoding="utf-8")
    assert "the answer is 42 12" in page and "model_index.json" in page
    assert re.findall(r"<(?:script|link|img)[^>]*https?:[^>]*>", page) == []  # it reads offline, too


def test_links_out_of_the_site() -> None:
    assert (
        as_paths("[rules](../CONTRIBUTING.md#set-up) and [x](x.md)")
        == "rules (`CONTRIBUTING.md`) and [x](x.md)"
    )
    assert as_paths("[`CHANGELOG.md`](../CHANGELOG.md)") == "`CHANGELOG.md`"
    with pytest.raises(ValueError, match="nowhere"):
        as_paths("[this](../nowhere.md)")


def test_links_of_docstrings() -> None:
    rollout = "diffusers_far.rollout.Rollout"
    assert linked("see [`Rollout.step`]") == f"see [`Rollout.step`][{rollout}.step]"
    assert linked("[`step`](Rollout.step), [`iterate_video`]") == f"[`step`][{rollout}.step], `iterate_video`"
