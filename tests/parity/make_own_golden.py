r"""Write the small results of our own code that `test_own_golden.py` compares with.

    PYTHONPATH=.:src python tests/parity/make_own_golden.py

To be run again only when a change of results is meant.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.tiny_models import latents, long_transformer, noise, pipeline, transformer

FOLDER = Path(__file__).parent / "own"


def base() -> dict[str, Tensor]:
    """Class-conditional, with guidance."""
    pipe = pipeline(transformer(num_classes=5))
    arguments = {"num_frames": 5, "class_labels": [1, 4], "guidance_scale": 2.0}
    return {"latents": pipe(**arguments, latents=noise(2, 5, 4, 8, 8), output_type="latent").frames}


def long() -> dict[str, Tensor]:
    """Action-conditional, past the window, with FlexRoPE."""
    pipe = pipeline(long_transformer(num_actions=4), flex_rope_slope=0.2)
    arguments = {"video_latents": latents(2, 6), "num_frames": 9, "actions": [3, 2, 1, 0, 1, 2, 3, -1, 0]}
    return {"latents": pipe(**arguments, latents=noise(2, 3, 4, 8, 8), output_type="latent").frames}


def gradients() -> dict[str, Tensor]:
    """Of the Long model, with every input: the loss, and the sum of absolute gradients of each parameter."""
    model = long_transformer(num_classes=5, num_actions=4)
    timestep, actions = torch.linspace(-1, 1000, 14).reshape(2, 7), torch.arange(14).reshape(2, 7) % 5
    labels = {"class_labels": torch.tensor([0, 5]), "actions": actions}
    loss = model(latents(2, 7), timestep, **labels).sample.square().mean()
    loss.backward()
    sums = {name: parameter.grad.abs().mean().reshape(1) for name, parameter in model.named_parameters()}
    return {"loss": loss.detach().reshape(1), **sums}


CASES = {"base": base, "long": long, "gradients": gradients}

if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for case, make in CASES.items():
        save_file(
            {name: value.contiguous() for name, value in make().items()}, FOLDER / f"{case}.safetensors"
        )
