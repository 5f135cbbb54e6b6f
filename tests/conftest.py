"""Settings and fixtures of all tests. None needs the network; those that need CUDA are marked `gpu`."""

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

REPOSITORY = Path(__file__).resolve().parent.parent
REFERENCE = REPOSITORY.parent / "shared" / "reference"

# Before torch and huggingface_hub are imported: they read these once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
# Gradio's own default is one folder for all users of a machine, where only the first of them may write.
_gradio_files = tempfile.TemporaryDirectory(prefix="diffusers-far-tests-")
os.environ["GRADIO_TEMP_DIR"] = _gradio_files.name
# Command lines under test find the package even where it is not installed.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(REPOSITORY / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
)

# A shell's background job ignores Ctrl-C, and so do its children, the programs under test among them.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest  # noqa: E402
import torch  # noqa: E402

if TYPE_CHECKING:
    from playwright.sync_api import Browser


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout's root folder."""
    return REPOSITORY


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Inputs, weights and outputs of the published system on small random models."""
    return _reference_folder("golden")


@pytest.fixture(scope="session")
def checkpoints_dir() -> Path:
    """Names and shapes of every tensor in the published files (`published.json`, `tensors_*.json`)."""
    return _reference_folder("checkpoints")


def _reference_folder(name: str) -> Path:
    folder = REFERENCE / name
    if not folder.is_dir():
        pytest.skip(f"no reference data beside the checkout: shared/reference/{name}")
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    """A real one; tests of the browser app are skipped where there is none, and fail under CI=true."""
    executable = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if executable is None:
        reason = "needs a Chromium (Debian: apt-get install chromium)"
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield browser
        browser.close()
