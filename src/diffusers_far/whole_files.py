"""Files and folders that appear when they are complete."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Gives a name beside `path` to write a file or folder at, which is renamed to `path` at the end.

    After an exception nothing of it is left, and a file that was there is as it was; likewise when nothing
    was written at that name. No two runs write into one another. A folder takes the place of none, or of an
    empty one.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        yield partial
        if partial.exists():
            bring_to_disk(partial)
            if partial.is_dir() and path.is_dir():
                path.rmdir()  # empty, and in the way of a rename on Windows
            os.replace(partial, path)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        partial.unlink(missing_ok=True)


def bring_to_disk(path: Path) -> None:
    """Have a file, or a folder with all that is in it, survive a loss of power."""
    for part in (*path.rglob("*"), path):
        descriptor = os.open(part, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
