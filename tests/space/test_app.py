"""The app in a real browser, with the shipped model."""

import base64
import io
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from diffusers_far.demo import CHECKPOINT, EPISODES
from diffusers_far.space.app import build_app, load
from diffusers_far.space.players import Players
from diffusers_far.space.uploads import MAX_UPLOAD_MB
from diffusers_far.video_files import read_video
from evaluation.metrics import horizontal_shift

START_FRAME = 31  # a start has 32 frames
PATIENCE = 60_000  # milliseconds


@contextmanager
def serve(repository: Path, max_players: int) -> Iterator[str]:
    """A server for so many players, and its address."""
    app = build_app(
        load(str(repository / CHECKPOINT), "cpu"), repository / EPISODES, Players(max_players=max_players)
    )
    _, url, _ = app.launch(prevent_thread_lock=True, quiet=True, max_file_size=f"{MAX_UPLOAD_MB}mb")
    yield url
    app.close()


@pytest.fixture(scope="module")
def url(repository: Path) -> Iterator[str]:
    with serve(repository, max_players=3) as url:
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    executable = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if executable is None:
        reason = "needs a Chromium (Debian: apt-get install chromium)"
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, url: str) -> Iterator[Page]:
    """A visitor with the app open; errors of the page's own script fail the test."""
    page = browser.new_page(viewport={"width": 1100, "height": 950})
    page.set_default_timeout(PATIENCE)
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(url)
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


def as_tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image.copy()).movedim(-1, 0)[None].float() / 255


def difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(float) - other).mean())


def test_play(page: Page, tmp_path: Path, repository: Path) -> None:
    wait_for_frame(page, START_FRAME)
    start = picture(page)
    real = read_video(next((repository / EPISODES).glob("*.mp4")))[START_FRAME]
    assert difference(start, real) < 6  # JPEG

    # Single steps: the picture moves right under a turn to the left, and the other way round.
    shifts = {}
    for key in ("ArrowLeft", "d"):
        page.click(".far-reset")
        expect(page.locator(".far-status")).to_contain_text(f"frame {START_FRAME}:")
        assert difference(picture(page), start) == 0
        page.focus(".far-canvas")
        page.keyboard.down(key)
        wait_for_frame(page, START_FRAME + 2)
        page.keyboard.up(key)
        page.click(".far-run")  # pause
        assert frame_number(page) >= START_FRAME + 2
        shifts[key] = horizontal_shift(as_tensor(start), as_tensor(picture(page))).item()
    assert shifts["ArrowLeft"] != shifts["d"]

    page.click(".far-reset")
    expect(page.locator(".far-status")).to_contain_text(f"frame {START_FRAME}:")
    for button, sign in (("left", 1), ("right", -1)):
        before = picture(page)
        number = frame_number(page)
        page.dispatch_event(f".far-pad button[data-action={button}]", "pointerdown")
        page.click(".far-step")
        wait_for_frame(page, number + 1)
        page.dispatch_event(f".far-pad button[data-action={button}]", "pointerup")
        assert frame_number(page) == number + 1
        assert sign * horizontal_shift(as_tensor(before), as_tensor(picture(page))).item() > 0

    with page.expect_download() as download:
        page.click(".far-save")
    download.value.save_as(tmp_path / "play.mp4")
    video = read_video(tmp_path / "play.mp4")
    assert video.shape == (START_FRAME + 1 + 2, 256, 256, 3)
    assert difference(video[START_FRAME, 2::4, 2::4], start) < 12


def test_settings_and_starts(page: Page) -> None:
    wait_for_frame(page, START_FRAME)
    expect(page.locator(".far-status")).to_contain_text("25 long-term and 7 short-term frames")
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
            page.goto(url)
            wait_for_frame(page, START_FRAME)
        waiting = pages[2]
        waiting.goto(url)
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
