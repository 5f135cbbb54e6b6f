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

    After an exception nothing of it is left, and a file that was there is as it was. No two runs write into
    one another. A folder takes the place of none, or of an empty one.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        yield partial
        if partial.is_dir() and path.is_dir():
            path.rmdir()  # empty, and in the way of a rename on Windows
        os.replace(partial, path)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        partial.unlink(missing_ok=True)
