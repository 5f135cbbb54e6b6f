"""FARVideoPipeline: what goes in and comes out of a call, a stream and a rollout."""

import itertools
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusers_far import ContextSchedule, FARTransformer3DModel, FARVideoPipeline
from diffusers_far.pipeline_far_video import AUTO_SLOPE
from tests.tiny_models import (
    TOLERANCE,
    generator,
    latents,
    long_transformer,
    max_error,
    pipeline,
    relative_error,
    transformer,
)

STEPS = 3


@pytest.fixture
def pipe() -> FARVideoPipeline:
    return pipeline(transformer(num_actions=4))


@pytest.fixture
def class_pipe() -> FARVideoPipeline:
    return pipeline(transformer(num_classes=5))


def call(pipe: FARVideoPipeline, **arguments: Any) -> Any:
    """Frames of a short call."""
    return pipe(**{"num_frames": 4, "generator": generator(), "output_type": "latent"} | arguments).frames


def test_generation_from_nothing(pipe: FARVideoPipeline) -> None:
    frames = call(pipe, batch_size=2, height=32, width=96)
    assert frames.shape == (2, 4, 4, 4, 12)
    assert frames.dtype == torch.float32
    assert call(pipe, num_frames=1).shape == (1, 1, 4, 8, 8)


def test_defaults_come_from_the_checkpoint() -> None:
    pipe = pipeline(num_inference_steps=2, sample_size=32, flex_rope_slope=0.3)
    frames = call(pipe)
    assert frames.shape == (1, 4, 4, 4, 4)
    assert pipe.num_timesteps == 2 * 4  # of all frames
    assert torch.equal(
        frames, call(pipeline(), height=32, width=32, num_inference_steps=2, flex_rope_slope=0.3)
    )
    assert max_error(frames, call(pipe, flex_rope_slope=0.0)) > 1e-4


@pytest.mark.parametrize("model", [transformer(num_actions=4), long_transformer(num_actions=4)])
def test_automatic_slope_is_for_contexts_longer_than_trained(model: FARTransformer3DModel) -> None:
    pipe = pipeline(model, num_training_frames=8)
    for schedule, slope in (
        (None, 0.0),
        (ContextSchedule(num_sink_frames=2), 0.0),
        (ContextSchedule(max_short_frames=3, max_long_frames=4), 0.0),
        (ContextSchedule(max_short_frames=9, max_long_frames=9), AUTO_SLOPE / 8),
        (ContextSchedule.unbounded(), AUTO_SLOPE / 8),
    ):
        rollout = pipe.rollout(flex_rope_slope="auto", context_schedule=schedule)
        assert rollout.flex_rope_slope == slope, schedule
    with pytest.raises(ValueError, match="'auto' takes a checkpoint with num_training_frames"):
        pipeline(model).rollout(flex_rope_slope="auto")
    with pytest.raises(ValueError, match="flex_rope_slope='most' must be 0"):
        pipe.rollout(flex_rope_slope="most")


def test_default_size_is_one_number_or_two(tmp_path: Path) -> None:
    pipe = pipeline(sample_size=(32, 96))
    assert call(pipe).shape == (1, 4, 4, 4, 12)
    assert call(pipe, width=32).shape == (1, 4, 4, 4, 4)
    assert call(pipe, video=torch.rand(1, 2, 3, 40, 40)).shape == (1, 4, 4, 4, 12)
    pipe.save_pretrained(tmp_path)
    assert FARVideoPipeline.from_pretrained(tmp_path).default_size == (32, 96)
    assert pipeline(sample_size=32).default_size == (32, 32)
    assert pipeline(sample_size=None).default_size == (None, None)
    for wrong in (0, -8, 30, 64.0, True, "64", (64,), (64, 64, 64), (64, 30), (64, None)):
        with pytest.raises(
            ValueError, match=r"sample_size=.* must be a positive multiple of 8 pixels, or two"
        ):
            pipeline(sample_size=wrong)


def test_output_types_agree(pipe: FARVideoPipeline) -> None:
    outputs = {kind: call(pipe, output_type=kind, batch_size=2) for kind in ("pil", "np", "pt", "latent")}
    assert outputs["latent"].shape == (2, 4, 4, 8, 8)
    assert outputs["pt"].shape == (2, 4, 3, 64, 64)
    assert outputs["np"].shape == (2, 4, 64, 64, 3)
    assert [len(video) for video in outputs["pil"]] == [4, 4]
    assert all(frame.size == (64, 64) for video in outputs["pil"] for frame in video)
    assert 0 <= outputs["pt"].min() < outputs["pt"].max() <= 1
    np.testing.assert_array_equal(outputs["np"], outputs["pt"].permute(0, 1, 3, 4, 2).numpy())
    images = np.stack([[np.asarray(frame) for frame in video] for video in outputs["pil"]])
    np.testing.assert_array_equal(images, (outputs["np"] * 255).round().astype(np.uint8))
    decoded = torch.stack([pipe.decode_latents(frame) for frame in outputs["latent"].unbind(1)], dim=1)
    assert relative_error((decoded / 2 + 0.5).clamp(0, 1), outputs["pt"]) <= TOLERANCE


def test_frames_of_a_video_are_decoded_in_order(pipe: FARVideoPipeline) -> None:
    context = latents(2, 3)
    frames = call(pipe, video_latents=context, output_type="pt")
    for video, frame in itertools.product(range(2), range(3)):
        decoded = pipe.decode_latents(context[video : video + 1, frame])
        assert relative_error((decoded[0] / 2 + 0.5).clamp(0, 1), frames[video, frame]) <= TOLERANCE


def test_return_dict(pipe: FARVideoPipeline) -> None:
    result = pipe(num_frames=2, generator=generator(), output_type="latent", return_dict=False)
    assert isinstance(result, tuple) and torch.equal(result[0], call(pipe, num_frames=2))


def test_use_cache_changes_nothing() -> None:
    pipe = pipeline(long_transformer(num_actions=4))
    arguments = {"num_frames": 9, "actions": [1, 2, 3] * 3, "guidance_scale": 1.5}
    assert relative_error(call(pipe, **arguments), call(pipe, **arguments, use_cache=False)) <= TOLERANCE


def test_a_context_schedule_reaches_the_rollout(pipe: FARVideoPipeline) -> None:
    bounded = call(pipe, num_frames=6, context_schedule=ContextSchedule(max_short_frames=2))
    assert max_error(bounded, call(pipe, num_frames=6)) > 1e-4


def test_given_noise_is_used_frame_by_frame(pipe: FARVideoPipeline) -> None:
    noise = latents(2, 3)
    context = latents(2, 1, seed=7)
    frames = call(pipe, video_latents=context, latents=noise, generator=None)
    assert torch.equal(frames[:, :1], context)
    changed = noise.clone()
    changed[:, 2] += 1
    again = call(pipe, video_latents=context, latents=changed, generator=None)
    assert torch.equal(again[:, :3], frames[:, :3])
    assert max_error(again[:, 3], frames[:, 3]) > 1e-3
    assert torch.equal(noise, latents(2, 3))


def test_a_batch_is_its_videos(class_pipe: FARVideoPipeline) -> None:
    noise = latents(3, 4)
    arguments = {"guidance_scale": 2.0, "generator": None}
    together = call(class_pipe, class_labels=[0, 4, 2], latents=noise, **arguments)
    for index, label in enumerate((0, 4, 2)):
        alone = call(class_pipe, class_labels=label, latents=noise[index : index + 1], **arguments)
        assert relative_error(together[index : index + 1], alone) <= TOLERANCE


def test_one_generator_per_video(pipe: FARVideoPipeline) -> None:
    together = call(pipe, batch_size=2, generator=[generator(5), generator(6)])
    for index, seed in enumerate((5, 6)):
        assert relative_error(together[index : index + 1], call(pipe, generator=generator(seed))) <= TOLERANCE
    assert max_error(together[:1], together[1:]) > 0.1


def test_forms_of_class_labels(class_pipe: FARVideoPipeline) -> None:
    expected = call(class_pipe, class_labels=torch.tensor([2, 2]))
    for form in (
        [2, 2],
        (2, 2),
        np.array([2, 2]),
        np.array([2, 2], dtype=np.int32),
        torch.tensor([2, 2]).int(),
    ):
        assert torch.equal(call(class_pipe, class_labels=form), expected)
    for form in (2, np.int64(2), torch.tensor(2)):
        assert torch.equal(call(class_pipe, class_labels=form, batch_size=2), expected)
    assert call(class_pipe, class_labels=2).shape[0] == 1
    assert relative_error(call(class_pipe, class_labels=[2, 3])[0], expected[0]) <= TOLERANCE
    assert max_error(call(class_pipe, class_labels=[2, 3])[1], expected[1]) > 1e-4


def test_forms_of_actions(pipe: FARVideoPipeline) -> None:
    row = [0, 1, 2, 3]
    expected = call(pipe, actions=torch.tensor([row, row]))
    for form in ([row, row], np.array([row, row]), (tuple(row), tuple(row)), torch.tensor([row, row]).int()):
        assert torch.equal(call(pipe, actions=form), expected)
    for form in (row, tuple(row), np.array(row), torch.tensor(row)):
        assert torch.equal(call(pipe, actions=form, batch_size=2), expected)
        assert call(pipe, actions=form).shape[0] == 1
    different = call(pipe, actions=[row, [0, 1, 2, 2]])
    assert torch.equal(different[0], expected[0]) and torch.equal(different[1, :3], expected[1, :3])
    assert max_error(different[1, 3], expected[1, 3]) > 1e-4


def test_the_action_of_a_frame_leads_to_it(pipe: FARVideoPipeline) -> None:
    """Also those of the context matter, each at its frame."""
    context, row = latents(1, 2), [0, 1, 2, 3, 0]
    expected = call(pipe, num_frames=5, video_latents=context, actions=row)
    for index, first_changed in ((4, 4), (3, 3), (2, 2), (1, 2), (0, 2)):
        changed = list(row)
        changed[index] = 1 if row[index] != 1 else 2
        frames = call(pipe, num_frames=5, video_latents=context, actions=changed)
        assert torch.equal(frames[:, :first_changed], expected[:, :first_changed])
        assert max_error(frames[:, first_changed], expected[:, first_changed]) > 1e-5


@pytest.mark.parametrize("null", [-1, 4, [-1, 4, 4, -1], torch.full((1, 4), -1)], ids=str)
def test_null_actions_are_the_same(pipe: FARVideoPipeline, null: Any) -> None:
    actions = [null] * 4 if isinstance(null, int) else null
    assert torch.equal(call(pipe, actions=actions), call(pipe))


def test_null_labels_are_the_same(class_pipe: FARVideoPipeline) -> None:
    expected = call(class_pipe)
    for null in (-1, 5, [-1], [5], torch.tensor([-1])):
        assert torch.equal(call(class_pipe, class_labels=null), expected)
    assert torch.equal(call(class_pipe, class_labels=3, guidance_scale=0), expected)
    assert relative_error(call(class_pipe, guidance_scale=3.0), expected) <= TOLERANCE  # null against null
    assert max_error(call(class_pipe, class_labels=3), expected) > 1e-4


def test_guidance(class_pipe: FARVideoPipeline) -> None:
    null, plain, guided = (call(class_pipe, class_labels=3, guidance_scale=scale) for scale in (0, 1, 2.5))
    assert class_pipe.guidance_scale == 2.5 and class_pipe.do_classifier_free_guidance
    assert max_error(null, plain) > 1e-4 and max_error(guided, plain) > 1e-4
    assert relative_error(call(class_pipe, class_labels=3, guidance_scale=1.0 + 1e-7), plain) <= TOLERANCE


def test_the_callback_gets_every_step(pipe: FARVideoPipeline) -> None:
    seen = []

    def callback(owner: Any, step: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        assert owner is pipe and tensors["latents"].shape == (1, 1, 4, 8, 8)
        seen.append((step, -(-timestep.item() // 1)))
        return tensors

    frames = call(pipe, video_latents=latents(1, 2), callback_on_step_end=callback)
    assert seen == list(zip(range(2 * STEPS), [1000, 501, 1] * 2, strict=True))
    assert torch.equal(frames, call(pipe, video_latents=latents(1, 2)))


@pytest.mark.parametrize("returned", [None, {}])
def test_a_callback_may_return_nothing_and_ask_for_nothing(pipe: FARVideoPipeline, returned: Any) -> None:
    asked = []

    def callback(owner: Any, step: int, timestep: Tensor, tensors: dict[str, Any]) -> Any:
        asked.append(dict(tensors))
        return returned

    frames = call(pipe, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=[])
    assert torch.equal(frames, call(pipe)) and asked == [{}] * 4 * STEPS


def test_a_callback_changes_latents(pipe: FARVideoPipeline) -> None:
    def callback(owner: Any, step: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        last_of_first_frame = step == STEPS - 1
        return {"latents": torch.zeros_like(tensors["latents"])} if last_of_first_frame else tensors

    frames, plain = call(pipe, callback_on_step_end=callback), call(pipe)
    assert torch.equal(frames[:, 0], torch.zeros_like(frames[:, 0]))
    assert max_error(frames[:, 1], plain[:, 1]) > 1e-5  # sees the changed frame


@pytest.mark.parametrize("stop", [0, 2, 3, 7])
def test_an_interrupted_call_returns_complete_frames(pipe: FARVideoPipeline, stop: int) -> None:
    def callback(owner: Any, step: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        owner._interrupt = step == stop
        return tensors

    expected, context = call(pipe, num_frames=6, video_latents=latents(1, 2)), latents(1, 2)
    frames = call(pipe, num_frames=6, video_latents=context, callback_on_step_end=callback)
    # Interrupted within frame stop // 3, unless the step was its last one.
    assert frames.shape[1] in {2 + stop // STEPS, 2 + (stop + 1) // STEPS}
    assert torch.equal(frames, expected[:, : frames.shape[1]])
    assert torch.equal(call(pipe, num_frames=6, video_latents=context), expected)  # the next call is whole


def test_a_call_interrupted_before_its_first_frame_is_done(pipe: FARVideoPipeline) -> None:
    def callback(owner: Any, step: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        owner._interrupt = True
        return tensors

    for kind in ("latent", "pt", "np", "pil"):
        frames = call(pipe, callback_on_step_end=callback, output_type=kind)
        assert len(frames) == 1 and len(frames[0]) == 0


def test_an_exception_leaves_the_frames_so_far(pipe: FARVideoPipeline) -> None:
    def callback(owner: Any, step: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 2 * STEPS + 1:
            raise KeyboardInterrupt
        return tensors

    with pytest.raises(KeyboardInterrupt):
        call(pipe, callback_on_step_end=callback)
    expected = call(pipe)[:, :2]
    with pytest.raises(KeyboardInterrupt):
        call(pipe, callback_on_step_end=callback)
    assert torch.equal(pipe.frames_so_far("latent"), expected)
    assert pipe.frames_so_far("pt").shape == (1, 2, 3, 64, 64)


def test_save_and_load(tmp_path: Path) -> None:
    names = ["noop", "forward", "left", "right"]
    pipe = pipeline(long_transformer(num_actions=4), flex_rope_slope=0.2, action_names=names)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "FARVideoPipeline"
    assert index["transformer"] == ["diffusers_far", "FARTransformer3DModel"]
    loaded = FARVideoPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    settings = ("flex_rope_slope", "num_inference_steps", "sample_size", "action_names")
    assert [loaded.config[name] for name in settings] == [0.2, STEPS, 64, names]
    assert torch.equal(call(loaded, num_frames=7), call(pipe, num_frames=7))


def test_automatic_slope_is_kept_with_the_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)  # so that caplog has its warnings
    model = long_transformer(num_actions=4)
    pipeline(model, flex_rope_slope="auto", num_training_frames=8).save_pretrained(tmp_path)
    loaded = FARVideoPipeline.from_pretrained(tmp_path)
    assert "flex_rope_slope" not in caplog.text  # diffusers warns of an option of another type
    assert loaded.config.flex_rope_slope == "auto"
    assert loaded.rollout().flex_rope_slope == 0
    unbounded = ContextSchedule.unbounded()
    assert loaded.rollout(context_schedule=unbounded).flex_rope_slope == AUTO_SLOPE / 8
    assert loaded.rollout(context_schedule=unbounded, flex_rope_slope=0.2).flex_rope_slope == 0.2


def test_action_names_are_as_many_as_actions() -> None:
    with pytest.raises(ValueError, match=r"action_names=\['noop'\] must be 4"):
        pipeline(transformer(num_actions=4), action_names=["noop"])


@pytest.mark.parametrize("model", [transformer, long_transformer])
def test_bfloat16(model: Any) -> None:
    pipe = pipeline(model(num_actions=4))
    noise = latents(1, 6)
    expected = call(pipe, num_frames=6, latents=noise)
    found = call(pipe.to(torch.bfloat16), num_frames=6, latents=noise)
    assert found.dtype == torch.float32  # latents are kept in full precision
    assert 0 < max_error(found, expected) < 0.1 * expected.abs().max().item()
    assert call(pipe, output_type="pt").dtype == torch.float32
    assert pipe.encode_video(torch.rand(2, 3, 64, 64)).dtype == torch.float32


def test_stream_makes_a_frame_per_action_as_they_come(pipe: FARVideoPipeline) -> None:
    taken = []

    def player() -> Any:
        for action in (0, 3, None, [2]):
            taken.append(action)
            yield action

    stream = pipe.stream(actions=player(), generator=generator(), output_type="latent")
    assert taken == []
    frames = [next(stream)]
    assert taken == [0]
    frames += list(stream)
    assert taken == [0, 3, None, [2]] and len(frames) == 4

    rollout = pipe.rollout(generator=generator(), output_type="latent")
    assert torch.equal(torch.stack(frames), torch.stack([rollout.step(action) for action in taken]))


def test_stream_without_actions(pipe: FARVideoPipeline) -> None:
    assert len(list(pipe.stream(num_new_frames=3, output_type="latent"))) == 3
    assert len(list(pipe.stream(num_new_frames=2, actions=itertools.repeat(1), output_type="latent"))) == 2
    assert len(list(pipe.stream(actions=[], output_type="latent"))) == 0
    assert len(list(itertools.islice(pipe.stream(output_type="latent"), 4))) == 4


@pytest.mark.parametrize("kind", ["pil", "np", "pt", "latent"])
def test_frames_of_a_rollout(pipe: FARVideoPipeline, kind: str) -> None:
    frame = pipe.rollout(output_type=kind, batch_size=2).step(1)
    if kind == "pil":
        assert [image.size for image in frame] == [(64, 64)] * 2
    else:
        shapes = {"np": (2, 64, 64, 3), "pt": (2, 3, 64, 64), "latent": (2, 4, 8, 8)}
        assert frame.shape == shapes[kind]


def test_a_rollout_is_a_call(pipe: FARVideoPipeline) -> None:
    noise, context = latents(1, 3), latents(1, 2)
    called = call(pipe, num_frames=5, video_latents=context, actions=[3, 2, 1, 0, 1], latents=noise)
    rollout = pipe.rollout(video_latents=context, context_actions=[3, 2], output_type="latent")
    made = [
        rollout.step_latents(torch.tensor([action]), noise[:, index : index + 1])
        for index, action in enumerate((1, 0, 1))
    ]
    assert torch.equal(torch.cat(made, dim=1), called[:, 2:])


def test_a_rollout_of_given_frames_is_saved(pipe: FARVideoPipeline, tmp_path: Path) -> None:
    """Latents lie in memory as the autoencoder left them; safetensors takes contiguous tensors only."""
    rollout = pipe.rollout(video=np.zeros((2, 32, 32, 3), np.uint8), context_actions=[0, 1])
    rollout.step(1)
    save_file(rollout.state_dict(), tmp_path / "game")
    other = pipe.rollout(video=np.ones((1, 32, 32, 3), np.uint8))
    other.load_state_dict(load_file(tmp_path / "game"))
    assert other.num_frames == 3 and torch.equal(other.context_latents, rollout.context_latents)


def test_two_rollouts_of_a_pipeline_take_turns(pipe: FARVideoPipeline) -> None:
    alone = [pipe.rollout(generator=generator(seed), output_type="latent") for seed in (1, 2)]
    expected = [[rollout.step(1) for _ in range(3)] for rollout in alone]
    together = [pipe.rollout(generator=generator(seed), output_type="latent") for seed in (1, 2)]
    for index in range(3):
        for rollout, frames in zip(together, expected, strict=True):
            assert torch.equal(rollout.step(1), frames[index])


def test_progress_bar(capfd: pytest.CaptureFixture[str], pipe: FARVideoPipeline) -> None:
    call(pipe)
    assert capfd.readouterr().err == ""
    pipe.set_progress_bar_config(disable=False)
    call(pipe)
    shown = capfd.readouterr().err
    assert "frames" in shown and "4/4" in shown


def test_components_are_not_changed(pipe: FARVideoPipeline) -> None:
    before = pipe.scheduler.timesteps.clone()
    call(pipe, num_inference_steps=7)
    assert torch.equal(pipe.scheduler.timesteps, before)


@pytest.mark.parametrize("model", [transformer, long_transformer])
def test_group_offload(model: Any) -> None:
    pipe = pipeline(model(num_actions=4))
    expected = call(pipe, num_frames=6, output_type="pt")
    pipe.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    assert relative_error(call(pipe, num_frames=6, output_type="pt"), expected) <= TOLERANCE


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offload(method: str) -> None:
    pipe, noise = pipeline(long_transformer(num_actions=4)), latents(1, 7)
    expected = call(pipe, num_frames=7, latents=noise)
    getattr(pipe, method)()
    assert max_error(call(pipe, num_frames=7, latents=noise).cpu(), expected) <= 1e-3
    assert pipe.transformer.device.type in ("cpu", "meta")
    frames = pipe.frames_so_far("pil")
    assert isinstance(frames[0][0], Image.Image)


# ----------------------------------------------------------------------------------------------------
# Schedulers and seeds

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


def with_scheduler(scheduler: SchedulerMixin, **config: Any) -> FARVideoPipeline:
    pipe = pipeline(transformer(num_actions=4, **config))
    pipe.scheduler = scheduler
    return pipe


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_seed_gives_the_same_frames_by_call_stream_and_step(
    pipe: FARVideoPipeline, batch_size: int
) -> None:
    settings = {"batch_size": batch_size, "output_type": "latent"}
    called = pipe(num_frames=3, generator=generator(5), **settings).frames
    streamed = list(pipe.stream(num_new_frames=3, generator=generator(5), **settings))
    assert relative_error(torch.stack(streamed, dim=1), called) <= TOLERANCE
    rollout = pipe.rollout(generator=generator(5), **settings)
    stepped = torch.stack([rollout.step() for _ in range(3)], dim=1)
    assert relative_error(stepped, called) <= TOLERANCE
    each = [generator(5) for _ in range(batch_size)]  # one per video: the same video at any batch size
    alone = pipe(num_frames=3, generator=generator(5), output_type="latent").frames
    together = pipe(num_frames=3, generator=each, **settings).frames
    assert all(relative_error(video[None], alone) <= TOLERANCE for video in together)


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
        FlowMatchLCMScheduler(),
        DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", **FLOW),
    ],
    ids=["euler", "lcm", "dpm"],
)
def test_a_scheduler_that_draws_noise_draws_it_from_the_generator(scheduler: SchedulerMixin) -> None:
    pipe, made = with_scheduler(scheduler), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        made.append(pipe(num_frames=2, generator=generator(5), output_type="latent").frames)
    assert torch.equal(*made)
    changed = pipe(num_frames=2, generator=generator(6), output_type="latent").frames
    assert max_error(changed, made[0]) > 0.1


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchHeunDiscreteScheduler(),
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        UniPCMultistepScheduler(**FLOW),
        UniPCMultistepScheduler(use_dynamic_shifting=True, time_shift_type="exponential", **FLOW),
        DPMSolverMultistepScheduler(**FLOW),
        DPMSolverSinglestepScheduler(**FLOW),
        DEISMultistepScheduler(**FLOW),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_flow_matching_schedulers_come_to_the_same_frame(scheduler: SchedulerMixin) -> None:
    """With many steps all solvers follow the same path."""
    euler = with_scheduler(FlowMatchEulerDiscreteScheduler())
    arguments = {"num_frames": 2, "video_latents": latents(1, 1), "output_type": "latent"}
    expected = euler(num_inference_steps=160, generator=generator(), **arguments).frames[:, 1:]
    seen: list[tuple[int, int]] = []

    def count(pipe: FARVideoPipeline, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict:
        seen.append((step, pipe.num_timesteps))
        return tensors

    pipe = with_scheduler(scheduler)
    found = pipe(num_inference_steps=40, generator=generator(), callback_on_step_end=count, **arguments)
    assert relative_error(found.frames[:, 1:], expected) < 0.15  # a wrong one is off by 0.5 and more
    assert [step for step, _ in seen] == list(range(len(seen)))
    assert {number for _, number in seen} == {len(seen)}


@pytest.mark.parametrize(
    ("scheduler", "use_meanflow", "message"),
    [
        (DDIMScheduler(), False, "scheduler=DDIMScheduler is not set to flow matching"),
        (UniPCMultistepScheduler(), False, "scheduler=UniPCMultistepScheduler is not set"),
        (UniPCMultistepScheduler(**FLOW), True, "scheduler=UniPCMultistepScheduler with its own"),
        (FlowMatchHeunDiscreteScheduler(), True, "scheduler=FlowMatchHeunDiscreteScheduler with its own"),
        (
            FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
            True,
            "scheduler=FlowMatchEulerDiscreteScheduler with stochastic_sampling=True",
        ),
        (FlowMatchEulerDiscreteScheduler(num_train_timesteps=500), False, "num_train_timesteps=500"),
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), False, "invert_sigmas=True"),
    ],
)
def test_schedulers_that_do_not_fit_are_named(
    scheduler: SchedulerMixin, use_meanflow: bool, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        with_scheduler(scheduler, use_meanflow=use_meanflow).rollout()


# ----------------------------------------------------------------------------------------------------
# State of a call


def test_guidance_may_end_on_the_way() -> None:
    pipe = pipeline(transformer(num_classes=5))
    arguments = {"num_frames": 2, "class_labels": 3, "guidance_scale": 6.0, "output_type": "latent"}

    def end(pipe: FARVideoPipeline, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict:
        pipe._guidance_scale = 1.0
        return tensors

    guided = pipe(generator=generator(), **arguments).frames
    ended = pipe(generator=generator(), callback_on_step_end=end, **arguments).frames
    assert pipe.guidance_scale == 1.0
    assert max_error(ended, guided) > 1e-3
    plain = pipe(generator=generator(), **arguments | {"guidance_scale": 1.0}).frames
    assert max_error(ended, plain) > 1e-3  # the first step was guided


def test_guidance_cannot_begin_on_the_way() -> None:
    pipe = pipeline(transformer(num_classes=5))

    def begin(pipe: FARVideoPipeline, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict:
        pipe._guidance_scale = 2.0
        return tensors

    with pytest.raises(ValueError, match=r"guidance_scale=2\.0 was set in a call that began without"):
        pipe(num_frames=2, class_labels=3, callback_on_step_end=begin)


def test_a_second_call_at_once_is_refused(pipe: FARVideoPipeline) -> None:
    def call_again(inner: FARVideoPipeline, *_: Any) -> dict:
        with ThreadPoolExecutor(1) as pool, pytest.raises(RuntimeError, match="in a call already"):
            pool.submit(inner, num_frames=2).result()
        return {}

    expected = call(pipe, num_frames=2)
    assert torch.equal(call(pipe, num_frames=2, callback_on_step_end=call_again), expected)


def test_a_call_that_failed_is_over(pipe: FARVideoPipeline) -> None:
    with pytest.raises(ValueError, match="num_inference_steps"):
        pipe(num_inference_steps=0)
    assert call(pipe, num_frames=2).shape[1] == 2


@pytest.mark.parametrize(
    "arguments",
    [{"guidance_scale": -1}, {"actions": [9] * 4}, {"num_frames": 1}, {"generator": [generator()] * 3}],
)
def test_all_is_checked_before_the_autoencoder_runs(
    pipe: FARVideoPipeline, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipe.vae, "encode", lambda *_: pytest.fail("encoded"))
    with pytest.raises(ValueError, match=next(iter(arguments))):
        pipe(**{"video": torch.rand(2, 3, 64, 64), "num_frames": 4} | arguments)


def test_a_stream_is_checked_when_it_is_made(pipe: FARVideoPipeline) -> None:
    with pytest.raises(ValueError, match="num_inference_steps"):
        pipe.stream(num_inference_steps=0)
    with pytest.raises(ValueError, match="num_new_frames"):
        pipe.stream(num_new_frames=-1)


def test_noise_says_how_large_the_frames_are() -> None:
    pipe = pipeline(sample_size=None)
    assert pipe(num_frames=2, latents=latents(2, 2), output_type="pt").frames.shape == (2, 2, 3, 64, 64)


# ----------------------------------------------------------------------------------------------------
# Context


def test_a_checkpoint_knows_how_many_frames_it_was_trained_on(tmp_path: Path) -> None:
    pipeline(long_transformer(num_actions=4), num_training_frames=6).save_pretrained(tmp_path)
    pipe = FARVideoPipeline.from_pretrained(tmp_path)
    assert pipe.config.num_training_frames == 6
    rollout = pipe.rollout(video_latents=latents(1, 12))
    assert rollout.context.positions == (7, 8, 9, 10, 11)
    everything = pipe.rollout(video_latents=latents(1, 12), context_schedule=ContextSchedule.unbounded())
    assert everything.context.positions == tuple(range(12))
    with pytest.raises(ValueError, match="num_training_frames=0"):
        pipeline(num_training_frames=0)


def test_append_takes_videos_as_the_pipeline_does(pipe: FARVideoPipeline) -> None:
    video = torch.rand(5, 3, 64, 64, generator=generator())
    whole = pipe.rollout(video=video, generator=generator(), output_type="latent")
    parts = pipe.rollout(video=video[:2], generator=generator(), output_type="latent")
    parts.append(video[2:].movedim(1, -1).numpy())
    assert relative_error(parts.step(1), whole.step(1)) <= TOLERANCE
