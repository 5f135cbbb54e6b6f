"""The page of an evaluation: what is in it, and that names cannot change it."""

import base64
import re
from pathlib import Path
from typing import Any

import pytest

from diffusers_far.evaluation.report import page


@pytest.fixture
def results() -> dict[str, Any]:
    part = {"mean": 20.125, "interval": [19.0, 21.0], "by_frame": [22.0, 18.25]}
    part |= {"by_frame_interval": [[21.0, 17.0], [23.0, 19.0]]}
    fvd = {"mean": 123.456, "interval": None, "by_sample": [120.0, 126.912]}
    return {
        "checkpoint": "<script>alert(1)</script>",
        "data": "my & videos",
        "protocol": "next",
        "split": "validation",
        "truth": "frames",
        "num_videos": 3,
        "num_clips": 3,
        "num_context": 4,
        "num_frames": 6,
        "num_fvd_frames": 12,
        "seeds": [0, 1],
        "conditions": ["actions"],
        "guidance_scale": 1.5,
        "num_inference_steps": None,
        "command": "diffusers-far evaluate <x>",
        "date": "2026-01-02",
        "machine": "a machine",
        "dtype": "float32",
        "seconds": 12.0,
        "measures": {"psnr": part | {"best": part, "repeated": part}, "fvd": fvd},
    }


def test_figures_curve_and_videos_are_in_one_file(results: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"some video")
    text = page(results, [("name & <b>", tmp_path / "a.mp4")])
    rows = re.findall(r"<tr><td>(.*?)</td><td>(.*?)</td></tr>", text)
    assert rows[:2] == [
        ("1 frame ahead", "22.00 (21.00 to 23.00)"),
        ("2 frames ahead", "18.25 (17.00 to 19.00)"),
    ]
    assert [words for words, _ in rows[2:]] == [
        "all 2 frames",
        "the same, best of 2 samples",
        "the same, last given frame, repeated",
    ]
    assert "FVD 123.5: 3 clips of 12 frames, mean of 2 samples" in text
    assert base64.b64encode(b"some video").decode() in text and "name &amp; &lt;b&gt;" in text
    assert "<script>" not in text and "&lt;script&gt;" in text and "evaluate &lt;x&gt;" in text
    assert text.count("<svg") == 1 and not re.search(r'(src|href)="(?!data:|#)', text)


def test_of_fvd_alone_there_is_no_table(results: dict[str, Any]) -> None:
    del results["measures"]["psnr"]
    text = page(results, [])
    assert "<table" not in text and "<svg" not in text and "FVD 123.5" in text
