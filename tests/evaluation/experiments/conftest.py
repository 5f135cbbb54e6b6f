"""What all experiments are tried on."""

from pathlib import Path

import pytest

from diffusers_far.training.options import ModelOptions
from evaluation.experiments import equal_time
from tests import tiny_latents, tiny_models


@pytest.fixture
def walks(tmp_path: Path) -> Path:
    return tiny_latents.write_walks(tmp_path / "latents")


@pytest.fixture
def autoencoder(tmp_path: Path) -> Path:
    """Of the walks."""
    tiny_models.autoencoder().save_pretrained(tmp_path / "autoencoder")
    return tmp_path / "autoencoder"


@pytest.fixture
def tiny_experiment(monkeypatch: pytest.MonkeyPatch) -> None:
    """New models are tiny, get 8 steps in 0.002 minutes, and learn enough in these to differ."""
    size = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16, "axes_dims_rope": [4, 6, 6]}
    monkeypatch.setattr(equal_time, "seconds_per_step", lambda trainings: [0.015] * len(trainings))
    monkeypatch.setitem(equal_time.SIZES, False, ModelOptions(patch_size=2, **size))
    for name in equal_time.NEW_MODEL:
        monkeypatch.setitem(equal_time.NEW_MODEL, name, 0.03)
