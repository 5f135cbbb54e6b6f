"""Pictures of results."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from diffusers_far.whole_files import written_whole


@contextmanager
def plotted(path: Path, size: tuple[float, float], columns: int = 1) -> Iterator[Any]:
    """Axes `[columns]` to draw on; the PNG file is written at the end.

    Args:
        size: width and height of all, in units of 100 pixels.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, columns, figsize=size, squeeze=False)
    yield axes[0]
    figure.tight_layout()
    with written_whole(path) as partial:
        figure.savefig(partial, format="png", dpi=100)
    pyplot.close(figure)


def colors(number: int) -> Any:
    """So many that are told apart, `[number, 4]`: a plot's own begin again after ten."""
    from matplotlib import colormaps

    return colormaps["turbo"](np.linspace(0, 1, number))
