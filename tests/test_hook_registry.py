"""diffusers' caching techniques are refused when they are enabled; its hooks for memory work."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import hooks
from diffusers.hooks import HookRegistry, ModelHook

from diffusers_far import FARTransformer3DModel
from tests.tiny_models import TOLERANCE, latents, long_transformer, relative_error, transformer

MODELS = {"base": transformer, "long": long_transformer}
TIMESTEP = {"current_timestep_callback": lambda: 500}
TECHNIQUES: dict[str, tuple[Callable[..., Any], Any]] = {
    "PyramidAttentionBroadcast": (
        hooks.apply_pyramid_attention_broadcast,
        lambda: hooks.PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2, **TIMESTEP),
    ),
    "FasterCache": (
        hooks.apply_faster_cache,
        lambda: hooks.FasterCacheConfig(
            spatial_attention_block_skip_range=2,
            unconditional_batch_skip_range=2,
            tensor_format="BFCHW",
            **TIMESTEP,
        ),
    ),
    "FirstBlockCache": (
        hooks.apply_first_block_cache,
        lambda: hooks.FirstBlockCacheConfig(threshold=0.1),
    ),
    "MagCache": (hooks.apply_mag_cache, lambda: hooks.MagCacheConfig(calibrate=True)),
    "SeaCache": (
        hooks.apply_sea_cache,
        lambda: hooks.SeaCacheConfig(),
    ),
    "TaylorSeerCache": (hooks.apply_taylorseer_cache, lambda: hooks.TaylorSeerCacheConfig()),
    "TaylorSeerCache, lite": (
        hooks.apply_taylorseer_cache,
        lambda: hooks.TaylorSeerCacheConfig(use_lite_mode=True),
    ),
    "TextKVCache": (hooks.apply_text_kv_cache, lambda: hooks.TextKVCacheConfig()),
}


def run(model: FARTransformer3DModel) -> torch.Tensor:
    with torch.no_grad():
        return model(latents(1, 6), torch.full((1, 6), 300.0)).sample


def test_every_technique_of_diffusers_is_tried() -> None:
    """Save context and tensor parallelism, which are for many devices, and the skipping of layers."""
    others = ("apply_context_parallel", "apply_tensor_parallel", "apply_layer_skip")
    memory = ("apply_group_offloading", "apply_layerwise_casting", "apply_layerwise_casting_hook")
    known = {name for name in dir(hooks) if name.startswith("apply_")} - {*others, *memory}
    assert known == {apply.__name__ for apply, _ in TECHNIQUES.values()}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", TECHNIQUES)
def test_caching_is_refused_when_it_is_enabled(kind: str, name: str) -> None:
    model, (apply, config) = MODELS[kind](), TECHNIQUES[name]
    expected = run(model)
    with pytest.raises(ValueError, match=f"{name.partition(',')[0]}.* caches what one denoising step"):
        model.enable_cache(config())
    with pytest.raises(ValueError, match="Hook caches what one denoising step"):
        apply(model, config())
    assert torch.equal(run(model), expected)  # and it leaves nothing behind


class Counter(ModelHook):
    """A hook of a user's own, without state."""

    count = 0

    def post_forward(self, module: torch.nn.Module, output: Any) -> Any:
        self.count += 1
        return output


def test_other_hooks_work() -> None:
    model, counter = transformer(), Counter()
    expected = run(model)
    for module in (model, model.transformer_blocks[0], model.transformer_blocks[1].attn):
        HookRegistry.check_if_exists_or_initialize(module).register_hook(counter, "counter")
    assert torch.equal(run(model), expected)
    assert counter.count == 3
    model._diffusers_hook.remove_hook("counter")
    assert torch.equal(run(model), expected)
    assert counter.count == 3


@pytest.mark.parametrize("kind", MODELS)
def test_layerwise_casting(kind: str) -> None:
    model = MODELS[kind]()
    expected = run(model)
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    assert relative_error(run(model), expected) <= 300 * TOLERANCE  # of weights with 8 bits of precision
