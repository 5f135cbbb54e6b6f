"""Pictures as the page shows them."""

import base64
import io

import numpy as np
from PIL import Image

FRAMES_PER_SECOND = 10


def enlarged(image: np.ndarray, zoom: int = 4) -> np.ndarray:
    """`[H, W, 3]` with every pixel a square of `zoom` pixels."""
    return image.repeat(zoom, axis=0).repeat(zoom, axis=1)


def picture(image: np.ndarray) -> str:
    """Data URL of `[H, W, 3]` uint8 pixels."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=92)
    return data_url(file.getvalue(), "image/jpeg")


def data_url(content: bytes, kind: str) -> str:
    """`data:` URL of a file."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
