"""The tolerance of the parity tests is narrow: small faults in the model exceed it by a factor of 100."""

from collections.abc import Callable

import pytest
import torch

from diffusers_far import FARTransformer3DModel
from tests.tiny_models import TOLERANCE, latents, long_transformer, relative_error, transformer


def swap_shift_and_scale(model: FARTransformer3DModel) -> None:
    """AdaLN reads shift, scale, gate; here the first two in the other order."""
    linear = model.transformer_blocks[0].norm1.linear
    for parameter in (linear.weight, linear.bias):
        shift, scale, gate = parameter.data.chunk(3)
        parameter.data = torch.cat([scale, shift, gate])


def swap_scale_and_shift_of_the_head(model: FARTransformer3DModel) -> None:
    for parameter in (model.norm_out.linear.weight, model.norm_out.linear.bias):
        parameter.data = torch.cat(parameter.data.chunk(2)[::-1])


def swap_rope_axes(model: FARTransformer3DModel) -> None:
    """The frame's channels for the column, and the other way round."""
    model.pos_embed.axes_dim = model.pos_embed.axes_dim[::-1]


def lose_a_bias(model: FARTransformer3DModel) -> None:
    model.transformer_blocks[0].attn.to_q.bias.data.zero_()


def lose_the_output_bias(model: FARTransformer3DModel) -> None:
    model.transformer_blocks[1].attn.to_out[0].bias.data.zero_()


def forget_a_norm(model: FARTransformer3DModel) -> None:
    model.transformer_blocks[0].attn.norm_k.weight.data.fill_(1.0)


FAULTS = [
    swap_shift_and_scale,
    swap_scale_and_shift_of_the_head,
    swap_rope_axes,
    lose_a_bias,
    lose_the_output_bias,
    forget_a_norm,
]


@pytest.mark.parametrize("make", [transformer, long_transformer], ids=["base", "long"])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_is_a_hundred_times_the_tolerance(
    fault: Callable[[FARTransformer3DModel], None], make: Callable[..., FARTransformer3DModel]
) -> None:
    samples = []
    for broken in (False, True):
        model = make(num_actions=4)
        if broken:
            fault(model)
        timestep, actions = torch.tensor([[-1.0, -1, -1, -1, 800, 300]]), torch.tensor([[0, 3, 1, 2, 1, 0]])
        with torch.no_grad():
            samples.append(model(latents(1, 6), timestep, actions=actions).sample)
    assert relative_error(samples[1], samples[0]) > 100 * TOLERANCE
