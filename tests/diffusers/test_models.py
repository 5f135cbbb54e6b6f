"""diffusers' own tests of models, run on FARTransformer3DModel: base, Long, Long with actions, any-step.

Three tables say all that is not as diffusers has it: LEFT_OUT names its classes of tests that are not run,
SKIPS its tests that skip (on a machine without a GPU), and OVERRIDES those that get arguments of ours. A skip
that is not in SKIPS is a failure.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffusers_far import FARTransformer3DModel
from diffusers_far.attention import MASKED_BACKENDS
from tests.diffusers.upstream import classes_of_tests, not_run, table, upstream
from tests.tiny_models import CHANNELS, GRID, LONG, SIZE, noise

theirs = upstream("models.testing_utils")
DEVICE = upstream("testing_utils").torch_device

_QUANTIZATION = "needs a GPU and a library of its own; FAR has nothing of its own in it"
LEFT_OUT = table(
    ("declares the arguments of the others and has no tests", "BaseModelTesterConfig"),
    ("takes image prompts, which FAR has not", "IPAdapterTesterMixin"),
    (
        "compares with a repository on the Hub; tests/test_single_file.py does it with the published names",
        "SingleFileTesterMixin",
    ),
    (
        "splits tokens over many GPUs by a plan that the model declares; FAR declares none",
        "ContextParallelTesterMixin ContextParallelAttentionBackendsTesterMixin TensorParallelTesterMixin",
    ),
    (
        "caches denoising steps, which FAR refuses: tests/test_hook_registry.py",
        "CacheTesterMixin FasterCacheConfigMixin FasterCacheTesterMixin FirstBlockCacheConfigMixin "
        "FirstBlockCacheTesterMixin MagCacheConfigMixin MagCacheTesterMixin "
        "PyramidAttentionBroadcastConfigMixin PyramidAttentionBroadcastTesterMixin "
        "TaylorSeerCacheConfigMixin TaylorSeerCacheTesterMixin",
    ),
    ("is no class of tests", "run_nondeterministic"),
    (
        _QUANTIZATION,
        " ".join(
            method + kind
            for method in [
                *("AutoRound", "BitsAndBytes", "GGUF", "ModelOpt", "NunchakuLite"),
                *("Quantization", "Quanto", "SDNQ", "TorchAo"),
            ]
            for kind in ("ConfigMixin", "TesterMixin", "CompileTesterMixin")
        ),
    ),
)

_GPU = "needs a GPU"
SKIPS = table(
    (
        "FAR keeps no part in float32 while the rest is half precision",
        "test_keep_in_fp32_modules test_keep_in_fp32_modules_as_str test_to_keep_in_fp32_modules_warns "
        "test_keep_in_fp32_modules_layerwise_casting",
    ),
    (
        f"{_GPU}; the same on CPUs in tests/test_checked_loading.py",
        "test_from_save_pretrained_dtype_inference test_sharded_checkpoints "
        "test_sharded_checkpoints_with_variant",
    ),
    ("needs two GPUs", "test_model_parallelism"),
    (
        _GPU,
        "test_cpu_offload test_disk_offload_without_safetensors test_disk_offload_with_safetensors "
        "test_group_offloading test_group_offloading_with_layerwise_casting test_group_offloading_with_disk "
        "test_layerwise_casting_memory test_layerwise_casting_training",
    ),
    (
        "needs a GPU, and on one the flash backends skip, which FAR refuses by name; "
        "the same for the backends of CPUs in tests/test_attention.py",
        "test_set_attention_backend_matches_context_manager test_output_close_to_native "
        "test_context_manager_switches_and_restores_backend test_compile",
    ),
    (
        f"{_GPU}; the same on CPUs in tests/test_transformer_far.py",
        "test_torch_compile_recompilation_and_graph_break test_torch_compile_repeated_blocks",
    ),
    (
        _GPU,
        "test_compile_with_group_offloading test_compile_on_different_shapes test_compile_works_with_aot",
    ),
    (
        f"{_GPU}: adapters are swapped under a compiled model",
        "test_hotswapping_model test_hotswapping_compiled_model_linear "
        "test_hotswapping_compiled_model_conv2d test_hotswapping_compiled_model_both_linear_and_conv2d "
        "test_hotswapping_compiled_model_both_linear_and_other test_hotswapping_compile_on_different_shapes "
        "test_enable_lora_hotswap_called_after_adapter_added_raises "
        "test_enable_lora_hotswap_called_after_adapter_added_warning "
        "test_enable_lora_hotswap_called_after_adapter_added_ignore "
        "test_enable_lora_hotswap_wrong_check_compiled_argument_raises "
        "test_hotswap_second_adapter_targets_more_layers_raises",
    ),
)
OVERRIDES = table(
    (
        "gets the name of the class that has it, which diffusers cannot know",
        "test_gradient_checkpointing_is_applied",
    ),
)


class Drawn(FARTransformer3DModel):
    """A model whose weights depend on torch's seed: as built, FAR predicts zeros, whatever it is given."""

    def _init_weights(self) -> None:
        super()._init_weights()
        for name, parameter in self.named_parameters():
            if "attn.norm" not in name:
                nn.init.normal_(parameter, std=0.15)


class Base(theirs.BaseModelTesterConfig):  # type: ignore[misc, name-defined]
    model_class = Drawn
    options: dict[str, Any] = {}
    main_input_name = "hidden_states"
    num_frames = num_short_frames = 6
    unsupported_attn_backends = [
        backend.value for backend in type(MASKED_BACKENDS[0]) if backend not in MASKED_BACKENDS
    ]
    different_shapes_for_compilation = [(GRID, GRID), (GRID, 2 * GRID), (2 * GRID, 2 * GRID)]

    @property
    def output_shape(self) -> tuple[int, ...]:
        return (self.num_short_frames, CHANNELS, GRID, GRID)

    def get_init_dict(self) -> dict[str, Any]:
        return SIZE | self.options

    def get_dummy_inputs(self, height: int = GRID, width: int = GRID) -> dict[str, Tensor]:
        levels = torch.linspace(0, 900, 2 * self.num_frames).reshape(2, self.num_frames)
        given = {"hidden_states": noise(2, self.num_frames, CHANNELS, height, width), "timestep": levels}
        if "num_actions" in self.options:
            given["actions"] = torch.arange(2 * self.num_frames).reshape(2, self.num_frames) % 4
        if "use_meanflow" in self.options:
            given["timestep_r"] = levels / 2
        return {name: value.to(DEVICE) for name, value in given.items()}


class Long(Base):
    """Two of its frames are long-term."""

    options = LONG
    num_short_frames = 4


class LongWithActions(Long):
    options = LONG | {"num_actions": 4}


class AnyStep(Long):
    options = LONG | {"use_meanflow": True}


class Training(theirs.TrainingTesterMixin):  # type: ignore[misc, name-defined]
    def test_gradient_checkpointing_is_applied(self) -> None:
        super().test_gradient_checkpointing_is_applied(expected_set={Drawn.__name__})


TESTS = {
    "Model": theirs.ModelTesterMixin,
    "Memory": theirs.MemoryTesterMixin,
    "Attention": theirs.AttentionTesterMixin,
    "AttentionBackends": theirs.AttentionBackendTesterMixin,
    "Compile": theirs.TorchCompileTesterMixin,
    "Training": Training,
    "Lora": theirs.LoraTesterMixin,
    "LoraHotSwapping": theirs.LoraHotSwappingForModelTesterMixin,
}
globals().update(classes_of_tests(TESTS, (Base, Long, LongWithActions, AnyStep)))


def test_every_class_of_tests_is_run_or_left_out_for_a_reason() -> None:
    assert not_run(theirs, TESTS) <= set(LEFT_OUT)


@pytest.mark.parametrize("config", [Base, Long, LongWithActions, AnyStep])
def test_the_inputs_matter(config: type[Base]) -> None:
    """Or the tests of diffusers would compare zeros."""
    torch.manual_seed(0)
    model = Drawn(**config().get_init_dict()).eval().to(DEVICE)
    given = config().get_dummy_inputs()
    with torch.no_grad():
        sample = model(**given).sample
        assert tuple(sample.shape[1:]) == config().output_shape
        for name, value in given.items():
            changed = model(**given | {name: value.flip(1)}).sample
            assert (changed - sample).abs().max() > 1e-3 * sample.abs().max(), name
