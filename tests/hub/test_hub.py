"""Publishing to a Hub and loading from it, each in a process of its own against a server on loopback."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from diffusers_far import FARVideoPipeline
from tests.hub.hub_double import TOKEN, HubDouble, Repository, serve
from tests.python_process import run_python
from tests.tiny_models import generator, long_transformer, pipeline

LOAD = "pipe = FARVideoPipeline.from_pretrained('me/far'{}); print('loaded', type(pipe.transformer).__name__)"


@pytest.fixture
def hub() -> Iterator[HubDouble]:
    with serve() as server:
        yield server


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    pipeline(long_transformer(num_actions=4), flex_rope_slope=0.25).save_pretrained(folder)
    return folder


def environment(hub: HubDouble, home: Path, **more: str) -> dict[str, str]:
    settings = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
    }
    return os.environ | settings | {"HF_HUB_DISABLE_TELEMETRY": "1"} | more


def python(hub: HubDouble, home: Path, code: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run code as a user would who has only imported the package."""
    command = ["-c", "from diffusers_far import FARTransformer3DModel, FARVideoPipeline\n" + code]
    return run_python(command, env=environment(hub, home, **more), imported="torch")


def push(hub: HubDouble, home: Path, folder: Path, *options: str, token: str = TOKEN) -> str:
    command = ["-m", "diffusers_far.cli", "push", str(folder), "me/far", *options]
    done = run_python(command, env=environment(hub, home, HF_TOKEN=token), imported="torch")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_push_and_load(hub: HubDouble, folder: Path, tmp_path: Path) -> None:
    sample = tmp_path / "walk.mp4"
    sample.write_bytes(b"a video")
    assert f"{hub.url}/me/far/commit/" in push(hub, tmp_path, folder, "--sample-video", str(sample))
    files = hub.repositories["me/far"].branches["main"]
    for path in folder.rglob("*"):
        assert path.is_dir() or files[path.relative_to(folder).as_posix()] == path.read_bytes()
    assert files["sample.mp4"] == b"a video"
    card = ModelCard(files["README.md"].decode())
    assert card.data.library_name == "diffusers" and "world-model" in card.data.tags
    assert 'FARVideoPipeline.from_pretrained("me/far")' in card.text and "FAR Long, 2 layers" in card.text

    code = LOAD.format("") + "; print(pipe.config.flex_rope_slope, len(pipe(num_frames=2).frames[0]))"
    done = python(hub, tmp_path / "reader", code)
    assert "loaded FARTransformer3DModel" in done.stdout and "0.25 2" in done.stdout, done.stderr

    requests = hub.num_requests
    offline = python(hub, tmp_path / "reader", LOAD.format(""), HF_HUB_OFFLINE="1")
    assert "loaded" in offline.stdout, offline.stderr
    assert hub.num_requests == requests
    other = python(hub, tmp_path / "nobody", LOAD.format(""), HF_HUB_OFFLINE="1")
    assert other.returncode != 0


@pytest.mark.parametrize("library", ["diffusers_far", "diffusers_far.transformer_far"])
def test_diffusers_own_class_loads_it_once_we_are_imported(
    hub: HubDouble, folder: Path, tmp_path: Path, library: str
) -> None:
    push(hub, tmp_path, folder)
    files = hub.repositories["me/far"].branches["main"]
    index = json.loads(files["model_index.json"])
    index["transformer"][0] = library  # the second one is in older checkpoints
    files["model_index.json"] = json.dumps(index).encode()
    code = "import diffusers, diffusers_far; p = diffusers.DiffusionPipeline.from_pretrained('me/far')\n"
    code += "print('loaded', type(p).__name__)"
    done = run_python(["-c", code], env=environment(hub, tmp_path / "reader"), imported="torch")
    assert "loaded FARVideoPipeline" in done.stdout, done.stderr


def test_private_repositories_and_revisions(hub: HubDouble, folder: Path, tmp_path: Path) -> None:
    push(hub, tmp_path, folder, "--private", "--revision", "small")
    assert hub.repositories["me/far"].private
    revision = ", revision='small'"
    assert python(hub, tmp_path / "a", LOAD.format(revision)).returncode != 0
    with_token = LOAD.format(f"{revision}, token='{TOKEN}'")
    done = python(hub, tmp_path / "b", with_token)
    assert "loaded" in done.stdout, done.stderr
    assert python(hub, tmp_path / "c", LOAD.format(f", token='{TOKEN}'")).returncode != 0  # main is empty


def test_variants_and_shards(hub: HubDouble, folder: Path, tmp_path: Path) -> None:
    pipe = FARVideoPipeline.from_pretrained(folder)
    half = tmp_path / "half"
    pipe.save_pretrained(half, variant="fp16", max_shard_size="200KB")
    assert len(list(half.glob("transformer/*fp16-0000?-of-00002.safetensors"))) == 2
    push(hub, tmp_path, half, "--variant", "fp16")
    done = python(hub, tmp_path / "reader", LOAD.format(", variant='fp16'"))
    assert "loaded" in done.stdout, done.stderr


@pytest.mark.parametrize("part", ["pipe", "pipe.transformer"])
def test_push_to_hub_writes_our_card(hub: HubDouble, folder: Path, tmp_path: Path, part: str) -> None:
    push_to_hub = f"{part}.push_to_hub('me/far', 'My message')"
    code = f"pipe = FARVideoPipeline.from_pretrained({str(folder)!r}); {push_to_hub}"
    done = python(hub, tmp_path, code, HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    files = hub.repositories["me/far"].branches["main"]
    name = "FARVideoPipeline" if part == "pipe" else "FARTransformer3DModel"
    assert f'{name}.from_pretrained("me/far")' in files["README.md"].decode()
    assert hub.messages == ["My message"]  # one commit, with the card
    done = python(
        hub, tmp_path / "reader", f"print('loaded', type({name}.from_pretrained('me/far')).__name__)"
    )
    assert f"loaded {name}" in done.stdout, done.stderr


def test_a_card_on_the_hub_is_kept(hub: HubDouble, folder: Path, tmp_path: Path) -> None:
    own = b"---\nlibrary_name: diffusers\n---\n# My own words\n"
    hub.repositories["me/far"] = Repository(branches={"main": {"README.md": own}})
    push(hub, tmp_path, folder)
    files = hub.repositories["me/far"].branches["main"]
    assert files["README.md"] == own and "model_index.json" in files
    code = f"FARVideoPipeline.from_pretrained({str(folder)!r}).push_to_hub('me/far')"
    done = python(hub, tmp_path, code, HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    assert "# My own words" in files["README.md"].decode()
    assert "FAR Long" not in files["README.md"].decode()


def test_a_card_of_ours_is_renewed(hub: HubDouble, folder: Path, tmp_path: Path) -> None:
    """Each push of a changed model, by either way, brings a card that is true of it."""
    files = hub.repositories.setdefault("me/far", Repository()).branches["main"]
    slopes = []
    for slope in (0.1, 0.2, 0.3, 0.4):
        pipe = pipeline(long_transformer(num_actions=4), flex_rope_slope=slope)
        changed = tmp_path / str(slope)
        pipe.save_pretrained(changed)
        if slope == 0.4:
            (changed / "README.md").write_bytes(files["README.md"])  # as in a download of the repository
        if slope == 0.2:
            code = f"FARVideoPipeline.from_pretrained({str(changed)!r}).push_to_hub('me/far')"
            assert python(hub, tmp_path, code, HF_TOKEN=TOKEN).returncode == 0
        else:
            push(hub, tmp_path, changed)
        slopes.append(f"flex_rope_slope: {slope}" in files["README.md"].decode())
    assert all(slopes)
    edited = files["README.md"].decode().replace("flex_rope_slope: 0.4", "my own words")
    files["README.md"] = "\n".join(line for line in edited.splitlines() if "<!--" not in line).encode()
    push(hub, tmp_path, folder)
    assert "my own words" in files["README.md"].decode()


def test_pushing_without_a_token(hub: HubDouble, folder: Path, tmp_path: Path) -> None:
    command = ["-m", "diffusers_far.cli", "push", str(folder), "me/far"]
    done = run_python(command, env=environment(hub, tmp_path), imported="torch")
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("Error: ")
    assert hub.repositories == {}


def test_remote_code_needs_no_package(hub: HubDouble, folder: Path, tmp_path: Path, repository: Path) -> None:
    build = [str(repository / "pipelines" / "build.py"), "--checkpoint", str(folder)]
    assert run_python([*build, "--output", str(tmp_path / "remote")]).returncode == 0
    files = {
        path.relative_to(tmp_path / "remote").as_posix(): path.read_bytes()
        for path in (tmp_path / "remote").rglob("*")
        if path.is_file()
    }
    hub.repositories["me/far"] = Repository(branches={"main": files})
    code = """
import sys, torch
sys.modules["diffusers_far"] = None  # an import of it fails
from diffusers import DiffusionPipeline
for source in ("me/far", sys.argv[1]):
    for trust in (False, True):
        try:
            pipe = DiffusionPipeline.from_pretrained(source, trust_remote_code=trust)
        except ValueError as error:
            print("refused", trust)
options = {"generator": torch.Generator().manual_seed(0), "output_type": "latent"}
video = pipe(num_frames=3, actions=[0, 1, 2], **options)
print(type(pipe).__name__, video.frames.double().sum().item())
"""
    settings = environment(hub, tmp_path / "reader", HF_MODULES_CACHE=str(tmp_path / "modules"))
    done = run_python(["-c", code, str(tmp_path / "remote")], env=settings, imported="torch")
    assert done.returncode == 0, done.stderr
    *refused, made = done.stdout.splitlines()[-3:]
    assert refused == ["refused False"] * 2
    pipe = FARVideoPipeline.from_pretrained(folder)
    expected = pipe(num_frames=3, actions=[0, 1, 2], generator=generator(), output_type="latent").frames
    assert made.split()[0] == "FARVideoPipeline"
    assert float(made.split()[1]) == pytest.approx(expected.double().sum().item(), abs=1e-3)
