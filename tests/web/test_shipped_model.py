"""The shipped model in the page, against Python.

Twelve frames, not hundreds: a loaded machine makes two or three a second. The tiny model plays 200 in
test_engine.py, many times round its ring.
"""

from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Page

from diffusers_far.browser.starts import starts_for_export
from diffusers_far.export import export_onnx
from diffusers_far.loading import load_pipeline
from diffusers_far.shipped import ANY_STEP_CHECKPOINT, EPISODES
from tests.web.conftest import serving
from tests.web.test_page import LISTEN, actions_of, in_python, pause, picture, wait_for_frame


@pytest.fixture(scope="module")
def shipped_model(repository: Path, dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnxscript")
    pipe = load_pipeline(str(repository / ANY_STEP_CHECKPOINT), "cpu", "float32")
    starts = starts_for_export(repository / EPISODES, pipe.default_size, pipe.transformer.action_space)[:1]
    return export_onnx(pipe, tmp_path_factory.mktemp("shipped") / "model", starts=starts)


def test_the_shipped_model_plays_as_in_python(page: Page, dist: Path, shipped_model: Path) -> None:
    page.add_init_script(LISTEN)
    with serving(dist, shipped_model) as url:
        page.goto(url + "?seed=5")
        wait_for_frame(page, 11)
        page.keyboard.down("ArrowRight")
        wait_for_frame(page, 16)
        page.keyboard.up("ArrowRight")
        wait_for_frame(page, 19)
        pause(page)
        frame, game = in_python(page, shipped_model)
        assert game.num_frames >= 20 and {0, 3} <= set(actions_of(page))
        assert frame.std() > 10 and np.abs(picture(page) - frame).max() < 0.6
