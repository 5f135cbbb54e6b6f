"""Pushing Spaces to a Hub on loopback."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import SpaceCard

from tests.hub.hub_double import TOKEN, HubDouble, Repository, serve
from tests.hub.test_hub import environment
from tests.tiny_models import pipeline, transformer

# The Hub's address is read once, when huggingface_hub is imported: a process of its own runs the commands.
RUN = """
import json, sys
from click.testing import CliRunner
from diffusers_far.cli import main
for line in sys.stdin:
    done = CliRunner().invoke(main, json.loads(line))
    print(json.dumps([done.exit_code, done.output]), flush=True)
"""

Push = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def hub() -> Iterator[HubDouble]:
    with serve() as server:
        yield server


@pytest.fixture(scope="module")
def push(hub: HubDouble, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Push]:
    """Runs `diffusers-far push` with such arguments: exit code and output."""
    settings = environment(hub, tmp_path_factory.mktemp("home"), HF_TOKEN=TOKEN)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", RUN], env=settings, **pipes) as process:

        def run(*arguments: str | Path) -> tuple[int, str]:
            process.stdin.write(json.dumps(["push", *map(str, arguments)]) + "\n")
            process.stdin.flush()
            code, output = json.loads(process.stdout.readline())
            return code, output

        yield run
        process.stdin.close()
        assert process.wait(timeout=60) == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipelines") / "walks"
    pipeline(transformer(num_actions=4), num_training_frames=12).save_pretrained(folder)
    return folder


def files_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_space_is_pushed_and_renewed(hub: HubDouble, push: Push, folder: Path, tmp_path: Path) -> None:
    """What lies in the Space is what a dry run writes; the next push takes away what it does not bring."""
    options = ["--space", "gradio", "--title", "A game"]
    requests = hub.num_requests
    dry = tmp_path / "dry"
    assert push(folder, "me/game", *options, "--dry-run", dry) == (0, f"{dry}: written\n")
    assert hub.num_requests == requests

    pushed = push(folder, "me/game", *options, "--hardware", "t4-small", "--private")
    assert pushed == (0, f"{hub.url}/spaces/me/game\n")
    asked = hub.created[-1]
    assert (asked["type"], asked["sdk"], asked["hardware"]) == ("space", "gradio", "t4-small")
    repository = hub.repositories["spaces/me/game"]
    assert repository.private and len(hub.messages) == 1
    files = repository.branches["main"]
    assert set(files) - {".gitattributes"} == files_of(dry)
    assert files["model/model_index.json"] == (folder / "model_index.json").read_bytes()
    assert SpaceCard(files["README.md"].decode()).data.suggested_hardware == "t4-small"

    # The same model by its repo id: the folder with the model leaves the Space.
    model = {path: (folder / path).read_bytes() for path in files_of(folder)}
    model["README.md"] = b"---\nlicense: cc0-1.0\n---\n"
    hub.repositories["me/walks"] = Repository(branches={"main": model})
    assert push("me/walks", "me/game", "--space", "gradio")[0] == 0
    assert not [name for name in files if name.startswith("model/")]
    assert '"me/walks"' in files["app.py"].decode()
    card = SpaceCard(files["README.md"].decode()).data
    assert (card.models, card.title, card.license) == (["me/walks"], "game", "cc0-1.0")
    assert len(hub.messages) == 2 and len(hub.created) == 1


def test_a_space_of_people_is_kept(hub: HubDouble, push: Push, folder: Path) -> None:
    own = {"README.md": b"---\nsdk: gradio\n---\n# My own words\n", "app.py": b"mine"}
    hub.repositories["spaces/me/theirs"] = Repository(branches={"main": dict(own)})
    code, said = push(folder, "me/theirs", "--space", "gradio")
    assert code == 1
    assert "Error: REPO_ID: the Space me/theirs has files that diffusers-far did not write" in said
    assert hub.repositories["spaces/me/theirs"].branches["main"] == own


def test_a_token_that_may_not(hub: HubDouble, push: Push, folder: Path) -> None:
    for options in (["--space", "gradio"], []):
        code, said = push(folder, "me/forbidden", *options, "--token", "hf_" + "x" * 34)
        assert code == 1 and "Error: me/forbidden: the Hub does not let you (401: " in said
        assert "hf auth login" in said
    assert not any(name.endswith("me/forbidden") for name in hub.repositories)
