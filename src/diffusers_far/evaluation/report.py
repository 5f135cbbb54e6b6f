"""The page of an evaluation: figures, curves over time, and videos, in one file that needs no other."""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .results import BASELINES, TITLES, describe_fvd, describe_settings, rows

STYLE = """
body { font: 16px/1.5 sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 }
th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left }
.videos { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: 1rem }
figure { margin: 0 } video, svg { width: 100%; height: auto } figcaption { overflow-wrap: anywhere }
"""


def draw_curves(results: dict[str, Any]) -> str:
    """Each measure of frames over the predicted frames, as SVG; empty where there is none."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    measures = {name: results["measures"][name] for name in TITLES if name in results["measures"]}
    if not measures:
        return ""
    figure, axes = pyplot.subplots(1, len(measures), figsize=(5 * len(measures), 3.6), squeeze=False)
    for axis, (name, summary) in zip(axes[0], measures.items(), strict=True):
        frames = np.arange(1, len(summary["by_frame"]) + 1)
        kinds = {"": "model", "best": f"best of {len(results['seeds'])}", **BASELINES}
        for kind, words in kinds.items():
            part = summary if not kind else summary.get(kind)
            if part is None:
                continue
            (line,) = axis.plot(frames, part["by_frame"], label=words, marker="." if len(frames) < 20 else "")
            if part["by_frame_interval"] is not None:
                axis.fill_between(frames, *part["by_frame_interval"], alpha=0.2, color=line.get_color())
        axis.set(title=TITLES[name], xlabel="predicted frame")
    axes[0][0].legend()
    figure.tight_layout()
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    drawn = text.getvalue()
    return drawn[drawn.index("<svg") :]


def page(results: dict[str, Any], videos: Sequence[tuple[str, Path]]) -> str:
    """The report as HTML.

    Args:
        results: as in results.json.
        videos: caption and mp4 file of each.
    """
    title = html.escape(f"{results['checkpoint']}: protocol {results['protocol']}")
    parts = [f"<h1>{title}</h1>", f"<p>{html.escape(describe_settings(results))}</p>"]
    header, lines = rows(results)
    if lines:
        heads = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
        cells = ["".join(f"<td>{html.escape(cell)}</td>" for cell in line) for line in lines]
        parts.append(f"<table><tr>{heads}</tr>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>")
    if line := describe_fvd(results):
        parts.append(f"<p>{html.escape(line)}</p>")
    parts.append(draw_curves(results))
    if videos:
        parts.append("<h2>Videos</h2><p>Left: real. Right: given frames (green border), then the first")
        parts.append("sample (red border). They are spread over the data, not chosen.</p><div class=videos>")
        for caption, file in videos:
            data = base64.b64encode(file.read_bytes()).decode()
            parts.append(
                f'<figure><video src="data:video/mp4;base64,{data}" autoplay loop muted controls></video>'
                f"<figcaption>{html.escape(caption)}</figcaption></figure>"
            )
        parts.append("</div>")
    made = f"{results['date']}, {results['machine']}, {results['dtype']}, {results['seconds']:.0f} s"
    parts.append(f"<p>{html.escape(made)}<br><code>{html.escape(results['command'] or '')}</code></p>")
    head = f'<meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'
