"""Spaces as the Hub runs them: a gradio one in an environment of its own, a static one from a file server."""

import functools
import importlib.metadata
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from huggingface_hub import SpaceCard, SpaceHardware
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from playwright.sync_api import Browser, Route, expect

from diffusers_far import space
from diffusers_far.cli import main
from diffusers_far.export import ExportedRollout
from diffusers_far.shipped import ANY_STEP_CHECKPOINT, EPISODES
from tests.app_process import plain, running
from tests.tiny_models import pipeline, transformer

PAGE = """
<title>loading</title>
<script type="module">
const model = await (await fetch("model/rollout.json")).json();
const step = await (await fetch("model/step.onnx")).arrayBuffer();
document.title = `${model.dtype}, ${step.byteLength} bytes, isolated: ${crossOriginIsolated}`;
new SharedArrayBuffer(8);
</script>
"""


SPACE_HOST = "me-game.hf.space"
# The page around a Space: says that it knows visitors, and who this one is.
HUB = f"""
<iframe src="https://{SPACE_HOST}/" width="1000" height="900"></iframe>
<script>
addEventListener("message", ({{ data, ports, source, origin }}) => {{
  if (data === "zerogpu-headers") ports[0].postMessage({{ "x-ip-token": "me" }});
  else source.postMessage(data, origin);
}});
</script>
"""


def push(*arguments: str | Path) -> tuple[int, str]:
    """`diffusers-far push` with such arguments: exit code and output."""
    done = CliRunner().invoke(main, ["push", *map(str, arguments)])
    return done.exit_code, " ".join(done.output.split())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipelines") / "walks"
    pipeline(transformer(num_actions=4), num_training_frames=12).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stand-in for the built page, in which somebody has tried another model."""
    folder = tmp_path_factory.mktemp("web") / "dist"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "old.onnx").write_bytes(b"old")
    (folder / "index.html").write_text(PAGE)
    return folder


@pytest.fixture(scope="module")
def shipped_game(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    folder = tmp_path_factory.mktemp("spaces") / "game"
    return space.write_space(folder, str(repository / ANY_STEP_CHECKPOINT), "me/game", "gradio")


def requirement_lines(folder: Path) -> list[Requirement]:
    lines = (folder / "requirements.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if not line.startswith("--")]


def with_dependencies(requirements: list[Requirement]) -> dict[str, importlib.metadata.Distribution]:
    """What is installed of these and all that they need, by name."""
    found: dict[str, importlib.metadata.Distribution] = {}
    asked: set[tuple[str, str]] = set()
    waiting = [(requirement.name, {"", *requirement.extras}) for requirement in requirements]
    while waiting:
        name, extras = waiting.pop()
        name = canonicalize_name(name)
        new = {extra for extra in extras if (name, extra) not in asked}
        if not new:
            continue
        asked |= {(name, extra) for extra in new}
        found[name] = importlib.metadata.distribution(name)
        for needed in map(Requirement, found[name].requires or []):
            if any(needed.marker is None or needed.marker.evaluate({"extra": extra}) for extra in new):
                waiting.append((needed.name, {"", *needed.extras}))
    return found


@pytest.fixture(scope="module")
def environment(shipped_game: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment with what requirements.txt asks for, what that needs, and nothing else.

    Links to what is installed here stand for an installation, which would take minutes.
    """
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    for distribution in with_dependencies(requirement_lines(shipped_game)).values():
        for top in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            if not (site_packages / top).exists():
                (site_packages / top).symlink_to(Path(str(distribution.locate_file(top))))
    return folder / "bin" / "python"


def test_the_front_matter_of_a_gradio_space(shipped_game: Path) -> None:
    card = SpaceCard.load(shipped_game / "README.md").data
    assert (card.title, card.sdk, card.license) == ("game", "gradio", "bsd-3-clause")
    assert card.sdk_version == importlib.metadata.version("gradio")
    assert card.python_version == f"{sys.version_info.major}.{sys.version_info.minor}"
    assert (card.app_file, card.suggested_hardware, card.models) == ("app.py", "cpu-basic", None)
    assert "world-model" in card.tags and len(card.short_description) <= 60  # what the Hub takes


def test_every_requirement_is_pinned_and_they_agree(shipped_game: Path, environment: Path) -> None:
    """pip has nothing to add to the environment, and nothing in it is of another version or missing."""
    lines = requirement_lines(shipped_game)
    assert {line.name for line in lines} >= {"torch", "gradio", "diffusers", "av"}
    for line in lines:
        installed = importlib.metadata.version(line.name).partition("+")[0]
        assert str(line.specifier) == f"=={installed}"
    pip = [sys.executable, "-m", "pip", "--python", environment]
    options = ["install", "--dry-run", "--no-index", "-r", shipped_game / "requirements.txt"]
    done = subprocess.run([*pip, *options], env=plain(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Would install" not in done.stdout


def test_a_gradio_space_is_played(shipped_game: Path, environment: Path, browser: Browser) -> None:
    where = "import diffusers_far; print(diffusers_far.__file__)"
    found = subprocess.check_output([environment, "-c", where], cwd=shipped_game, env=plain(), text=True)
    assert Path(found.strip()) == shipped_game / "diffusers_far" / "__init__.py"
    assert (shipped_game / "diffusers_far" / "LICENSE").is_file()
    assert not list((shipped_game / "diffusers_far").rglob("*.safetensors"))
    # The Hub asks for pages that are rendered on a server, and says where an app listens.
    settings = {"GRADIO_SSR_MODE": "true", "SPACE_ID": "me/game", "GRADIO_SERVER_NAME": "0.0.0.0"}
    with running([environment, shipped_game / "app.py"], shipped_game.parent, **settings) as url:
        page = browser.new_page()
        page.goto(f"{url}/?paused")
        status = page.locator("#play .far-status")
        expect(status).to_contain_text("frame 31", timeout=60_000)  # a start has 32 frames
        page.keyboard.down("w")
        expect(status).to_contain_text(re.compile(r"frame (3[4-9]|[4-9]\d)"), timeout=60_000)
        page.close()


def test_a_zero_gpu_space_is_played(
    repository: Path, environment: Path, browser: Browser, tmp_path: Path
) -> None:
    """With a double of `spaces`, in a page as the Hub has around a Space: loans count against the visitor."""
    folder = tmp_path / "game"
    space.write_space(
        folder, str(repository / ANY_STEP_CHECKPOINT), "me/game", "gradio", hardware="zero-a10g"
    )
    assert (folder / "requirements.txt").read_text().splitlines()[-1] == "spaces"
    card = SpaceCard.load(folder / "README.md").data
    assert (card.suggested_hardware, card.python_version) == ("zero-a10g", "3.12")
    log = tmp_path / "loans"
    double = str(repository / "tests" / "browser" / "double")
    with running(
        [environment, folder / "app.py"], folder.parent, PYTHONPATH=double, SPACES_DOUBLE_LOG=str(log)
    ) as url:
        page = browser.new_page()

        def forward(route: Route) -> None:
            if "heartbeat" in route.request.url:  # never ends
                return route.abort()
            headers = route.request.headers | {"x-forwarded-host": SPACE_HOST, "x-forwarded-proto": "https"}
            answer = route.fetch(url=route.request.url.replace(f"https://{SPACE_HOST}", url), headers=headers)
            return route.fulfill(response=answer)

        hub = "https://huggingface.co"
        page.route(f"{hub}/**", lambda route: route.fulfill(content_type="text/html", body=HUB))
        page.route(f"https://{SPACE_HOST}/**", forward)
        page.goto(f"{hub}/spaces/me/game")
        game = page.frame_locator("iframe")
        status = game.locator("#play .far-status")
        expect(status).to_contain_text("frame 31", timeout=60_000)
        assert not log.exists()  # nobody plays yet
        game.locator(".far-step").click()
        expect(status).to_contain_text("frame 32", timeout=60_000)
        game.locator(".far-step").click()
        expect(status).to_contain_text("frame 33", timeout=60_000)
        assert game.get_by_role("tab").all_inner_texts() == ["Play", "Continue a video"]
        page.close()
    assert json.loads(log.read_text().splitlines()[0]) == {"duration": 30, "visitor": "me"}


@contextmanager
def served(folder: Path, headers: dict[str, str]) -> Iterator[str]:
    """A plain file server that adds headers to every answer; its address."""

    class Handler(SimpleHTTPRequestHandler):
        def end_headers(self) -> None:
            for name, value in headers.items():
                self.send_header(name, value)
            super().end_headers()

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def test_a_static_space_is_served(tiny: Path, page: Path, browser: Browser, tmp_path: Path) -> None:
    """With the headers that its front matter asks for, its page may have threads, and finds the model."""
    folder = tmp_path / "new" / "game"
    said = push(tiny, "me/game", "--space", "static", "--page", page, "--dry-run", folder)
    assert said == (0, f"{folder}: written")
    assert not (folder / "model" / "old.onnx").exists()
    card = SpaceCard.load(folder / "README.md").data
    assert (card.sdk, card.app_file, card.license) == ("static", "index.html", None)
    with served(folder, card.custom_headers) as url:
        tab = browser.new_page()
        errors: list[str] = []
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.goto(url)
        size = (folder / "model" / "step.onnx").stat().st_size
        expect(tab).to_have_title(f"float16, {size} bytes, isolated: true", timeout=30_000)
        tab.close()
        assert not errors
    game = ExportedRollout(folder / "model")
    assert game.step(1).shape == (64, 64, 3) and game.config["starts"] == []


def test_a_static_space_of_any_model_takes_episodes(
    tiny: Path, page: Path, repository: Path, tmp_path: Path
) -> None:
    """Their actions are of another world, so the frames alone are given."""
    folder, options = tmp_path / "game", ["--space", "static", "--page", page]
    code, said = push(tiny, "me/game", *options, "--episodes", repository / EPISODES, "--dry-run", folder)
    assert code == 0, said
    game = ExportedRollout(folder / "model")
    game.append_start(5)
    assert (game.num_frames, len(game.config["starts"])) == (8, 6)
    assert game.step(1).shape == (64, 64, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--space", "gradio", "--hardware", "abacus"], "--hardware: got abacus; it takes one of cpu-basic,"),
        (["--space", "gradio", "--dtype", "int8"], "--dtype: got int8; a gradio Space takes none"),
        (["--space", "static", "--hardware", "t4-small"], "--hardware: got t4-small; a static Space takes"),
        (["--space", "static", "--page", "nowhere"], "--page: nowhere has no index.html; run `make web`"),
        (["--space", "static", "--page", "."], "--page: . has no index.html; run `make web`"),
        (["--space", "gradio", "--episodes", "nowhere"], "--episodes: nowhere is not there"),
        (["--space", "gradio", "--revision", "main"], "--revision goes without --space"),
        (["--title", "A game"], "--title goes with --space"),
    ],
)
def test_wrong_arguments(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = ["--dry-run", "made/game"] if "--space" in arguments else []
    code, said = push(tiny, "me/game", *arguments, *folder)
    assert code in (1, 2) and message in said
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_kept(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    code, said = push(tiny, "me/game", "--space", "gradio", "--dry-run", tmp_path)
    assert code == 1 and f"--dry-run: {tmp_path} exists already; it takes a new folder" in said
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    code, said = push(tiny, "not a name", "--space", "gradio", "--dry-run", tmp_path / "new")
    assert code == 1 and "not a name" in said and not (tmp_path / "new").exists()
    code, said = push(
        tmp_path / "nowhere" / "model", "me/game", "--space", "gradio", "--dry-run", tmp_path / "new"
    )
    assert code == 1 and "is neither a folder nor a repo id" in said
    assert push("nowhere", "me/model")[0] == 2


def test_a_space_of_a_released_package_asks_for_it(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(space, "is_from_index", lambda: True)
    folder = space.write_space(
        tmp_path / "game", str(tiny), "me/game", "gradio", variant=None, hardware="t4-small"
    )
    lines = (folder / "requirements.txt").read_text().splitlines()
    assert lines[0] == f"diffusers-far[app]=={importlib.metadata.version('diffusers-far')}"
    assert not (folder / "diffusers_far").exists() and not (folder / "episodes").exists()
    assert not [line for line in lines if line.startswith("--")]  # PyTorch with CUDA
    app = (folder / "app.py").read_text()
    assert "episodes=None" in app and "world=" not in app
    assert (folder / "model" / "model_index.json").read_bytes() == (tiny / "model_index.json").read_bytes()


def test_hardware_has_the_names_of_the_hub() -> None:
    for hardware in SpaceHardware:
        assert space.check_hardware(hardware.value) == hardware.value
