"""Pictures of the browser app on a desktop and on a phone: those of docs/play.md.

    python benchmarks/app_pictures.py docs

The app opens on a game that walks by itself, and is pictured after some frames of it.
"""

from pathlib import Path

import click
import torch
from playwright.sync_api import sync_playwright

from diffusers_far.browser.app import build_app, serve
from diffusers_far.browser.visitors import Visitors
from diffusers_far.loading import load_pipeline
from diffusers_far.shipped import ANY_STEP_CHECKPOINT, EPISODES, WORLDS, find
from web import chromium

SIZES = {"play.png": (1100, 950), "play_phone.png": (360, 740)}


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--checkpoint", default=ANY_STEP_CHECKPOINT, show_default=True)
@click.option("--episodes", default=EPISODES, show_default=True, help="Videofolder to start from.")
@click.option("--frames", default=10, show_default=True, help="Of the game before the picture.")
@click.option("--num-threads", default=2, show_default=True)
def main(folder: Path, checkpoint: str, episodes: str, frames: int, num_threads: int) -> None:
    """Write play.png and play_phone.png to FOLDER."""
    torch.set_num_threads(num_threads)
    visitors = Visitors()
    world = WORLDS.get(Path(checkpoint).name)
    pipeline = load_pipeline(checkpoint, "cpu")
    app = build_app(pipeline, find(episodes, "episodes"), visitors=visitors, world=world)
    url = serve(app, visitors, quiet=True)
    frame = "Number(document.querySelector('#play .far-status')?.textContent.match(/rame (\\d+)/)?.[1])"
    with sync_playwright() as playwright:
        browser = chromium(playwright)
        for name, (width, height) in SIZES.items():
            page = browser.new_page(viewport={"width": width, "height": height})
            page.goto(url)
            page.wait_for_function(f"{frame} >= 0", timeout=300_000)
            given = page.evaluate(frame)
            page.wait_for_function(f"{frame} >= {given + frames}", timeout=300_000)
            page.screenshot(path=folder / name)
            page.close(run_before_unload=True)
        browser.close()
    app.close()


if __name__ == "__main__":
    main()
