"""What visitors may ask the server for: how large a request is, and how many jobs run for whom.

A job (Continue, Compare) is asked for with one request and read with another, which stays open. One that
nobody reads is dropped, so that jobs cannot be piled up.
"""

import json
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import gradio as gr
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .players import VisitorError
from .uploads import MAX_IMAGE_BYTES, MAX_UPLOAD_MB

MAX_BODY = 2**20
MAX_BODIES = {  # by the end of the path; an image is sent as text, which makes it longer by a third
    "/component_server": 4 * MAX_IMAGE_BYTES // 3 + 2**16,
    "/upload": MAX_UPLOAD_MB * 2**20 + 2**16,
}
SECONDS_TO_READ = 5.0
MAX_JOBS_PER_PAGE = 2
MAX_JOBS_PER_ADDRESS = 8


class UnreadError(Exception):
    """Nobody reads what a job makes."""


class Visitors:
    """The jobs of all visitors, and which of them are read.

    Args:
        seconds_to_read: how long a job may wait for its reader.
        clock: seconds.
    """

    def __init__(
        self, seconds_to_read: float = SECONDS_TO_READ, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.seconds_to_read = seconds_to_read
        self.is_watched = False  # without a gate nobody knows who reads
        self._clock = clock
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._readers: Counter[str] = Counter()  # open readers of each page
        self._asked: dict[str, float] = {}  # when each page last asked for a job
        self._running: list[tuple[str, str]] = []  # page and address of each running job

    def asked(self, page: str) -> None:
        """A page has asked for a job."""
        with self._lock:
            now = self._clock()
            old = now - 3600
            self._asked = {name: when for name, when in self._asked.items() if when > old} | {page: now}

    @contextmanager
    def reading(self, page: str) -> Iterator[None]:
        """While a page reads what its jobs make."""
        with self._changed:
            self._readers[page] += 1
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._readers[page] -= 1
                if not self._readers[page]:
                    del self._readers[page]

    @contextmanager
    def job(self, page: str, address: str) -> Iterator[Callable[[], None]]:
        """While a job runs. Gives what raises an UnreadError once the job has no reader any more.

        Raises:
            UnreadError: when the job was asked for a while ago, and has no reader.
            VisitorError: when there are too many jobs of this page or from this address.
        """
        with self._changed:
            left = self._asked.get(page, self._clock()) + self.seconds_to_read - self._clock()
            if not self._changed.wait_for(lambda: self._is_read(page), timeout=max(0.0, left)):
                raise UnreadError
            of_page = sum(page == other for other, _ in self._running)
            of_address = sum(address == other for _, other in self._running)
            if of_page >= MAX_JOBS_PER_PAGE or of_address >= MAX_JOBS_PER_ADDRESS:
                raise VisitorError("You have other videos in the making: wait for one of them to end.")
            self._running.append((page, address))

        def check() -> None:
            with self._lock:
                if not self._is_read(page):
                    raise UnreadError

        try:
            yield check
        finally:
            with self._lock:
                self._running.remove((page, address))

    def _is_read(self, page: str) -> bool:
        return not self.is_watched or page in self._readers


def job(visitors: Visitors, request: gr.Request, work: Callable[[Path], Iterator[Any]]) -> Iterator[Any]:
    """What the work makes, as long as the visitor reads it, in a folder that is gone afterwards."""
    page, address = request.session_hash or "", request.client.host if request.client else ""
    try:
        with (
            visitors.job(page, address) as check,
            tempfile.TemporaryDirectory(prefix="diffusers-far-") as folder,
        ):
            for made in work(Path(folder)):
                yield made
                check()
    except UnreadError:
        return
    except FloatingPointError as error:
        text = "No picture came out with these settings: choose a smaller slope."
        raise gr.Error(text, print_exception=False) from error
    except ValueError as error:
        raise gr.Error(str(error), print_exception=False) from error


class Gate:
    """Refuses large bodies, and tells [`Visitors`] who asks for jobs and who reads them.

    Args:
        app: what comes behind it.
        visitors: see there.
    """

    def __init__(self, app: ASGIApp, visitors: Visitors) -> None:
        self.app = app
        self.visitors = visitors
        visitors.is_watched = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path = scope["path"].rstrip("/")
        if scope["method"] == "GET" and path.endswith("/queue/data"):
            page = parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [""])[0]
            with self.visitors.reading(page):
                return await self.app(scope, receive, send)
        if scope["method"] == "GET" and "/call/" in path:  # the simple API: a job is a page of its own
            with self.visitors.reading(path.rpartition("/")[2]):
                return await self.app(scope, receive, send)
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return await self.app(scope, receive, send)
        limit = next((size for end, size in MAX_BODIES.items() if path.endswith(end)), MAX_BODY)
        length = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if not length.isdigit() or int(length[:20]) > limit:
            return await too_large(limit)(scope, receive, send)
        if path.endswith("/upload"):
            return await self._stream(scope, receive, send, limit)
        body = b""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > limit:
                return await too_large(limit)(scope, receive, send)
            if not message.get("more_body", False):
                break
        if path.endswith("/queue/join"):
            self.visitors.asked(page_of(body))
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def replay() -> Message:
            return next(messages, None) or await receive()

        return await self.app(scope, replay, send)

    async def _stream(self, scope: Scope, receive: Receive, send: Send, limit: int) -> None:
        """Pass a file on as it comes, up to the limit, for a body that has not told its length."""
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            return {"type": "http.disconnect"} if received > limit else message

        await self.app(scope, counted, send)


def page_of(body: bytes) -> str:
    """The page that asks for a job; empty where it does not say, and the job is its own."""
    try:
        content: Any = json.loads(body)
    except (ValueError, RecursionError):
        return ""
    page = content.get("session_hash") if isinstance(content, dict) else None
    return page if isinstance(page, str) else ""


def too_large(limit: int) -> JSONResponse:
    """The answer to a body over the limit."""
    text = f"The request is too large: at most {limit / 2**20:.1f} MB here."
    return JSONResponse({"detail": text}, status_code=413, headers={"connection": "close"})
