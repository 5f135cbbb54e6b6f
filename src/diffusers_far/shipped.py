"""What comes with a checkout of the project: models and episodes, and where they are."""

from pathlib import Path

CHECKPOINT = "checkpoints/far-doom-maze-64"
ANY_STEP_CHECKPOINT = "checkpoints/far-doom-maze-64-any-step"  # the faster one, for games
EPISODES = "data/samples/doom-maze-64/validation"

_CHECKOUT = Path(__file__).resolve().parents[2]


def find(path: str, argument: str) -> Path:
    """A path from the current folder, or else from the checkout that this package was installed from."""
    for candidate in (Path(path), _CHECKOUT / path):
        if candidate.exists():
            return candidate
    raise ValueError(
        f"--{argument}: {path} is not there; run from a checkout of diffusers-far, or give a path"
    )


def locate(checkpoint: str) -> str | Path:
    """A folder as given or, for the shipped models, in the checkout; else a repo id."""
    if Path(checkpoint).exists():
        return checkpoint
    if (_CHECKOUT / checkpoint).exists():
        return _CHECKOUT / checkpoint
    if checkpoint.startswith((".", "/", "~")) or checkpoint.count("/") != 1:
        raise ValueError(f"--checkpoint: {checkpoint} is neither a folder nor a repo id such as name/model")
    return checkpoint
