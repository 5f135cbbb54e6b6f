"""Rotation of queries and keys, against the one of diffusers."""

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxPosEmbed

from diffusers_far.rope import rotate, signed_rotary
from tests.tiny_models import generator


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_equals_diffusers(dtype: torch.dtype, tolerance: float) -> None:
    coordinates = torch.randint(50, (11, 3), generator=generator())
    table = FluxPosEmbed(theta=10000, axes_dim=[4, 6, 6])(coordinates)
    states = torch.randn(2, 11, 3, 16, generator=generator()).to(dtype)
    expected = apply_rotary_emb(states, table, sequence_dim=1)
    found = rotate(states, signed_rotary(*table))
    assert found.dtype == dtype
    assert (found - expected).abs().max() <= tolerance
