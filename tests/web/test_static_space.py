"""A static Space with the built page: what `diffusers-far push --space static` writes is played."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Page, expect

from diffusers_far.space import write_space
from tests import tiny_models as tm
from tests.web.conftest import ACTIONS, PATIENCE
from tests.web.test_page import (
    LISTEN,
    PlainHandler,
    in_python,
    pause,
    picture,
    plain_server,
    wait_for_frame,
)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A tiny model under the name of a shipped one, so that it gets the shipped episodes."""
    folder = tmp_path / "far-doom-maze-64"
    pipe = tm.pipeline(
        tm.transformer(num_actions=6, num_layers=1), num_training_frames=12, action_names=ACTIONS
    )
    pipe.save_pretrained(folder)
    return folder


def test_visitors_begin_with_real_frames(page: Page, dist: Path, checkpoint: Path, tmp_path: Path) -> None:
    """From a server that sends none of the headers that threads need."""
    pytest.importorskip("onnxscript")
    space = write_space(tmp_path / "space", str(checkpoint), "me/game", "static", page=str(dist))
    config = json.loads((space / "model" / "rollout.json").read_text())
    assert len(config["starts"]) == 6
    assert all(start["num_frames"] == 8 and start["actions"] for start in config["starts"])
    page.add_init_script(LISTEN)
    loaded: list[str] = []
    page.on("request", lambda request: loaded.append(request.url.rpartition("/")[2]))
    with plain_server(space, PlainHandler) as url:
        page.goto(url)
        page.wait_for_function("crossOriginIsolated", timeout=PATIENCE)
        wait_for_frame(page, 10)  # 8 given ones
        begins = "sent.filter((one) => one.name === 'begin').map((one) => one.argument.beginning)"
        assert page.evaluate(begins) == [{"start": 0}]
        expect(page.get_by_role("button", name="Real picture")).to_have_count(6)
        packed = {"commit.onnx.packed", "decode.onnx.packed", "step.onnx.packed", "weights.bin.packed"}
        assert packed == {name for name in loaded if name.endswith((".packed", ".onnx")) or "weights" in name}
        pause(page)
        difference = np.abs(picture(page) - in_python(page, space / "model")[0]).max()
        assert difference < 2  # float16: what adds in another order rounds otherwise
        page.get_by_role("button", name="Real picture 3").click()
        wait_for_frame(page, 9)
        assert page.evaluate(begins) == [{"start": 0}, {"start": 2}]
        shown = picture(page, "[data-start='2'] canvas").astype(float)
    strip = np.asarray(Image.open(space / "model" / "start_2.jpg"), float)
    assert np.abs(shown - strip[:, -64:]).mean() < 2 and shown.std() > 10
