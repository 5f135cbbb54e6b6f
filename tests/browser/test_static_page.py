"""The server of the page without a server's model, and the exports and starts that it serves."""

import http.client
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from diffusers_far.actions import ActionSpace
from diffusers_far.browser import static_page
from diffusers_far.browser.starts import starts_for_export
from diffusers_far.browser.static_page import find_page, in_background, make_server
from diffusers_far.export import kept_export as kept
from diffusers_far.export.kept_export import kept_export
from diffusers_far.shipped import EPISODES
from tests import tiny_models as tm


@pytest.fixture
def port(tmp_path: Path) -> Iterator[int]:
    """Of a server of two small folders, with a secret beside them."""
    for name, text in (("page/index.html", "page"), ("model/rollout.json", "{}"), ("secret", "secret")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    server = make_server(tmp_path / "page", tmp_path / "model", port=0)
    in_background(server)
    yield server.server_port
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("path", "status", "text"),
    [
        ("/", 200, "page"),
        ("/index.html?seed=1", 200, "page"),
        ("/model/rollout.json", 200, "{}"),
        ("/model/", 404, None),
        ("/../secret", 404, None),
        ("/model/../secret", 404, None),
        ("/model/%2e%2e/secret", 404, None),
        ("/rollout.json", 404, None),
    ],
)
def test_both_folders_are_served_and_nothing_else(
    port: int, path: str, status: int, text: str | None
) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", path)
    reply = connection.getresponse()
    content = reply.read().decode()
    assert reply.status == status and (text is None or content == text) and "secret" not in content
    assert reply.headers["Cross-Origin-Opener-Policy"] == "same-origin"
    assert reply.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
    connection.close()


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"--port: {port}: in use"):
            make_server(tmp_path, tmp_path, port=port)


def test_a_page_that_is_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static_page, "PAGE", "web/not-there")
    with pytest.raises(ValueError, match=r"--static: web/not-there has no index.html; run `make web`"):
        find_page("static")


def test_an_export_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def export(pipeline: object, folder: Path, dtype: str, starts: object, packed: bool) -> None:
        assert packed
        made.append(dtype)
        folder.mkdir(parents=True)
        (folder / "rollout.json").write_text("{}")

    monkeypatch.setattr(kept, "export_onnx", export)
    pipe, frames = tm.pipeline(), np.zeros((1, 64, 64, 3), np.uint8)
    first = kept_export(pipe, "float32", cache=tmp_path)
    assert kept_export(pipe, "float32", cache=tmp_path) == first and made == ["float32"]
    others = [
        kept_export(pipe, "int8", cache=tmp_path),
        kept_export(pipe, "float32", [(frames, None)], tmp_path),
        kept_export(pipe, "float32", [(frames, [1])], tmp_path),
        kept_export(tm.pipeline(tm.transformer(seed=1, num_actions=4)), "float32", cache=tmp_path),
    ]
    assert len({first, *others}) == 5 == len(made)


def test_short_clips_of_the_episodes(repository: Path) -> None:
    starts = starts_for_export(repository / EPISODES, (64, 64), ActionSpace(6))
    assert len(starts) == 6 and {frames.shape for frames, _ in starts} == {(8, 64, 64, 3)}
    assert all(len(actions or []) == 8 for _, actions in starts)
    colours = [len(np.unique(frames[-1].reshape(-1, 3) // 32, axis=0)) for frames, _ in starts]
    assert min(colours[:2]) > 2 * colours[-1]  # a corridor first, a wall last
    assert starts_for_export(repository / EPISODES, (None, None), ActionSpace(6)) == []
