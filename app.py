"""Entry of the Gradio Space, and of `python app.py` in a checkout."""

import os

from diffusers_far.browser.app import launch
from diffusers_far.shipped import ANY_STEP_CHECKPOINT

if __name__ == "__main__":
    launch(
        checkpoint=os.environ.get("FAR_CHECKPOINT", ANY_STEP_CHECKPOINT),
        host="0.0.0.0" if os.environ.get("SPACE_ID") else "127.0.0.1",
    )
