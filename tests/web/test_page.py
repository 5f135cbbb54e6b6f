"""The page in a headless Chromium, with a tiny model: what is pressed is what Python makes of it."""

import base64
import io
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, Route, expect

from diffusers_far.browser.static_page import in_background
from diffusers_far.export import ExportedRollout
from diffusers_far.video_files import read_video, save_video
from tests.accessibility import check_in_view, open_on_a_phone, serious_findings
from tests.web.conftest import PATIENCE, serving

# What the page asks its worker for, with pictures as lists.
LISTEN = """
window.sent = [];
const post = Worker.prototype.postMessage;
Worker.prototype.postMessage = function (message, ...rest) {
    const copy = { ...message };
    if (copy.argument?.beginning?.pictures) copy.argument = { ...copy.argument, beginning: {
        pictures: copy.argument.beginning.pictures.map((one) => [...one]) } };
    sent.push(copy);
    return post.call(this, message, ...rest);
};
"""
SHOWN = "Number(document.body.dataset.frame)"


@pytest.fixture
def page(page: Page) -> Page:
    page.add_init_script(LISTEN)
    return page


def wait_for_frame(page: Page, number: int) -> None:
    page.wait_for_function(f"{SHOWN} >= {number}", timeout=PATIENCE)


def pause(page: Page) -> int:
    """Stop the game; the number of its last frame."""
    page.get_by_role("button", name="Pause").click()
    page.wait_for_timeout(300)  # for the frame that is on its way
    return page.evaluate(SHOWN)


def picture(page: Page, canvas: str = "#screen") -> np.ndarray:
    """Of the game, or another canvas: `[64, 64, 3]` uint8."""
    url = page.evaluate("(canvas) => document.querySelector(canvas).toDataURL('image/png')", canvas)
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB"))


def in_python(page: Page, folder: Path) -> tuple[np.ndarray, ExportedRollout]:
    """The last frame of what the page asked for, made in Python."""
    game, marked, frame = ExportedRollout(folder, num_threads=1), None, np.zeros(0)
    for message in page.evaluate("sent"):
        name, argument = message["name"], message.get("argument")
        if name == "begin":
            settings = argument["settings"]
            game = ExportedRollout(folder, settings["seed"], settings["classLabel"], num_threads=1)
            beginning = argument["beginning"] or {}
            if "start" in beginning:
                game.append_start(beginning["start"])
            for one in beginning.get("pictures", []):
                game.append(np.array(one, np.uint8).reshape(64, 64, 4)[..., :3])
        elif name == "step":
            game.sampler = game.config["samplers"][str(argument["numSteps"])]
            frame = game.step(argument["action"])
        elif name == "rewind":
            game.rewind(argument)
        elif name == "mark":
            marked = game.fork()
        elif name == "back":
            game = marked.fork()
    return frame * 255, game


def actions_of(page: Page) -> list[int]:
    return [one["argument"]["action"] for one in page.evaluate("sent") if one["name"] == "step"]


def test_it_opens_on_the_running_game_and_plays_as_told(page: Page, url: str, long_model: Path) -> None:
    page.goto(url)
    wait_for_frame(page, 9)  # 6 given ones, and it walks by itself
    assert set(actions_of(page)) <= {1, 2}  # forward and left
    expect(page.locator("#status")).to_have_text(re.compile(r"Frame \d+ · \d+\.\d frames/s · on your CPU"))
    expect(page.locator("#loading")).to_be_hidden()
    expect(page.locator("#cost")).to_have_text(re.compile(r"Costs: \d+ MB to load once"))
    expect(page.locator("#keys")).to_contain_text("arrow keys")
    page.keyboard.down("ArrowRight")
    page.wait_for_function("sent.filter((one) => one.argument?.action === 3).length >= 2")
    page.keyboard.down("w")
    page.wait_for_function("sent.at(-1).argument.action === 5")  # forward and right
    page.keyboard.up("ArrowRight")
    page.keyboard.up("w")
    page.wait_for_function("sent.at(-1).argument.action === 0")
    left = page.get_by_role("button", name="left", exact=True)
    left.dispatch_event("pointerdown")
    page.wait_for_function("sent.at(-1).argument.action === 2")
    left.dispatch_event("pointerup")
    page.evaluate("navigator.getGamepads = () => [{ buttons: [], axes: [-0.9, -0.9] }]")
    page.wait_for_function("sent.at(-1).argument.action === 4")
    page.evaluate("delete navigator.getGamepads")
    page.locator("#quality").fill("0")
    page.wait_for_function("sent.at(-1).argument.numSteps === 1")
    pause(page)
    assert np.abs(picture(page) - in_python(page, long_model)[0]).max() < 0.51


def test_rewind_and_branch(page: Page, url: str, long_model: Path) -> None:
    page.goto(url + "?start=nothing")
    wait_for_frame(page, 12)
    last = pause(page)
    page.get_by_role("button", name="Back 8").click()
    page.wait_for_function(f"{SHOWN} === {last - 8}")
    before = picture(page)
    page.get_by_role("button", name="Mark place").click()
    page.keyboard.press("d")  # goes on
    wait_for_frame(page, last - 5)
    pause(page)
    assert np.abs(picture(page) - in_python(page, long_model)[0]).max() < 0.51
    page.get_by_role("button", name="To the mark").click()
    page.wait_for_function(f"{SHOWN} === {last - 8}")
    assert np.array_equal(picture(page), before)
    page.get_by_role("button", name="Play").click()
    wait_for_frame(page, last - 6)
    pause(page)
    assert np.abs(picture(page) - in_python(page, long_model)[0]).max() < 0.51


def test_pictures_and_videos_of_the_visitor(page: Page, url: str, long_model: Path, tmp_path: Path) -> None:
    rows = np.linspace(0, 255, 80)[:, None, None].astype(np.uint8)
    Image.fromarray(np.broadcast_to(rows, (80, 160, 3))).save(tmp_path / "own.png")
    grays = np.linspace(0.1, 0.9, 30)[:, None, None, None]
    save_video(np.broadcast_to(grays, (30, 96, 64, 3)), tmp_path / "own.webm", 10)
    loaded: list[str] = []
    page.on("request", lambda request: loaded.append(request.url.rpartition("/")[2]))
    page.goto(url)
    wait_for_frame(page, 6)
    assert "decode.onnx" in loaded and "encode.onnx" not in loaded  # nobody has brought a picture yet
    for kind, name, count in (("picture", "own.png", 1), ("video", "own.webm", 16)):
        page.set_input_files(f"#{kind}", tmp_path / name)
        page.wait_for_function(f"sent.some((one) => one.argument?.beginning?.pictures?.length === {count})")
        begins = (
            f"sent.findLastIndex((one) => one.name === 'begin') <= sent.length - 4 && {SHOWN} >= {count + 1}"
        )
        page.wait_for_function(begins)
        pause(page)
        sent = [one for one in page.evaluate("sent") if one["name"] == "begin"][-1]["argument"]["beginning"]
        given = np.array(sent["pictures"]).reshape(-1, 64, 64, 4)
        if kind == "picture":
            assert (
                np.abs(given[0, :, 0, 0] - np.linspace(0, 255, 64)).max() < 8
            )  # scaled, not cropped, in height
        else:
            assert np.abs(given[..., :3].mean(axis=(1, 2, 3)) / 255 - grays[-16:].ravel()).max() < 0.06
        assert np.abs(picture(page) - in_python(page, long_model)[0]).max() < 0.51
    assert "encode.onnx" in loaded
    (tmp_path / "broken.png").write_text("no picture")
    page.set_input_files("#picture", tmp_path / "broken.png")
    expect(page.locator("#error")).to_have_text("broken.png cannot be read as a picture.")
    (tmp_path / "broken.webm").write_bytes((tmp_path / "own.webm").read_bytes()[:40])
    page.set_input_files("#video", tmp_path / "broken.webm")
    expect(page.locator("#error")).to_have_text("broken.webm cannot be played by this browser.")


def test_the_game_as_a_video_and_as_a_link(page: Page, url: str, browser: Browser, tmp_path: Path) -> None:
    page.goto(url + "?seed=7&start=1&quality=1")
    wait_for_frame(page, 4)
    last = pause(page)
    with page.expect_download() as download:
        page.get_by_role("button", name="Save video").click()
    file = tmp_path / download.value.suggested_filename
    download.value.save_as(file)
    video = read_video(file)
    assert len(video) == last + 1 and video.shape[1:] == (256, 256, 3)
    shown = np.repeat(np.repeat(picture(page), 4, axis=0), 4, axis=1)
    assert np.abs(video[-1].astype(float) - shown).mean() < 12  # compressed
    begins = "sent.filter((one) => one.name === 'begin')"
    page.get_by_role("button", name="New game").click()
    page.wait_for_function(f"{begins}.length === 2 && sent.at(-1).name === 'step'")
    page.get_by_role("button", name="Share").click()
    page.wait_for_url(re.compile(r"seed=\d{2,}&start=1&quality=1"))
    begin = f"{begins}.at(-1).argument"
    expected = page.evaluate(begin)
    page.reload()
    wait_for_frame(page, 3)
    assert page.evaluate(begin) == expected and expected["settings"]["seed"] != 7


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_sees_the_game_and_axe_finds_nothing(
    page: Page, url: str, repository: Path, scheme: Any
) -> None:
    open_on_a_phone(page, url, scheme)
    wait_for_frame(page, 7)
    check_in_view(page, "h1", "#screen", "#pad")
    assert serious_findings(page, repository) == []


def test_it_plays_without_a_network_afterwards(page: Page, dist: Path, long_model: Path) -> None:
    with serving(dist, long_model) as url:
        page.goto(url)
        wait_for_frame(page, 6)
        page.evaluate("navigator.serviceWorker.ready.then(() => null)")
        page.wait_for_function("caches.keys().then((all) => all.some((name) => name.includes('-page-')))")
    page.reload()  # the server is gone
    wait_for_frame(page, 8)
    assert not page.inner_text("#error")


class PlainHandler(SimpleHTTPRequestHandler):
    """As a server that knows nothing of us; `allow` lets pages of others read its files."""

    allow = False

    def end_headers(self) -> None:
        if self.allow:
            self.send_header("Access-Control-Allow-Origin", "*")
        super().end_headers()

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


class OpenHandler(PlainHandler):
    allow = True


@contextmanager
def plain_server(folder: Path, handler: type[PlainHandler]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder)))
    yield in_background(server)
    server.shutdown()
    server.server_close()


def test_any_model_on_any_server(page: Page, dist: Path, long_model: Path) -> None:
    """Of another origin, on servers without the headers that threads need: the service worker adds them."""
    with plain_server(dist, PlainHandler) as site, plain_server(long_model, OpenHandler) as models:
        page.goto(f"{site}?model={models}rollout.json")
        page.wait_for_function("crossOriginIsolated", timeout=PATIENCE)
        wait_for_frame(page, 8)
        page.goto(f"{site}?model=nowhere")
        expect(page.get_by_role("alert")).to_have_text(
            re.compile(
                "nowhere/rollout.json cannot be loaded: the server says 404.*To play another model, add"
            )
        )
        expect(page.locator("#loading")).to_be_hidden()


# Keeps the device, so that a message can lose it as a crash of the GPU's process does.
LOSE = """
let device;
const request = GPUAdapter.prototype.requestDevice;
GPUAdapter.prototype.requestDevice = async function (...rest) {
    return (device = await request.apply(this, rest));
};
addEventListener("message", (event) => {
    if (event.data !== "lose") return;
    event.stopImmediatePropagation();
    device.destroy();
});
"""


@pytest.fixture
def gpu_page(browser: Browser) -> Iterator[Page]:
    """In a Chromium whose WebGPU is computed by the CPU."""
    names = ("chromium", "chromium-browser", "google-chrome")
    executable = next(filter(None, map(shutil.which, names)))
    flags = ["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan"]
    with browser.browser_type.launch(executable_path=executable, args=["--no-sandbox", *flags]) as own:
        yield own.new_page()


def test_a_lost_gpu_changes_nothing(gpu_page: Page, url: str, long_model: Path) -> None:
    def add(route: Route) -> None:
        reply = route.fetch()
        route.fulfill(response=reply, body=LOSE + reply.text())

    page = gpu_page
    page.route("**/worker.js", add)
    page.add_init_script(LISTEN)
    page.add_init_script(
        "const Own = Worker; window.Worker = class extends Own {"
        " constructor(...all) { super(...all); window.own = this; } };"
    )
    page.goto(url + "?quality=1&start=nothing")
    if page.evaluate("navigator.gpu?.requestAdapter().then((one) => !one)") is not False:
        pytest.skip("this Chromium has no software WebGPU")
    page.wait_for_function(f"{SHOWN} >= 1", timeout=PATIENCE)
    expect(page.locator("#status")).to_contain_text("on your GPU")
    page.evaluate("own.postMessage('lose')")
    page.evaluate("sent = sent.filter((one) => one !== 'lose' && one.name)")
    expect(page.locator("#status")).to_contain_text("on your CPU", timeout=PATIENCE)
    assert "WebGPU failed" in page.locator("#status").get_attribute("title")
    pause(page)
    # Frames of the GPU are in its context: the two add in different orders.
    assert np.abs(picture(page) - in_python(page, long_model)[0]).max() < 2
