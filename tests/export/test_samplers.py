"""The weights that stand for a scheduler in an export, against the scheduler."""

from typing import Any

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)

from diffusers_far.export.onnx_export import sampler_weights
from diffusers_far.flow_matching import set_timesteps
from tests import tiny_models as tm

FLOW: dict[str, Any] = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


@pytest.mark.parametrize("number", [1, 2, 5, 20])
@pytest.mark.parametrize(
    ("scheduler", "any_step"),
    [
        (FlowMatchEulerDiscreteScheduler(shift=3.0), False),
        (FlowMatchEulerDiscreteScheduler(), True),
        (FlowMatchHeunDiscreteScheduler(), False),
        (UniPCMultistepScheduler(**FLOW), False),
        (UniPCMultistepScheduler(solver_order=3, **FLOW), False),
    ],
    ids=["euler-shift", "any-step", "heun", "unipc-2", "unipc-3"],
)
def test_latents_are_the_schedulers(scheduler: SchedulerMixin, any_step: bool, number: int) -> None:
    sampler = sampler_weights(scheduler, number, num_tokens=64, any_step=any_step)
    set_timesteps(scheduler, number, torch.device("cpu"), 64, any_step)
    latents = tm.noise(1, 1, 4, 8, 8, seed=0)
    known = [latents]
    assert sampler["timesteps"] == scheduler.timesteps.tolist()
    assert sampler["ends"] == [*sampler["timesteps"][1:], 0]
    for index, level in enumerate(scheduler.timesteps):
        known.append(tm.noise(1, 1, 4, 8, 8, seed=index + 1))
        latents = scheduler.step(known[-1], level, latents, return_dict=False)[0]
        weights = sampler["weights"][index]
        found = sum(weight * value for weight, value in zip(weights, known, strict=True))
        assert tm.relative_error(found, latents) < tm.TOLERANCE
