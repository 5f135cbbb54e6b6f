"""The app in a real browser, with the shipped model."""

import base64
import io
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from playwright.sync_api import Browser, Page, Request, Route, expect

from diffusers_far.browser.app import build_app
from diffusers_far.browser.app import serve as serve_app
from diffusers_far.browser.players import Players
from diffusers_far.browser.uploads import MAX_UPLOAD_MB
from diffusers_far.browser.visitors import Visitors
from diffusers_far.loading import load_pipeline
from diffusers_far.metrics import horizontal_shift
from diffusers_far.shipped import CHECKPOINT, EPISODES
from diffusers_far.video_files import read_video
from tests.accessibility import check_in_view, open_on_a_phone, serious_findings
from tests.tiny_models import pipeline, transformer

START_FRAME = 31  # a start has 32 frames
PATIENCE = 60_000  # milliseconds


@contextmanager
def serve(repository: Path, max_players: int) -> Iterator[str]:
    """A server for so many players, and its address."""
    shipped = load_pipeline(str(repository / CHECKPOINT), "cpu")
    players, visitors = Players(max_players=max_players), Visitors(seconds_to_read=60)
    app = build_app(shipped, repository / EPISODES, players, visitors, "mazes")
    yield serve_app(app, visitors, quiet=True)
    app.close()


@pytest.fixture(scope="module")
def url(repository: Path) -> Iterator[str]:
    with serve(repository, max_players=3) as url:
        yield url


@pytest.fixture
def page(browser: Browser, url: str) -> Iterator[Page]:
    """A visitor with the app open; errors of the page's own script fail the test."""
    page = browser.new_page(viewport={"width": 1100, "height": 950})
    page.set_default_timeout(PATIENCE)
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(f"{url}?paused")
    yield page
    page.close(run_before_unload=True)
    assert not errors


def wait_for_frame(page: Page, number: int) -> None:
    shown = "document.querySelector('#play .far-status')?.textContent.match(/frame (-?\\d+)/)?.[1]"
    page.wait_for_function(f"number => {shown} >= number", arg=number, timeout=PATIENCE)


def frame_number(page: Page) -> int:
    return int(re.search(r"frame (-?\d+)", page.inner_text(".far-status")).group(1))


def picture(page: Page) -> np.ndarray:
    """Pixels of the game's canvas, `[64, 64, 3]` uint8."""
    url = page.evaluate("document.querySelector('.far-canvas').toDataURL('image/png')")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB"))


def frames_of(page: Page) -> dict[int, np.ndarray]:
    """The frames that the page is sent from now on, by their numbers."""
    frames: dict[int, np.ndarray] = {}

    def note(route: Route) -> None:
        answer = route.fetch()
        if json.loads(route.request.post_data)["fn_name"] == "step":
            reply = answer.json()
            content = base64.b64decode(reply["image"].partition("base64,")[2])
            frames[reply["number"]] = np.asarray(Image.open(io.BytesIO(content)))
        route.fulfill(response=answer)

    page.route(re.compile("/component_server"), note)
    return frames


def as_tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image.copy()).movedim(-1, 0)[None].float() / 255


def difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(float) - other).mean())


def test_it_opens_on_a_running_game(browser: Browser, url: str) -> None:
    """Which walks by itself until something is pressed."""
    page = browser.new_page(viewport={"width": 1100, "height": 950})
    page.set_default_timeout(PATIENCE)
    sent = actions_of(page)
    page.goto(url)
    wait_for_frame(page, START_FRAME + 3)
    assert 1 in sent and set(sent) <= {1, 2}  # forward, and to the left where there is a wall
    expect(page.locator(".far-run")).to_have_text("Pause")
    expect(page.locator(".far-keys")).to_contain_text("Keys: arrow keys, WASD, or the buttons.")
    page.keyboard.down("ArrowLeft")
    wait_for_frame(page, frame_number(page) + 2)
    assert sent[-1] == 2
    page.keyboard.up("ArrowLeft")
    wait_for_frame(page, frame_number(page) + 2)
    assert sent[-1] == 0  # it stands still, and does not walk by itself again
    page.close(run_before_unload=True)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_sees_the_game_and_axe_finds_nothing(
    page: Page, repository: Path, url: str, scheme: Any
) -> None:
    open_on_a_phone(page, f"{url}?paused", scheme)
    wait_for_frame(page, START_FRAME)
    check_in_view(page, "h1", ".far-canvas", ".far-pad")
    assert serious_findings(page, repository) == []


def test_play(page: Page, tmp_path: Path, repository: Path) -> None:
    wait_for_frame(page, START_FRAME)
    start = picture(page)
    real = read_video(next((repository / EPISODES).glob("*.mp4")))[START_FRAME]
    assert difference(start, real) < 6  # JPEG

    # The first frame of a turn to the left moves to the right, and the other way round.
    frames = frames_of(page)

    def turned(before: np.ndarray, number: int) -> float:
        return horizontal_shift(as_tensor(before), as_tensor(frames[number + 1])).item()

    for key, sign in (("ArrowLeft", 1), ("d", -1)):
        page.click(".far-reset")
        expect(page.locator(".far-status")).to_contain_text(f"frame {START_FRAME}:")
        assert difference(picture(page), start) == 0
        page.focus(".far-canvas")
        page.keyboard.down(key)
        wait_for_frame(page, START_FRAME + 2)
        page.keyboard.up(key)
        page.click(".far-run")  # pause
        assert sign * turned(start, START_FRAME) > 0

    page.click(".far-reset")
    expect(page.locator(".far-status")).to_contain_text(f"frame {START_FRAME}:")
    for button, sign in (("left", 1), ("right", -1)):
        before, number = picture(page), frame_number(page)
        page.dispatch_event(f".far-pad button[data-action={button}]", "pointerdown")  # which plays
        wait_for_frame(page, number + 1)
        page.click(".far-run")  # pause
        page.dispatch_event(f".far-pad button[data-action={button}]", "pointerup")
        page.wait_for_function("!document.querySelector('.far-pad .held')")
        page.wait_for_timeout(500)  # the frame that was on its way
        assert sign * turned(before, number) > 0
    number = frame_number(page)
    page.click(".far-step")
    wait_for_frame(page, number + 1)
    page.wait_for_timeout(300)
    assert frame_number(page) == number + 1

    with page.expect_download() as download:
        page.click(".far-save")
    download.value.save_as(tmp_path / "play.mp4")
    video = read_video(tmp_path / "play.mp4")
    assert video.shape == (frame_number(page) + 1, 256, 256, 3)
    assert difference(video[START_FRAME, 2::4, 2::4], start) < 12


def test_settings_and_starts(page: Page) -> None:
    wait_for_frame(page, START_FRAME)
    expect(page.locator(".far-status")).to_contain_text("25 long-term and 7 short-term frames")
    expect(page.locator(".far-strip")).to_have_attribute("data-looked", "0")
    page.check(".far-look")
    page.click(".far-step")
    expect(page.locator(".far-strip")).to_have_attribute("data-looked", "32")
    page.uncheck(".far-memory")
    page.fill(".far-steps", "2")
    page.click(".far-step")
    expect(page.locator(".far-status")).to_contain_text("0 long-term and 7 short-term frames")
    page.fill(".far-seed", "3")
    page.click("text=From nothing")
    expect(page.locator(".far-status")).to_contain_text("frame -1:")
    page.click(".far-step")
    wait_for_frame(page, 0)
    assert picture(page).std() > 5


def test_a_game_from_an_uploaded_image(page: Page, tmp_path: Path) -> None:
    wait_for_frame(page, START_FRAME)
    image = np.zeros((80, 120, 3), np.uint8)
    image[:, 60:, 0] = 255
    Image.fromarray(image).save(tmp_path / "half.png")
    page.set_input_files(".far-upload", tmp_path / "half.png")
    expect(page.locator(".far-status")).to_contain_text("frame 0:")
    shown = picture(page)
    assert shown.shape == (64, 64, 3) and shown[32, 10, 0] < 30 and shown[32, 54, 0] > 225
    page.click(".far-step")
    wait_for_frame(page, 1)

    (tmp_path / "broken.png").write_bytes(b"no image")
    page.set_input_files(".far-upload", tmp_path / "broken.png")
    expect(page.locator(".far-error")).to_contain_text("cannot be read as an image")
    (tmp_path / "large.png").write_bytes(bytes(5 * 2**20))
    page.set_input_files(".far-upload", tmp_path / "large.png")
    expect(page.locator(".far-error")).to_contain_text("large.png has 5.0 MB; at most 4 MB")


def test_a_visitor_without_a_place_is_told_to_wait(browser: Browser, repository: Path) -> None:
    with serve(repository, max_players=2) as url:  # its own: pages of other tests may not have left yet
        pages = [browser.new_page() for _ in range(3)]
        for page in pages:
            page.set_default_timeout(PATIENCE)
        for page in pages[:2]:
            page.goto(f"{url}?paused")
            wait_for_frame(page, START_FRAME)
        waiting = pages[2]
        waiting.goto(f"{url}?paused")
        expect(waiting.locator(".far-error")).to_contain_text("All 2 places are taken", timeout=PATIENCE)
        pages[0].close(run_before_unload=True)  # its place is free as soon as the server hears of it
        for _ in range(PATIENCE // 1000):
            waiting.click(".far-reset")
            waiting.wait_for_timeout(1000)
            if not waiting.inner_text(".far-error"):
                break
        wait_for_frame(waiting, START_FRAME)
        for page in pages[1:]:
            page.close()


def test_continue_a_video(page: Page, repository: Path, tmp_path: Path) -> None:
    page.get_by_role("tab", name="Continue a video").click()
    episode = next((repository / EPISODES).glob("*.mp4"))
    page.set_input_files("#continue-file input[type=file]", episode)
    page.fill("#continue-new input[type=number]", "3")
    page.wait_for_timeout(500)
    page.click("#continue-run")
    status = page.locator("#continue-status")
    expect(status).to_contain_text(
        "3 frames after 32 of the video, the first 3 beside the truth", timeout=PATIENCE
    )
    source = page.locator("#continue-video video").get_attribute("src")
    (tmp_path / "made.mp4").write_bytes(page.request.get(source).body())
    made = read_video(tmp_path / "made.mp4")
    assert len(made) == 35
    halves = np.split(made[:, 8:-8], 2, axis=2)
    inside = np.s_[:, 8:-8, 8:-8]
    assert difference(halves[0][inside][:32], halves[1][inside][:32]) < 12  # the context, through the mp4
    assert difference(halves[0][inside][32:], halves[1][inside][32:]) > 2  # real, and made
    assert halves[1][inside][32:].std(axis=(1, 2, 3)).min() > 10


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no video", "cannot be read as a video"),
        (bytes((MAX_UPLOAD_MB + 1) * 2**20), "too large|exceeds|size"),
    ],
    ids=["corrupt", "oversized"],
)
def test_uploads_that_are_refused(page: Page, tmp_path: Path, content: bytes, message: str) -> None:
    page.get_by_role("tab", name="Continue a video").click()
    (tmp_path / "file.mp4").write_bytes(content)
    page.set_input_files("#continue-file input[type=file]", tmp_path / "file.mp4")
    if len(content) < 2**20:
        page.wait_for_timeout(500)
        page.click("#continue-run")
    expect(page.locator(".toast-body").first).to_contain_text(re.compile(message), timeout=PATIENCE)


def test_compare_context(page: Page) -> None:
    page.get_by_role("tab", name="Compare context").click()
    page.fill("#compare-new input[type=number]", "2")
    page.wait_for_timeout(500)
    page.click("#compare-run")
    expect(page.locator("#compare-video video")).to_be_visible(timeout=PATIENCE)
    titles = page.locator("#compare-pictures figcaption").all_inner_texts()
    assert len(titles) == 4 and "Window only, plain RoPE" in titles
    assert len({image.get_attribute("src") for image in page.locator("#compare-pictures img").all()}) == 4


# ------------------------------------------------------------------------------------------------------------
# Keys, phones and other models


def actions_of(page: Page) -> list[int]:
    """The actions that the page asks for from now on; the list grows."""
    actions: list[int] = []

    def note(request: Request) -> None:
        if "component_server" in request.url and request.post_data:
            body = json.loads(request.post_data)
            if body.get("fn_name") == "step":
                actions.append(body["data"]["action"])

    page.on("request", note)
    return actions


def wait_until(page: Page, condition: Callable[[], bool]) -> None:
    for _ in range(PATIENCE // 50):
        if condition():
            return
        page.wait_for_timeout(50)
    raise AssertionError("it never came about")


LOSE_FOCUS = "window.dispatchEvent(new FocusEvent('blur'))"
HIDE = """() => {
  Object.defineProperty(document, 'hidden', {value: true, configurable: true});
  document.dispatchEvent(new Event('visibilitychange'));
}"""


@pytest.mark.parametrize("event", [LOSE_FOCUS, HIDE], ids=["focus", "tab"])
def test_keys_are_released_when_the_window_is_left(page: Page, event: str) -> None:
    actions = actions_of(page)
    wait_for_frame(page, START_FRAME)
    page.click(".far-step")  # the focus is on a button
    page.keyboard.down("ArrowUp")
    wait_until(page, lambda: actions.count(1) >= 2)
    page.evaluate(event)
    wait_until(page, lambda: actions[-1] == 0)
    number = len(actions)
    wait_until(page, lambda: len(actions) > number + 3)
    assert set(actions[number:]) == {0}


def test_keys_work_as_soon_as_the_page_is_there(browser: Browser, url: str) -> None:
    """Nothing has been clicked, and the first frame has not come yet."""
    page = browser.new_page()
    page.set_default_timeout(PATIENCE)
    actions = actions_of(page)
    page.goto(f"{url}?paused")  # else it walks forward, whatever is pressed
    page.wait_for_selector("#play .far-canvas")
    page.keyboard.down("w")
    wait_until(page, lambda: actions.count(1) >= 2)
    page.keyboard.up("w")
    wait_until(page, lambda: actions[-1] == 0)
    page.click(".far-run")
    page.focus(".far-seed")
    number = len(actions)
    page.keyboard.press("d")  # the field's
    page.focus(".far-reset")
    page.keyboard.press("Control+d")  # the browser's
    page.get_by_role("tab", name="Compare context").click()
    page.keyboard.press("ArrowLeft")  # the tabs'
    page.wait_for_timeout(500)
    assert len(actions) <= number + 1  # one may have been on its way
    page.close(run_before_unload=True)


def test_on_a_phone_the_pad_is_in_the_first_screen(browser: Browser, url: str) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 664}, has_touch=True, is_mobile=True)
    page.set_default_timeout(PATIENCE)
    page.goto(url)
    wait_for_frame(page, START_FRAME)
    for selector in (".far-canvas", ".far-pad button >> nth=-1", ".far-run", ".far-save"):
        box = page.locator(selector).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 390 and box["y"] + box["height"] <= 664
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.close(run_before_unload=True)


@pytest.mark.parametrize("width", [390, 1280])
def test_buttons_line_up(browser: Browser, url: str, width: int) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.set_default_timeout(PATIENCE)
    page.goto(url)
    wait_for_frame(page, START_FRAME)
    for row in (".far-row", ".far-pad", ".far-starts"):
        boxes = [button.bounding_box() for button in page.locator(f"{row} button").all()]
        assert len({box["height"] for box in boxes}) == 1
        for one in boxes:  # those of a line begin at the same height
            others = [box for box in boxes if abs(box["y"] - one["y"]) < one["height"] / 2]
            assert len({box["y"] for box in others}) == 1
    page.close(run_before_unload=True)


def test_every_setting_has_a_tip_of_one_sentence(page: Page) -> None:
    wait_for_frame(page, START_FRAME)
    tips = page.locator(".far-setting small").all_inner_texts()
    assert len(tips) == page.locator(".far-side input").count()
    assert all(tip.endswith(".") and tip.count(".") == 1 for tip in tips)
    text = page.inner_text("body")
    assert "knows only mazes" in text and "diffusers-far play --checkpoint" in text


def test_a_large_photo_is_made_smaller_before_it_is_sent(page: Page, tmp_path: Path) -> None:
    wait_for_frame(page, START_FRAME)
    upright = np.random.default_rng(0).integers(0, 60, (3000, 3000, 3), dtype=np.uint8)
    upright[:1500, :, 0] += 180
    upright[1500:, :, 2] += 180
    exif = Image.Exif()
    exif[0x0112] = 6
    photo = tmp_path / "photo.jpg"
    Image.fromarray(upright).transpose(Image.Transpose.ROTATE_90).save(photo, quality=95, exif=exif)
    assert photo.stat().st_size > 4 * 2**20
    page.set_input_files(".far-upload", photo)
    expect(page.locator(".far-status")).to_contain_text("frame 0:")
    shown = picture(page).astype(int)
    assert shown[16, 32, 0] > shown[16, 32, 2] + 100 and shown[48, 32, 2] > shown[48, 32, 0] + 100


@pytest.mark.parametrize("names", [None, ["stay", "jump", "duck", "look"]], ids=["numbers", "names"])
def test_a_model_of_other_actions(browser: Browser, repository: Path, names: list[str] | None) -> None:
    """Its buttons have numbers, or the model's own names, and so have the keys."""
    pipe = pipeline(transformer(num_actions=4), sample_size=None, num_inference_steps=1, action_names=names)
    visitors = Visitors()
    app = build_app(pipe, repository / EPISODES, Players(), visitors)
    url = serve_app(app, visitors, quiet=True)
    page = browser.new_page()
    page.set_default_timeout(PATIENCE)
    actions = actions_of(page)
    page.goto(f"{url}?paused")
    wait_for_frame(page, START_FRAME)
    assert page.locator(".far-pad button").all_inner_texts() == (names or ["0", "1", "2", "3"])
    page.keyboard.down("3")
    wait_until(page, lambda: actions.count(3) >= 2)
    page.keyboard.up("3")
    page.dispatch_event(".far-pad button[data-action='2']", "pointerdown")
    wait_until(page, lambda: actions.count(2) >= 2)
    page.dispatch_event(".far-pad button[data-action='2']", "pointerup")
    page.keyboard.down("ArrowUp")  # means nothing here
    page.keyboard.press("9")
    wait_until(page, lambda: actions[-1] is None)
    assert set(actions) <= {None, 2, 3}
    assert not page.inner_text(".far-error")
    page.close(run_before_unload=True)
    app.close()


@pytest.mark.parametrize("kind", ["groups", "vector"])
def test_a_model_of_groups_and_one_of_vectors(browser: Browser, kind: str) -> None:
    config = {"num_actions": [3, 2]} if kind == "groups" else {"action_dim": 2}
    names = [{"keyboard": ["none", "walk", "jump"]}, "mouse"] if kind == "groups" else ["x", "y"]
    pipe = pipeline(transformer(**config), num_inference_steps=1, action_names=names)
    visitors = Visitors()
    app = build_app(pipe, None, Players(), visitors)
    sent = []
    try:
        page = browser.new_page()
        page.on("request", lambda request: sent.append(request.post_data or ""))
        page.goto(serve_app(app, visitors, quiet=True) + "?paused")
        wait_for_frame(page, -1)
        expect(page.locator(".far-keys")).to_contain_text("stays until you change it")
        if kind == "groups":
            page.click(".far-pad button:text-is('jump')")
            page.click(".far-pad button:text-is('1')")
        else:
            page.locator(".far-pad input").nth(1).fill("-1.5")
        wait_for_frame(page, 2)
        page.click(".far-run")
        steps = [json.loads(data) for data in sent if '"step"' in data]
        assert steps[-1]["data"]["action"] == ([2, 1] if kind == "groups" else [0, -1.5])
        expect(page.get_by_role("alert")).to_have_text("")
        page.close()
    finally:
        app.close()
