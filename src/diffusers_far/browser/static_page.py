"""The page of web/ with an exported model: plain files, with the headers that threads in a browser need."""

import errno
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from ..shipped import find

PAGE = "web/dist"  # of a checkout
ISOLATED = {  # what browsers ask for before they let a page have threads that share memory
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Opener-Policy": "same-origin",
}
FIRST_PORT, NUM_PORTS = 7860, 100


class PageHandler(SimpleHTTPRequestHandler):
    """The files of a folder `page`, and those of a folder `model` as /model/."""

    protocol_version = "HTTP/1.1"
    extensions_map = SimpleHTTPRequestHandler.extensions_map | {".mjs": "text/javascript"}

    def __init__(self, *arguments: Any, page: Path, model: Path, **options: Any) -> None:
        self.page, self.model = page, model
        super().__init__(*arguments, directory=str(page), **options)

    def translate_path(self, path: str) -> str:
        is_model = path.startswith("/model/")
        self.directory = str(self.model if is_model else self.page)
        return super().translate_path(path.removeprefix("/model") if is_model else path)

    def end_headers(self) -> None:
        for name, value in ISOLATED.items():
            self.send_header(name, value)
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def list_directory(self, path: Any) -> None:
        self.send_error(404)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


def find_page(argument: str, folder: str | None = None) -> Path:
    """The built page.

    Args:
        argument: of the command, for the message.
        folder: of the page; None: where a checkout builds it.

    Raises:
        ValueError: when it is not there, telling how it is built.
    """
    try:
        page = find(folder or PAGE, argument)
    except ValueError:
        page = Path(folder or PAGE)
    if not (page / "index.html").is_file():
        raise ValueError(
            f"--{argument}: {page} has no index.html; run `make web` in a checkout of diffusers-far, which "
            f"makes {PAGE} (it needs node 18 or newer, and npm; Debian: apt-get install nodejs npm)"
        )
    return page


def make_server(
    page: Path, model: Path, host: str = "127.0.0.1", port: int | None = None
) -> ThreadingHTTPServer:
    """A server of the page, which listens; by default at the first free port from 7860 on.

    Raises:
        ValueError: for a port that is taken.
    """
    handler = partial(PageHandler, page=page, model=model)
    for candidate in range(FIRST_PORT, FIRST_PORT + NUM_PORTS) if port is None else [port]:
        try:
            return ThreadingHTTPServer((host, candidate), handler)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
    raise ValueError(f"--port: {port or f'{FIRST_PORT} and the {NUM_PORTS - 1} after it'}: in use")


def in_background(server: ThreadingHTTPServer) -> str:
    """Serve in a thread until `server.shutdown()`; the address."""
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://{server.server_name}:{server.server_port}/"
