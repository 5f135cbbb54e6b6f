"""Tensor names of the published checkpoints and of [`FARTransformer3DModel`]: one table for both directions.

The published autoencoders need none: diffusers' `AutoencoderDC` has their names.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

Content = TypeVar("Content")

# (part of a published name, what stands for it in ours); all other parts are the same.
RENAMED = (
    ("label_embedder.embedding_table.", "class_embedder."),
    ("action_embedder.embedding_table.", "action_embedder."),
    (".mlp.net.", ".ff.net."),
)

# Published tensors that our model does not have, and why.
UNUSED = {
    "context_proj_out.weight": "head for long-term frames; its output is used in neither loss nor sampling",
    "context_proj_out.bias": "goes with context_proj_out.weight",
}


def model_name(published: str) -> str:
    """Our name of a published tensor."""
    for theirs, ours in RENAMED:
        published = published.replace(theirs, ours)
    return published


def published_name(name: str) -> str:
    """The published name of one of our tensors."""
    for theirs, ours in RENAMED:
        if theirs not in name:
            name = name.replace(ours, theirs)
    return name


def unused_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the `UNUSED` tensors in a published file; only Long models have them."""
    if config["long_patch_size"] is None:
        return {}
    features = (config["out_channels"] or config["in_channels"]) * config["long_patch_size"] ** 2
    dim = config["num_attention_heads"] * config["attention_head_dim"]
    return {"context_proj_out.weight": (features, dim), "context_proj_out.bias": (features,)}


def convert_published_state_dict(
    checkpoint: Mapping[str, Content], config: Mapping[str, Any]
) -> dict[str, Content]:
    """The tensors (or anything else by name) of a published file under our names, without the unused."""
    unused = unused_shapes(config)
    converted = {}
    for name, tensor in checkpoint.items():
        if name not in unused:
            if model_name(name) in converted:
                raise ValueError(f"{name} is there twice, under its published name and under ours")
            converted[model_name(name)] = tensor
    return converted


def published_state_dict(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Our tensors under their published names.

    What our model dropped cannot come back: the `UNUSED` tensors are zeros, there so that the authors' strict
    loading accepts the file.
    """
    published = {published_name(name): tensor for name, tensor in state_dict.items()}
    dtype = published["proj_out.weight"].dtype
    unused = {name: torch.zeros(shape, dtype=dtype) for name, shape in unused_shapes(config).items()}
    return published | unused
