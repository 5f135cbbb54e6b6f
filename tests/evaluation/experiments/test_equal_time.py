"""How long the models of an experiment are trained."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from diffusers_far.training.options import FAROptions
from evaluation.experiments import equal_time
from evaluation.experiments.equal_time import Training


def test_models_take_steps_in_turn_and_get_equal_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, taken = [0.0], []
    costs = {"slow": 2.0, "fast": 0.5}

    def training(name: str, **options: Any) -> Training:
        def make(options: FAROptions) -> Any:
            def step(index: int) -> None:
                taken.append((index, name))
                clock[0] += costs[name] + (100 if index == 0 else 0)  # the first one warms up

            accelerator = SimpleNamespace(device=torch.device("cpu"))
            return SimpleNamespace(step=step, run=SimpleNamespace(accelerator=accelerator))

        values = {"latents": "", "output_dir": str(tmp_path / name), "max_train_steps": 1, **options}
        return Training(make, FAROptions(**values))

    monkeypatch.setattr(equal_time, "now", lambda device: clock[0])
    slow, fast = training("slow"), training("fast", gradient_accumulation_steps=2)
    equal_time.plan_steps([slow, fast], minutes=1)
    assert taken == [(i, name) for i in range(equal_time.CALIBRATION_STEPS) for name in ("slow", "fast")]
    assert json.loads(slow.plan.read_text()) == {"steps": 30, "seconds_per_step": 2.0}
    assert json.loads(fast.plan.read_text()) == {"steps": 60, "seconds_per_step": 1.0}
    equal_time.plan_steps([slow, fast], minutes=5)  # a plan stays
    assert json.loads(slow.plan.read_text())["steps"] == 30
