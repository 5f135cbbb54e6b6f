"""diffusers' own tests of pipelines, run on FARVideoPipeline: base, Long, Long with actions, any-step.

As in `test_models.py`, LEFT_OUT, SKIPS and OVERRIDES say all that is not as diffusers has it.
"""

from typing import Any

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler

from diffusers_far import FARVideoPipeline
from tests.diffusers.upstream import classes_of_tests, not_run, table, upstream
from tests.tiny_models import LONG, autoencoder, transformer

theirs = upstream("pipelines.testing_utils")

LEFT_OUT = table(
    ("declares the arguments of the others and has no tests", "BasePipelineTesterConfig"),
    ("is for UNets", "UNetLoraTesterMixin"),
    (
        "caches denoising steps, which FAR refuses: tests/test_hook_registry.py",
        "CacheTesterMixin PyramidAttentionBroadcastTesterMixin FasterCacheTesterMixin "
        "FirstBlockCacheTesterMixin TaylorSeerCacheTesterMixin MagCacheTesterMixin",
    ),
    (
        "is no class of tests",
        "check_qkv_fused_layers_exist check_qkv_fusion_matches_attn_procs_length "
        "check_qkv_fusion_processors_exist check_same_shape",
    ),
)
SKIPS = table(
    (
        "needs a GPU",
        "test_half_precision_inference_no_nan test_save_load_float16 test_to_device "
        "test_layerwise_casting_inference test_group_offloading_inference "
        "test_pipeline_level_group_offloading_sanity_checks test_pipeline_level_group_offloading_inference "
        "test_sequential_cpu_offload_forward_pass test_model_cpu_offload_forward_pass "
        "test_cpu_offload_forward_pass_twice test_sequential_offload_forward_pass_twice "
        "test_pipeline_with_accelerator_device_map test_group_offloading_inference_denoiser "
        "test_lora_loading_model_cpu_offload test_lora_group_offloading_delete_adapters",
    ),
    ("FAR has no optional components", "test_save_load_optional_components"),
    ("FAR makes videos: its number is `batch_size`, with none per prompt", "test_num_images_per_prompt"),
    (
        "FAR has no text prompts",
        "test_encode_prompt_works_in_isolation test_simple_inference_with_text_lora "
        "test_simple_inference_with_text_lora_and_scale test_simple_inference_with_text_lora_unloaded "
        "test_simple_inference_with_text_lora_save_load test_simple_inference_with_partial_text_lora "
        "test_simple_inference_save_pretrained_with_text_lora",
    ),
    ("the model has neither classes nor actions, and refuses guidance", "test_cfg test_callback_cfg"),
)
OVERRIDES = table(
    (
        "is of one frame: diffusers sets the latents of the last step to zero and expects zeros, but the "
        "last step is that of the last frame alone",
        "test_callback_inputs",
    ),
    (
        "diffusers expects a line in the log for a LoRA of another model; FAR raises an error, so that "
        "nobody takes the video of the bare model for that of the adapter",
        "test_logs_info_when_no_lora_keys_found",
    ),
    (
        "skips for the models that refuse guidance",
        "test_cfg test_callback_cfg",
    ),
)


class Base(theirs.BasePipelineTesterConfig):  # type: ignore[misc, name-defined]
    pipeline_class = FARVideoPipeline
    required_input_params_in_call_signature = frozenset(
        {"video", "num_frames", "height", "width", "class_labels", "actions", "guidance_scale"}
    )
    optional_input_params = theirs.BasePipelineTesterConfig.optional_input_params - {"num_images_per_prompt"}
    batch_input_params = frozenset({"actions"})
    options: dict[str, Any] = {}
    num_frames = 6

    @property
    def output_shape(self) -> tuple[int, ...]:
        return (self.num_frames, 3, 32, 32)

    def get_dummy_components(self) -> dict[str, Any]:
        scheduler = FlowMatchEulerDiscreteScheduler()
        return {"transformer": transformer(**self.options), "vae": autoencoder(), "scheduler": scheduler}

    def get_dummy_inputs(self) -> dict[str, Any]:
        inputs = {
            "num_frames": self.num_frames,
            "num_inference_steps": 2,
            "height": 32,
            "width": 32,
            "batch_size": 1,
            "generator": self.get_generator(0),
            "output_type": "pt",
        }
        if "num_actions" in self.options:
            inputs["actions"] = [frame % 4 for frame in range(self.num_frames)]
        return inputs


class Long(Base):
    options = LONG


class LongWithActions(Long):
    options = LONG | {"num_actions": 4}


class AnyStep(Long):
    options = LONG | {"use_meanflow": True}


class Pipelines(theirs.PipelineTesterMixin):  # type: ignore[misc, name-defined]
    options: dict[str, Any]

    def test_callback_inputs(self) -> None:
        self.num_frames = 1
        super().test_callback_inputs()

    def _skip_without_guidance(self) -> None:
        if "num_actions" not in self.options:
            with pytest.raises(ValueError, match="has no classes or actions to guide"):
                self.run_pipe(self.get_pipeline(), guidance_scale=2.0)
            pytest.skip(SKIPS["test_cfg"])

    def test_cfg(self) -> None:
        self._skip_without_guidance()
        super().test_cfg()

    def test_callback_cfg(self) -> None:
        self._skip_without_guidance()
        super().test_callback_cfg()


class Lora(theirs.LoraTesterMixin):  # type: ignore[misc, name-defined]
    def test_logs_info_when_no_lora_keys_found(self) -> None:
        with pytest.raises(ValueError, match="not a LoRA of this transformer"):
            super().test_logs_info_when_no_lora_keys_found(self.run_pipe(self.get_pipeline()))


TESTS = {
    "Pipeline": Pipelines,
    "Memory": theirs.MemoryTesterMixin,
    "Lora": Lora,
    "LoraMemory": theirs.LoraMemoryTesterMixin,
}
globals().update(classes_of_tests(TESTS, (Base, Long, LongWithActions, AnyStep)))


def test_every_class_of_tests_is_run_or_left_out_for_a_reason() -> None:
    assert not_run(theirs, TESTS) <= set(LEFT_OUT)
