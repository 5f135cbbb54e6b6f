"""What visitors can do to the server: large and broken files, requests and texts, jobs that nobody reads."""

import io
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from gradio_client import Client, handle_file
from PIL import Image

from diffusers_far.actions import ActionSpace
from diffusers_far.browser.app import build_app, serve
from diffusers_far.browser.forms import check_work, number, whole_number
from diffusers_far.browser.players import Players, VisitorError
from diffusers_far.browser.uploads import open_image, read_upload
from diffusers_far.browser.visitors import MAX_JOBS_PER_ADDRESS, UnreadError, Visitors
from diffusers_far.inputs import parse_actions
from diffusers_far.video_files import save_video
from tests.tiny_models import long_transformer, pipeline

PLAYER = "0123456789abcdef"
SETTINGS = {"num_inference_steps": 1, "guidance_scale": 1, "flex_rope_slope": 0, "long_memory": True}
NAMES = ["noop", "forward", "left", "right"]


# ------------------------------------------------------------------------------------------------------------
# Pictures


def png_header(width: int, height: int) -> bytes:
    """A PNG without a pixel: what is refused for its size has not been decoded."""
    content = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + content + struct.pack(">I", zlib.crc32(content))
    return b"\x89PNG\r\n\x1a\n" + chunk + b"\0\0\0\0IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


@pytest.mark.parametrize(
    ("width", "height", "reason"),
    [
        (200_000, 1, "8 times the other"),
        (1, 1_000_000, "8 times the other"),
        (20_000, 4000, "15 million"),
        (9000, 1200, "8192 on a side"),
        (8000, 8000, "15 million"),
    ],
)
def test_sides_are_bounded_before_decoding(width: int, height: int, reason: str) -> None:
    with pytest.raises(VisitorError, match=f"{width} x {height} pixels.*{reason}"):
        open_image(io.BytesIO(png_header(width, height)))


def thin_gif(path: Path) -> Path:
    images = [Image.new("P", (65_535, 1), index) for index in range(8)]
    images[0].save(path, save_all=True, append_images=images[1:])
    return path


def test_a_thin_animation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VisitorError, match="65535 x 1 pixels"):
        read_upload(thin_gif(tmp_path / "thin.gif"), 64, 64, "crop to fill")


def test_cropping_comes_before_enlarging(tmp_path: Path) -> None:
    """The longest picture that is taken costs no more than it has itself."""
    image = Image.new("RGB", (64, 8), (255, 0, 0))
    image.paste((0, 0, 255), (28, 0, 36, 8))
    image.save(tmp_path / "long.gif")
    video = read_upload(tmp_path / "long.gif", 64, 64, "crop to fill")
    assert video.shape == (1, 64, 64, 3) and video[0, 32, 32, 2] > 200 > 60 > video[0, 32, 32, 0]


def picture_file(kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    colors = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(colors).save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_kinds_of_pictures(kind: str) -> None:
    content = picture_file(kind)
    assert open_image(io.BytesIO(content)).size == (80, 60)
    for damaged in (content[: len(content) // 2], content[:20], b"", b"\0" * 100, content[:2] * 50):
        with pytest.raises(VisitorError, match="cannot be read as an image"):
            open_image(io.BytesIO(damaged))


@pytest.mark.parametrize("kind", ["TIFF", "PPM", "ICO", "TGA", "PDF", "EPS"])
def test_other_kinds_are_not_opened(kind: str) -> None:
    with pytest.raises(VisitorError, match="cannot be read as an image"):
        open_image(io.BytesIO(picture_file(kind)))


def test_a_photo_is_turned_upright() -> None:
    upright = np.zeros((120, 120, 3), np.uint8)
    upright[:60, :, 0], upright[60:, :, 2] = 230, 230
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.fromarray(upright).transpose(Image.Transpose.ROTATE_90).save(file, "JPEG", quality=95, exif=exif)
    shown = np.asarray(open_image(file))
    assert shown[20, :, 0].min() > 180 and shown[100, :, 2].min() > 180


def test_a_list_of_files_is_no_video(tmp_path: Path) -> None:
    frames = np.zeros((3, 32, 32, 3))
    save_video(frames, tmp_path / "secret.mp4", 10)
    for name, text in (
        ("list.mp4", "ffconcat version 1.0\nfile secret.mp4\n"),
        ("list.m3u8", "#EXTM3U\n#EXTINF:1,\nsecret.mp4\n#EXT-X-ENDLIST\n"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(VisitorError, match="cannot be read as a video"):
            read_upload(tmp_path / name, 32, 32, "stretch")


# ------------------------------------------------------------------------------------------------------------
# Texts and numbers


def test_actions_are_not_expanded_beyond_the_frames() -> None:
    with pytest.raises(ValueError, match="have 12000000 characters"):
        parse_actions("0*200 " * 2_000_000, None, ActionSpace(2), 200)
    tracemalloc.start()
    actions = parse_actions("0*999999999 1*" + "9" * 18 + " 0*200" * 1000, None, ActionSpace(2), 200)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert actions == [0] * 200 and peak < 2**20
    for text in ("9" * 10_000, "1*" + "9" * 10_000):
        with pytest.raises(ValueError, match="not an action") as refused:
            parse_actions(text, None, ActionSpace(2), 200)
        assert len(str(refused.value)) < 200


def test_fields() -> None:
    assert whole_number("Seed", None, 7, 0, 9) == 7 and whole_number("Seed", 3.0, 7, 0, 9) == 3
    assert number("Slope", None, 0.5, 0, 1) == 0.5
    for value in (True, "3", 1.5, -1, 10, float("nan"), float("inf"), 10**400, [], {}):
        with pytest.raises(VisitorError, match=r"Seed: .*whole number from 0 to 9") as refused:
            whole_number("Seed", value, 7, 0, 9)
        assert len(str(refused.value)) < 150
    for value in (True, "0", -0.1, 1.1, 1e308, float("nan"), 10**400):
        with pytest.raises(VisitorError, match=r"Slope: .*number from 0 to 1"):
            number("Slope", value, 0.5, 0, 1)
    check_work(200, 1, 32)
    with pytest.raises(VisitorError, match="51200 steps: at most 6400"):
        check_work(200, 4, 64)


# ------------------------------------------------------------------------------------------------------------
# Jobs


def test_a_job_that_nobody_reads_is_dropped() -> None:
    now = [0.0]
    visitors = Visitors(seconds_to_read=5, clock=lambda: now[0])
    visitors.is_watched = True
    visitors.asked("page")
    now[0] = 6
    with pytest.raises(UnreadError), visitors.job("page", "1.2.3.4"):
        pytest.fail("the job began")
    with visitors.reading("page"):
        with visitors.reading("page"), visitors.job("page", "1.2.3.4") as check:
            check()
        with visitors.job("page", "1.2.3.4") as check:
            check()  # another reader of the page is still there
    with pytest.raises(UnreadError):
        check()


def test_a_job_waits_a_moment_for_its_reader() -> None:
    visitors = Visitors(seconds_to_read=60)
    visitors.is_watched = True
    visitors.asked("page")
    begun, done = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        with visitors.job("page", "1.2.3.4"):
            done.set()

    thread = threading.Thread(target=work)
    thread.start()
    assert begun.wait(60) and not done.wait(0.1)
    with visitors.reading("page"):
        thread.join(60)
    assert done.is_set()


def test_jobs_of_one_page_and_one_address_are_bounded() -> None:
    visitors = Visitors()
    with visitors.job("page", "1.2.3.4"), visitors.job("page", "1.2.3.4"):
        with pytest.raises(VisitorError, match="wait for one of them"), visitors.job("page", "1.2.3.4"):
            pass
        with visitors.job("other", "1.2.3.4"):
            pass
    jobs = [visitors.job(f"page {index}", "1.2.3.4") for index in range(MAX_JOBS_PER_ADDRESS)]
    for job in jobs:
        job.__enter__()
    with pytest.raises(VisitorError), visitors.job("one more", "1.2.3.4"):
        pass
    with visitors.job("one more", "5.6.7.8"):
        pass
    for job in jobs:
        job.__exit__(None, None, None)
    with visitors.job("one more", "1.2.3.4"):
        pass


# ------------------------------------------------------------------------------------------------------------
# The server


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    visitors = Visitors(seconds_to_read=1.0)
    app = build_app(pipeline(long_transformer(num_actions=4)), None, Players(), visitors)
    yield serve(app, visitors, quiet=True).rstrip("/")
    app.close()


def play_message(url: str, name: str, data: Any) -> dict[str, Any]:
    components = httpx.get(f"{url}/config").json()["components"]
    play = next(part["id"] for part in components if part["props"].get("elem_id") == "play")
    return {"session_hash": "page", "component_id": play, "fn_name": name, "data": data}


def ask(url: str, name: str, data: Any) -> httpx.Response:
    body = json.dumps(play_message(url, name, data))
    headers = {"Content-Type": "application/json"}
    return httpx.post(f"{url}/gradio_api/component_server", content=body, headers=headers, timeout=120)


def step(url: str, **message: Any) -> httpx.Response:
    return ask(url, "step", {"player": PLAYER, "action": 1, "settings": SETTINGS} | message)


def test_messages_that_are_refused_leave_the_game_as_it_was(url: str) -> None:
    ask(url, "start", {"player": PLAYER, "settings": SETTINGS, "start": None})
    assert step(url).json()["number"] == 0
    for wrong in (
        {"settings": SETTINGS | {"guidance_scale": 1e308}},
        {"settings": SETTINGS | {"guidance_scale": 10**400}},
        {"settings": SETTINGS | {"flex_rope_slope": 1e300}},
        {"action": 10**400},
        {"settings": None},
    ):
        refused = step(url, **wrong)
        assert refused.status_code == 422 and "must" in refused.json()["detail"]
    for data in ([], None, "text", 3, [[]]):
        refused = ask(url, "step", data)
        assert refused.status_code == 422 and "must" in refused.json()["detail"]
    for body in (b"", b"[]", b"3", b"[" * 100_000, b'{"data": ' + b"9" * 10_000 + b"}", b"\xff"):
        headers = {"Content-Type": "application/json"}
        path = f"{url}/gradio_api/component_server"
        refused = httpx.post(path, content=body, headers=headers, timeout=60)
        assert refused.status_code == 400 and refused.json()["detail"]
    assert step(url).json()["number"] == 1


@pytest.mark.parametrize("path", ["component_server", "queue/join", "run/predict", "call/run", "cancel"])
def test_large_bodies_are_refused(url: str, path: str) -> None:
    content = b'{"data": "' + b"x" * (30 * 2**20) + b'"}'

    def pieces() -> Iterator[bytes]:  # without a word of how many there are
        for begin in range(0, len(content), 2**16):
            yield content[begin : begin + 2**16]

    headers = {"Content-Type": "application/json"}
    for body in (content, pieces()):
        try:
            refused = httpx.post(f"{url}/gradio_api/{path}", content=body, headers=headers, timeout=60)
        except (httpx.WriteError, httpx.RemoteProtocolError):
            continue  # hung up on while it was sending
        assert refused.status_code == 413 and "at most" in refused.json()["detail"]


def test_large_uploads_are_refused(url: str) -> None:
    files = {"files": ("large.mp4", b"\0" * (22 * 2**20))}
    try:
        refused = httpx.post(f"{url}/gradio_api/upload", files=files, timeout=60)
    except (httpx.WriteError, httpx.RemoteProtocolError):
        return
    assert refused.status_code == 413


def test_jobs_that_nobody_reads_keep_nobody_waiting(url: str) -> None:
    """25 jobs are asked for and never read; a visitor who comes next is served all the same."""
    config = httpx.get(f"{url}/config").json()
    compare = next(part for part in config["dependencies"] if len(part["inputs"]) == 6)
    data = [-1, "1", 200, 0.05, 8, 0]
    for index in range(25):
        body = {"data": data, "fn_index": compare["id"], "session_hash": f"robber{index}"}
        assert httpx.post(f"{url}/gradio_api/queue/join", json=body, timeout=60).status_code == 200
    ask(url, "start", {"player": PLAYER, "settings": SETTINGS, "start": None})
    began = time.monotonic()
    assert step(url).json()["number"] == 0
    client = Client(url, verbose=False)
    name = f"/{compare['api_name']}"
    pictures, video = client.predict(-1, "1", 2, 0.05, 1, 0, api_name=name)
    assert pictures.count("<figure") == 4 and video
    # All of them would be 20,000 frames; those that began were dropped within a frame.
    assert time.monotonic() - began < 120
    client.close()


def test_a_job_that_is_refused_says_why(url: str, tmp_path: Path) -> None:
    config = httpx.get(f"{url}/config").json()
    continued = next(part for part in config["dependencies"] if len(part["inputs"]) == 8)
    save_video(np.random.default_rng(0).random((4, 64, 64, 3)), tmp_path / "video.mp4", 10)
    client = Client(url, verbose=False)
    call = {"api_name": f"/{continued['api_name']}"}
    values = [handle_file(str(tmp_path / "video.mp4")), "stretch", 4, 1, "1", 1, 0, 0]
    status = client.predict(*values, **call)[1]
    assert "1 frames after" in status
    for place, value, reason in (
        (4, "jump", "'jump' is not an action"),
        (4, "", "actions are empty"),
        (7, -1, "Seed: -1"),
        (6, 1e308, "FlexRoPE slope: 1e[+]308"),
        (5, 65, "Denoising steps: 65"),
        (3, 0, "New frames: 0"),
        (2, 1.5, "Frames of the video: 1.5"),
        (0, None, "Upload a video first"),
    ):
        wrong = [*values[:place], value, *values[place + 1 :]]
        with pytest.raises(Exception, match=reason):
            client.predict(*wrong, **call)
    for place in (2, 5, 6, 7):
        empty = [*values[:place], None, *values[place + 1 :]]
        assert "frames after" in client.predict(*empty, **call)[1]
    client.close()


# ------------------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT], ids=["terminated", "interrupted"])
def test_no_file_is_left_when_the_app_ends(tmp_path: Path, how: signal.Signals) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    pipeline(long_transformer(num_actions=4), num_inference_steps=1).save_pretrained(tmp_path / "model")
    save_video(np.random.default_rng(0).random((4, 64, 64, 3)), tmp_path / "video.mp4", 10)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "from diffusers_far.browser.app import launch; import sys; "
    code += f"launch(sys.argv[1], None, 'cpu', port={port})"
    environment = {name: value for name, value in os.environ.items() if name != "GRADIO_TEMP_DIR"}
    server = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "model")],
        env=environment | {"TMPDIR": str(temporary), "GRADIO_ANALYTICS_ENABLED": "False"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        url = f"http://127.0.0.1:{port}"
        while True:
            assert server.poll() is None, server.stderr.read()
            try:
                config = httpx.get(f"{url}/config").json()
                break
            except httpx.TransportError:
                time.sleep(0.2)
        continued = next(part for part in config["dependencies"] if len(part["inputs"]) == 8)
        client = Client(url, verbose=False)
        video = handle_file(str(tmp_path / "video.mp4"))
        values = [video, "stretch", 4, 1, "1", 1, 0, 0]
        client.predict(*values, api_name=f"/{continued['api_name']}")
        client.close()
        assert len(list(temporary.rglob("*.mp4"))) == 2  # what came, and what was made of it
        server.send_signal(how)
        _, errors = server.communicate(timeout=120)
        assert server.returncode == 0, errors
        assert "Traceback" not in errors
    finally:
        server.kill()
    assert not list(temporary.rglob("*.mp4"))
    assert not [path for path in temporary.iterdir() if path.name.startswith("diffusers-far-")]
