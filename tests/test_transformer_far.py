"""FARTransformer3DModel: shapes, causality, conditions, and what diffusers and torch offer for any model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from diffusers_far import FARTransformer3DModel, transformer_far
from diffusers_far.attention import FARAttention, FARAttnProcessor
from tests.tiny_models import (
    SIZE,
    TOLERANCE,
    generator,
    latents,
    long_transformer,
    max_error,
    pipeline,
    relative_error,
    transformer,
)

BASE = {"num_classes": 5, "num_actions": 4}
MODELS = {"base": lambda **config: transformer(**BASE | config)} | {
    "long": lambda **config: long_transformer(**BASE | config)
}
both = pytest.mark.parametrize("name", MODELS)


def inputs(num_frames: int = 7) -> dict[str, Tensor]:
    """Two videos: a clean frame, then noisy ones."""
    timestep = torch.linspace(0, 1000, 2 * num_frames).reshape(2, num_frames)
    timestep[:, 0] = -1.0
    return {
        "hidden_states": latents(2, num_frames),
        "timestep": timestep,
        "class_labels": torch.tensor([1, 4]),
        "actions": torch.arange(2 * num_frames).reshape(2, num_frames) % 4,
    }


@torch.no_grad()
def run(model: FARTransformer3DModel, **changes: Any) -> Tensor:
    return model(**inputs() | changes).sample


@pytest.mark.parametrize(
    ("name", "num_frames", "num_out"),
    [("base", 1, 1), ("base", 7, 7), ("long", 1, 1), ("long", 4, 4), ("long", 7, 4)],
)
@pytest.mark.parametrize("grid", [(8, 8), (4, 12)])
def test_output_shapes(name: str, num_frames: int, num_out: int, grid: tuple[int, int]) -> None:
    model = MODELS[name](out_channels=6)
    frames = torch.randn(2, num_frames, 4, *grid, generator=generator())
    timestep = torch.full((2, num_frames), 500.0)
    sample = model(frames, timestep).sample
    assert sample.shape == (2, num_out, 6, *grid)
    assert torch.equal(model(frames, timestep, return_dict=False)[0], sample)


@both
def test_a_new_model_predicts_zeros(name: str) -> None:
    config = SIZE | BASE | ({"long_patch_size": 4, "short_window": 4} if name == "long" else {})
    model = FARTransformer3DModel(**config)
    assert torch.equal(run(model), torch.zeros(2, 7 if name == "base" else 4, 4, 8, 8))
    assert model.x_embedder.weight.detach().std() > 0.1
    assert model.class_embedder.weight.detach().std().item() == pytest.approx(0.02, rel=0.3)
    assert model.class_embedder.num_embeddings == 6 and model.action_embedder.num_embeddings == 5


@pytest.mark.parametrize("flex_rope_slope", [0.0, 0.3])
@both
def test_a_frame_sees_itself_and_earlier_frames(name: str, flex_rope_slope: float) -> None:
    model = MODELS[name]()
    expected = run(model, flex_rope_slope=flex_rope_slope)
    first = 7 - expected.shape[1]
    for frame in range(7):
        frames, timestep, actions = (
            inputs()[key].clone() for key in ("hidden_states", "timestep", "actions")
        )
        frames[:, frame] += 1
        timestep[:, frame] = 333.0
        actions[:, frame] = -1
        sample = run(
            model,
            hidden_states=frames,
            timestep=timestep,
            actions=actions,
            flex_rope_slope=flex_rope_slope,
        )
        seen_by = max(frame - first, 0)
        assert torch.equal(sample[:, :seen_by], expected[:, :seen_by])
        assert all(max_error(sample[:, late], expected[:, late]) > 1e-5 for late in range(seen_by, 7 - first))


@both
def test_videos_of_a_batch_are_independent(name: str) -> None:
    model = MODELS[name]()
    alone = run(model, **{key: value[1:] for key, value in inputs().items()})
    assert relative_error(run(model)[1:], alone) <= TOLERANCE


@both
def test_null_conditions_are_the_same(name: str) -> None:
    model = MODELS[name]()
    expected = run(model, class_labels=None, actions=None)
    for label, action in ((-1, -1), (5, 4), (-1, 4)):
        labels, actions = torch.full((2,), label), torch.full((2, 7), action)
        assert torch.equal(run(model, class_labels=labels, actions=actions), expected)
    assert max_error(run(model), expected) > 1e-3


@both
def test_each_condition_matters(name: str) -> None:
    model = MODELS[name]()
    changed = {
        "class_labels": torch.tensor([1, 3]),
        "actions": inputs()["actions"] ^ 1,
        "timestep": inputs()["timestep"] + 1,
        "flex_rope_slope": 0.5,
        "rope_interpolation": 2.0,
        "frame_positions": torch.arange(7) * 2,
    }
    for argument, value in changed.items():
        assert max_error(run(model, **{argument: value})[1], run(model)[1]) > 1e-5, argument


@both
def test_modulation_stands_for_levels_and_labels(name: str) -> None:
    model = MODELS[name]()
    given = inputs(num_frames=3)
    labels = {key: given.pop(key) for key in ("timestep", "class_labels", "actions")}
    modulation = model.modulation(**labels)
    other = torch.full_like(labels["timestep"], 7.0)
    expected = model(**given, **labels).sample
    assert relative_error(model(**given, timestep=other, modulation=modulation).sample, expected) <= TOLERANCE
    assert max_error(model(**given, timestep=other).sample, expected) > 1e-3


@both
def test_only_distances_between_frames_matter(name: str) -> None:
    model = MODELS[name]()
    moved = run(model, frame_positions=torch.arange(7) + 40, flex_rope_slope=0.2)
    assert relative_error(moved, run(model, flex_rope_slope=0.2)) <= TOLERANCE


def test_interpolation_divides_positions_but_not_the_decay() -> None:
    model = transformer(**BASE)
    halved = run(model, frame_positions=torch.arange(7) / 2)
    assert relative_error(run(model, rope_interpolation=2.0), halved) <= TOLERANCE
    with_slope = run(model, rope_interpolation=2.0, flex_rope_slope=0.2)
    by_hand = run(model, frame_positions=torch.arange(7) / 2, flex_rope_slope=0.4)
    assert relative_error(with_slope, by_hand) <= TOLERANCE


@both
def test_training_mode_changes_nothing(name: str) -> None:
    model = MODELS[name]()
    assert torch.equal(run(model.train()), run(model.eval()))


def gradients(model: FARTransformer3DModel) -> dict[str, Tensor]:
    model.zero_grad()
    model(**inputs()).sample.square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@both
def test_gradient_checkpointing(name: str) -> None:
    model = MODELS[name]().train()
    expected = gradients(model)
    calls = []
    model.enable_gradient_checkpointing()
    checkpoint = model._gradient_checkpointing_func
    model._gradient_checkpointing_func = lambda *args: calls.append(args) or checkpoint(*args)
    found = gradients(model)
    assert len(calls) == 2  # blocks
    assert found.keys() == expected.keys()
    assert max(relative_error(found[key], expected[key]) for key in expected) <= TOLERANCE


@both
def test_every_parameter_is_trained(name: str) -> None:
    unused = [key for key, gradient in gradients(MODELS[name]()).items() if not gradient.abs().max() > 0]
    # Nothing reads the long-term tokens after the last layer; the published files have their queries.
    last = "transformer_blocks.1.attn"
    assert unused == (
        [f"{last}.{part}" for part in ("add_q_proj.weight", "add_q_proj.bias", "norm_added_q.weight")]
        if name == "long"
        else []
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@both
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    model = MODELS[name]()
    expected = run(model)
    model = model.to(dtype)
    sample = run(model, hidden_states=inputs()["hidden_states"].to(dtype))
    assert sample.dtype == dtype
    assert max_error(sample, expected) <= 0.05 * expected.abs().max().item()


@both
def test_save_and_load(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    model.save_pretrained(tmp_path)
    loaded = FARTransformer3DModel.from_pretrained(tmp_path)
    different = [key for key in model.config if key[0] != "_" and loaded.config[key] != model.config[key]]
    assert different == ["axes_dims_rope"]  # JSON has no tuples
    assert tuple(loaded.config.axes_dims_rope) == model.config.axes_dims_rope
    assert torch.equal(run(loaded), run(model))


@both
def test_fused_projections(name: str) -> None:
    model = MODELS[name]()
    expected = run(model)
    model.fuse_qkv_projections()
    assert all(block.attn.fused_projections for block in model.transformer_blocks)
    for block in model.transformer_blocks:
        block.attn.to_q = None  # not used any more
    assert relative_error(run(model), expected) <= TOLERANCE


def test_unfused_projections() -> None:
    model = long_transformer(**BASE)
    expected = run(model)
    model.fuse_qkv_projections()
    model.unfuse_qkv_projections()
    assert torch.equal(run(model), expected)


@both
def test_attention_backends_and_processors(name: str) -> None:
    model = MODELS[name]()
    expected = run(model)
    assert len(model.attn_processors) == 2
    assert all(isinstance(processor, FARAttnProcessor) for processor in model.attn_processors.values())
    model.set_attention_backend("native")
    assert {processor._attention_backend for processor in model.attn_processors.values()} == {"native"}
    assert torch.equal(run(model), expected)
    model.reset_attention_backend()
    model.set_attn_processor(FARAttnProcessor())
    assert torch.equal(run(model), expected)


@pytest.mark.parametrize("with_slope", [False, True])
@both
def test_compiled_as_one_graph(name: str, with_slope: bool) -> None:
    model, slope = MODELS[name](num_layers=1), 0.2 * with_slope
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        sample = compiled(**inputs(), flex_rope_slope=slope).sample
    assert relative_error(sample, run(model, flex_rope_slope=slope)) <= TOLERANCE


@pytest.mark.parametrize("regional", [True, False], ids=["blocks", "model"])
@both
def test_a_compiled_model_samples_without_compiling_every_frame(name: str, regional: bool) -> None:
    """Past torch's limit of 8 recompilations a full graph is an error."""
    model = MODELS[name](num_layers=2)
    pipe = pipeline(model, num_inference_steps=2)
    arguments = {"num_frames": 13, "latents": latents(1, 13), "output_type": "latent", "flex_rope_slope": 0.1}
    expected = pipe(**arguments).frames
    torch.compiler.reset()
    if regional:
        model.compile_repeated_blocks(fullgraph=True, backend="eager")
    else:
        model.compile(fullgraph=True, backend="eager")
    assert relative_error(pipe(**arguments).frames, expected) <= TOLERANCE


class Graphs:
    """A backend of torch.compile that counts what it gets."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, example_inputs: list[Tensor]) -> torch.fx.GraphModule:
        self.count += 1
        return graph


@pytest.mark.parametrize("with_slope", [False, True])
@both
def test_all_blocks_and_numbers_of_frames_share_one_graph(name: str, with_slope: bool) -> None:
    model, slope = MODELS[name](num_layers=4), 0.2 * with_slope
    expected, found, graphs = {}, {}, Graphs()
    many = {count: (latents(1, count), torch.full((1, count), 300.0)) for count in (7, 9, 12, 20)}
    with torch.no_grad():
        for count, given in many.items():
            expected[count] = model(*given, flex_rope_slope=slope).sample
        torch.compiler.reset()
        model.compile_repeated_blocks(fullgraph=True, backend=graphs)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for count, given in many.items():
                found[count] = model(*given, flex_rope_slope=slope).sample
    assert graphs.count == 1
    for count in many:
        assert relative_error(found[count], expected[count]) <= TOLERANCE


@both
def test_a_rollout_compiles_no_block_for_its_length(name: str) -> None:
    """The first frame, the second one, and a Long model's first long-term frame have graphs of their own."""
    graphs, pipe = Graphs(), pipeline(MODELS[name](num_layers=3), num_inference_steps=2)
    torch.compiler.reset()
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=graphs)
    rollout = pipe.rollout(batch_size=1, output_type="latent", generator=generator())
    for _ in range(6):
        rollout.step()
    assert graphs.count <= 5
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(30):  # the buffers of the cache grow four times
            rollout.step()


@both
def test_rollouts_after_any_number_of_frames_share_their_graphs(name: str) -> None:
    """Past torch's limit of 8 a full graph is an error, and any other is left uncompiled."""
    graphs, pipe = Graphs(), pipeline(MODELS[name](num_layers=3), num_inference_steps=2)
    torch.compiler.reset()
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=graphs)
    for num_frames in (200, 70, 5, 1, 0):
        given = {"video_latents": latents(1, num_frames)} if num_frames else {"batch_size": 1}
        rollout = pipe.rollout(output_type="latent", generator=generator(), **given)
        for _ in range(8):
            rollout.step()
    assert graphs.count <= 7


def test_compiled_with_gradients() -> None:
    model = transformer(num_layers=1, **BASE)
    expected = gradients(model)
    torch.compiler.reset()
    model.compile(fullgraph=True, backend="aot_eager")
    found = gradients(model)
    assert max(relative_error(found[key], expected[key]) for key in expected) <= TOLERANCE


LORA = {"r": 2, "lora_alpha": 4, "target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}


def test_lora(tmp_path: Path) -> None:
    model = long_transformer(**BASE)
    expected = run(model)
    model.add_adapter(LoraConfig(**LORA))
    assert torch.equal(run(model), expected)  # starts as zero
    assert sum("lora_B" in key for key, _ in model.named_parameters()) == 4 * 2

    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.3, generator=generator())
    adapted = run(model)
    assert max_error(adapted, expected) > 1e-3
    model.disable_adapters()
    assert torch.equal(run(model), expected)
    model.enable_adapters()
    assert torch.equal(run(model), adapted)

    model.save_lora_adapter(tmp_path)
    fresh = long_transformer(**BASE)
    # By folder and name: for a path to the file diffusers does not read lora_alpha.
    fresh.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")
    assert relative_error(run(fresh), adapted) <= TOLERANCE
    fresh.fuse_lora()
    assert relative_error(run(fresh), adapted) <= TOLERANCE


def test_lora_trains_the_adapter_only() -> None:
    model = transformer(**BASE)
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(**LORA))
    model(**inputs()).sample.square().mean().backward()
    trained = {key for key, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained and all("lora_" in key for key in trained)


@pytest.mark.parametrize("offload_type", ["leaf_level", "block_level"])
@both
def test_group_offload(name: str, offload_type: str) -> None:
    model = MODELS[name]()
    expected = run(model)
    blocks = {"num_blocks_per_group": 1} if offload_type == "block_level" else {}
    model.enable_group_offload(onload_device=torch.device("cpu"), offload_type=offload_type, **blocks)
    assert torch.equal(run(model), expected)


@both
def test_layerwise_casting(name: str) -> None:
    model = MODELS[name]()
    expected = run(model)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert model.transformer_blocks[0].attn.to_q.weight.dtype == torch.float8_e4m3fn
    assert model.x_embedder.weight.dtype == torch.float32
    assert model.create_cache(1, 8, 8).layers[0].keys.dtype == torch.float32
    error = max_error(run(model), expected) / expected.abs().max().item()
    assert 0 < error < 0.3
    pipe = pipeline(model)
    assert torch.isfinite(pipe(num_frames=6, generator=generator(), output_type="latent").frames).all()


@both
def test_autocast_with_a_cache(name: str) -> None:
    pipe = pipeline(MODELS[name]())
    arguments = {"num_frames": 6, "latents": latents(1, 6), "output_type": "latent"}
    expected = pipe(**arguments).frames
    with torch.autocast("cpu", torch.bfloat16):
        sample = pipe(**arguments).frames
    assert sample.dtype == torch.float32
    assert 0 < max_error(sample, expected) < 0.1 * expected.abs().max().item()


@both
def test_an_interval_of_no_length_is_an_instant(name: str) -> None:
    model, timestep = MODELS[name](use_meanflow=True), inputs()["timestep"]
    expected = run(model)
    assert relative_error(run(model, timestep_r=timestep), expected) <= TOLERANCE
    changed = run(model, timestep_r=torch.cat([timestep[:, :-1], timestep[:, -1:] - 200], dim=1))
    assert relative_error(changed[:, :-1], expected[:, :-1]) <= TOLERANCE  # it is one of the last frame
    assert max_error(changed[:, -1], expected[:, -1]) > 1e-3


def test_intervals_mean_nothing_to_a_model_that_has_not_learned_them() -> None:
    model = long_transformer(num_actions=4, num_classes=5)
    changed = FARTransformer3DModel.from_config(model.config, use_meanflow=True)
    changed.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(run(changed, timestep_r=inputs()["timestep"] * 0.5), run(model))


def test_bad_intervals() -> None:
    timestep = inputs()["timestep"]
    with pytest.raises(ValueError, match=r"timestep_r given to a model .*use_meanflow=False"):
        run(transformer(**BASE), timestep_r=timestep)
    with pytest.raises(ValueError, match=r"timestep_r has shape \(2,\); it takes \(2, 7\)"):
        run(transformer(**BASE, use_meanflow=True), timestep_r=timestep[:, 0])


def test_declared_modules_exist() -> None:
    names = [*FARTransformer3DModel._no_split_modules, *FARTransformer3DModel._repeated_blocks]
    classes = {type(module).__name__ for module in long_transformer().modules()}
    assert names and all(hasattr(transformer_far, name) and name in classes for name in names)
    assert FARAttnProcessor in FARAttention._available_processors
    modules = [name for name, _ in long_transformer().named_modules()]
    patterns = FARTransformer3DModel._skip_layerwise_casting_patterns
    assert all(any(pattern in name for name in modules) for pattern in patterns)


def test_config_has_every_argument() -> None:
    model = long_transformer(num_actions=3)
    assert model.is_long and model.short_window == 4
    assert not transformer().is_long and transformer().short_window is None
    assert model.config.num_actions == 3 and model.config.num_classes is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"axes_dims_rope": (4, 6, 8)}, r"axes_dims_rope=\(4, 6, 8\) .*attention_head_dim=16"),
        ({"axes_dims_rope": (5, 5, 6)}, r"axes_dims_rope=\(5, 5, 6\)"),
        ({"patch_size": 4, "long_patch_size": 6}, "long_patch_size=6.*patch_size=4"),
        ({"long_patch_size": 0}, "long_patch_size=0"),
        ({"patch_size": 0}, "patch_size=0"),
        ({"short_window": 0, "long_patch_size": 4}, "short_window=0"),
        ({"num_layers": 0}, "num_layers=0"),
        ({"num_classes": -1}, "num_classes=-1"),
        ({"num_actions": 0}, "num_actions=0"),
    ],
    ids=str,
)
def test_bad_configurations(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FARTransformer3DModel(**SIZE | config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_states": torch.zeros(2, 4, 8, 8)}, "hidden_states"),
        ({"hidden_states": torch.zeros(2, 7, 5, 8, 8)}, "hidden_states"),
        ({"hidden_states": torch.zeros(2, 7, 4, 6, 8)}, "hidden_states"),
        ({"timestep": torch.zeros(2)}, "timestep"),
        ({"timestep": torch.zeros(2, 5)}, "timestep"),
        ({"num_long_frames": 8}, "num_long_frames=8"),
        ({"class_labels": torch.zeros(3, dtype=torch.long)}, "class_labels"),
        ({"actions": torch.zeros(2, 6, dtype=torch.long)}, "actions"),
        ({"frame_positions": torch.arange(6)}, "frame_positions"),
    ],
)
def test_bad_inputs(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(long_transformer(**BASE), **changes)


def test_modulation_of_other_frames() -> None:
    model = MODELS["long"]()
    given = inputs(num_frames=3)
    modulation = model.modulation(given["timestep"][:, :2])
    with pytest.raises(ValueError, match=r"modulation is of frames \(2, 2\).*it takes \(2, 3\)"):
        model(**given, modulation=modulation)
    modulation = model.modulation(given["timestep"])
    with pytest.raises(ValueError, match=r"num_long_frames=1.*none of them long-term"):
        model(**given, num_long_frames=1, modulation=modulation)


@pytest.mark.parametrize("argument", ["class_labels", "actions"])
def test_conditions_of_an_unconditional_model(argument: str) -> None:
    with pytest.raises(ValueError, match=f"{argument} given"):
        run(transformer(), **{"class_labels": None, "actions": None} | {argument: inputs()[argument]})


def test_long_frames_of_a_base_model() -> None:
    with pytest.raises(ValueError, match="num_long_frames=2"):
        run(transformer(**BASE), num_long_frames=2)
