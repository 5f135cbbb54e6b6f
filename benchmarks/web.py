"""Frames a second of the page without a server, in a headless Chromium: the figures of docs/web.md.

python benchmarks/web.py checkpoints/far-doom-maze-64-any-step --dtype float16 --frames 30
python benchmarks/web.py checkpoints/far-doom-maze-64-any-step --steps "" --screenshots docs
"""

import json
import os
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import click
from playwright.sync_api import Browser, Playwright, sync_playwright

from diffusers_far.browser.starts import starts_for_export
from diffusers_far.browser.static_page import PageHandler, find_page, in_background, make_server
from diffusers_far.export.kept_export import kept_export
from diffusers_far.loading import load_pipeline
from diffusers_far.shipped import EPISODES


class CountingHandler(PageHandler):
    """Counts the bytes of all files that a browser asks for."""

    num_bytes = 0

    def copyfile(self, source: Any, outputfile: Any) -> None:
        CountingHandler.num_bytes += os.fstat(source.fileno()).st_size
        super().copyfile(source, outputfile)


SIZES = {"web_desktop.png": (1100, 780), "web_phone.png": (360, 740)}
FRAME = "Number(document.body.dataset.frame)"


def chromium(playwright: Playwright) -> Browser:
    """The installed one, headless."""
    executable = shutil.which("chromium") or shutil.which("google-chrome")
    return playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])


@click.command()
@click.argument("checkpoint")
@click.option("--episodes", default=EPISODES, show_default=True)
@click.option("--dtype", default="float16", show_default=True)
@click.option("--frames", default=30, show_default=True)
@click.option("--steps", default="1 2 4", show_default=True, help="Numbers of denoising steps.")
@click.option("--screenshots", type=Path, help="Folder to write pictures of the page to.")
def main(
    checkpoint: str, episodes: str, dtype: str, frames: int, steps: str, screenshots: Path | None
) -> None:
    """A line of JSON per number of steps: megabytes and seconds to the first new frame, frames a second."""
    pipe = load_pipeline(checkpoint, "cpu", "float32")
    starts = starts_for_export(Path(episodes), pipe.default_size, pipe.transformer.action_space)
    folders = {"page": find_page(), "model": kept_export(pipe, dtype, starts)}
    server = make_server(**folders, port=0)
    server.RequestHandlerClass = partial(CountingHandler, **folders)
    url = in_background(server)
    given = len(starts[0][0]) if starts else 0
    with sync_playwright() as playwright:
        browser = chromium(playwright)
        for number in steps.split():
            context = browser.new_context()  # with an empty cache
            page = context.new_page()
            page.set_default_timeout(300_000)
            CountingHandler.num_bytes = 0
            begin = time.perf_counter()
            page.goto(f"{url}?quality={number}")
            page.wait_for_function(f"{FRAME} >= {given}")
            first, loaded = time.perf_counter(), CountingHandler.num_bytes
            page.wait_for_function(f"{FRAME} >= {given + frames}")
            seconds = time.perf_counter() - first
            result = {
                "dtype": dtype,
                "steps": int(number),
                "first_frame_megabytes": round(loaded / 1e6, 2),
                "first_frame_seconds": round(first - begin, 2),
                "frames_per_second": round(frames / seconds, 2),
                "load_average": round(os.getloadavg()[0], 1),
                "status": page.inner_text("#status"),
            }
            click.echo(json.dumps(result))
            context.close()
        for name, (width, height) in SIZES.items() if screenshots else ():
            page = browser.new_page(viewport={"width": width, "height": height})
            page.goto(url)
            page.wait_for_function(f"{FRAME} >= {given + 5}", timeout=300_000)
            page.screenshot(path=screenshots / name)
            page.close()
        browser.close()
    server.shutdown()


if __name__ == "__main__":
    main()
