"""README's Python, as a reader runs it: one block after the other, in the checkout."""

import re
import subprocess
import sys
from pathlib import Path


def test_the_examples_run(repository: Path, tmp_path: Path) -> None:
    text = (repository / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.M | re.S)
    assert len(blocks) == 4 and "holiday.mp4" in blocks[3]  # the last one is of a reader's own file
    for name in ("data", "checkpoints"):
        (tmp_path / name).symlink_to(repository / name)
    run = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks[:3]).replace("[1] * 100", "[1] * 3")],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "walk.mp4").stat().st_size > 5000 and (tmp_path / "latest.png").is_file()
