"""The built page, tiny models for it, and a page in a browser."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser, Page

from diffusers_far.browser.static_page import in_background, make_server
from diffusers_far.export import export_onnx
from tests import tiny_models as tm

ACTIONS = ["noop", "forward", "left", "right", "forward-left", "forward-right"]
PATIENCE = 60_000  # milliseconds


@pytest.fixture(scope="session")
def dist(repository: Path) -> Path:
    """The built page; tests of it are skipped where it is not built, and fail under CI=true."""
    folder = repository / "web" / "dist"
    missing = shutil.which("node") is None or not (folder / "index.html").is_file()
    if missing:
        reason = "needs node and the built page (Debian: apt-get install nodejs npm; then: make web)"
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
    return folder


@pytest.fixture(scope="session")
def long_model(tmp_path_factory: pytest.TempPathFactory, dist: Path) -> Path:
    """Of a Long model with named actions, classes and two starts."""
    pytest.importorskip("onnxscript")
    model = tm.long_transformer(num_actions=6, num_classes=5, num_layers=1)
    pipe = tm.pipeline(model, num_training_frames=14, action_names=ACTIONS)
    frames = np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), dtype=np.uint8)
    starts = [(frames, [0, 1, 2, 3, 4, 5]), (frames[:2], None)]
    folder = tmp_path_factory.mktemp("long") / "model"
    return export_onnx(pipe, folder, num_inference_steps=[1, 3], starts=starts)


@contextmanager
def serving(dist: Path, model: Path) -> Iterator[str]:
    """The address of the page with this model."""
    server = make_server(dist, model, port=0)
    yield in_background(server)
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="session")
def url(dist: Path, long_model: Path) -> Iterator[str]:
    with serving(dist, long_model) as url:
        yield url


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """Errors of the page's own script fail the test."""
    context = browser.new_context(viewport={"width": 1100, "height": 950})
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page
    context.close()
    assert not errors


# A worker of the page's own script, which answers as it answers the page; pictures come in base64.
ASK = """async ([name, argument]) => {
    const plain = (value) => value instanceof Uint8ClampedArray ? btoa(String.fromCharCode(...value))
        : ArrayBuffer.isView(value) ? [...value] : Array.isArray(value) ? value.map(plain)
        : value && typeof value === "object"
        ? Object.fromEntries(Object.entries(value).map(([key, one]) => [key, plain(one)])) : value;
    window.engine ??= new Worker("worker.js", { type: "module" });
    return new Promise((done, failed) => {
        engine.onerror = (event) => failed(new Error(event.message));
        engine.onmessage = ({ data }) => {
            if (data.progress) return;
            data.error === undefined ? done(plain(data.result)) : failed(new Error(data.error));
        };
        engine.postMessage({ id: 1, name, argument });
    });
}"""


@pytest.fixture
def ask(page: Page) -> Callable[..., Any]:
    """Asks a worker: `ask(name, argument)`."""
    return lambda name, argument=None: page.evaluate(ASK, [name, argument])
