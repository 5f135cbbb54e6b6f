"""Models and episodes that come with the project, and where they are: in the checkout, or in the package."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
# In this order, after the current folder. `setup.py` puts some of the checkout's files into a wheel.
_PLACES = (_PACKAGE.parents[1], _PACKAGE / "shipped_files")

ANY_STEP_CHECKPOINT = "checkpoints/far-doom-maze-64-any-step"  # the faster one, for games
CHECKPOINT = "checkpoints/far-doom-maze-64"
if not (_PLACES[0] / CHECKPOINT).exists():  # an installed package has the faster one only
    CHECKPOINT = ANY_STEP_CHECKPOINT
# What the shipped models were trained with, by the name of their folder or repository.
WORLDS = {"far-doom-maze-64": "mazes", "far-doom-maze-64-any-step": "mazes"}
EPISODES = "data/samples/doom-maze-64/validation"


def find(path: str, argument: str) -> Path:
    """A path from the current folder, or else of what comes with the project."""
    for candidate in (Path(path), *(place / path for place in _PLACES)):
        if candidate.exists():
            return candidate
    raise ValueError(f"--{argument}: {path} is not there, and does not come with diffusers-far")


def locate(checkpoint: str) -> str | Path:
    """A folder as given, or a shipped model; else a repo id."""
    if Path(checkpoint).exists():
        return checkpoint
    for place in _PLACES:
        if (place / checkpoint).exists():
            return place / checkpoint
    if checkpoint.startswith((".", "/", "~")) or checkpoint.count("/") != 1:
        raise ValueError(f"--checkpoint: {checkpoint} is neither a folder nor a repo id such as name/model")
    return checkpoint
