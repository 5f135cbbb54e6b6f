"""Attention from matrix products, against PyTorch's."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from diffusers_far.matmul_attention import matmul_attention
from tests.tiny_models import generator


@pytest.mark.parametrize("bias_rows", [None, 1, 5], ids=["no bias", "one row", "a row per query"])
def test_equals_torch(bias_rows: int | None) -> None:
    query, key, value = (torch.randn(2, n, 3, 8, generator=generator()) for n in (5, 9, 9))
    bias = None
    if bias_rows is not None:
        bias = torch.randn(1, 1, bias_rows, 9, generator=generator())
        bias[..., 2] = -torch.inf
    by_head = (x.transpose(1, 2) for x in (query, key, value))
    expected = scaled_dot_product_attention(*by_head, attn_mask=bias).transpose(1, 2)
    assert (matmul_attention(query, key, value, bias) - expected).abs().max() <= 1e-6
