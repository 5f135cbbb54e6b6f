"""A pipeline on a device, for the command line and the browser."""

from typing import Any

from .shipped import locate


def load_pipeline(
    checkpoint: str, device: str | None = None, dtype: str | None = None, variant: str | None = None
) -> Any:
    """A pipeline on a device.

    Args:
        checkpoint: folder, shipped model or repo id.
        device: by default a GPU if there is one.
        dtype: "float32", "bfloat16" or "float16"; by default bfloat16 on a GPU, else float32.
        variant: of the weights' files, such as fp16.

    Raises:
        ValueError: for a device that is not there, and for what is neither a folder nor a repo id.
    """
    import torch
    from diffusers.utils import logging

    from .pipeline_far_video import FARVideoPipeline

    logging.disable_progress_bar()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    dtype = dtype or ("bfloat16" if device.startswith("cuda") else "float32")
    options = {"dtype": getattr(torch, dtype), "variant": variant}
    pipeline = FARVideoPipeline.from_pretrained(str(locate(checkpoint)), **options).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def check_device(device: str) -> None:
    """Raise a ValueError unless the device is there."""
    import torch

    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--device: {device} cannot be used here: {reason}") from error
