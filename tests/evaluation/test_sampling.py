"""evaluation/sampling.py: the solvers of diffusers take FAR's velocities for what they are."""

import pytest
import torch

from diffusers_far import FARVideoPipeline
from evaluation import sampling
from tests.tiny_models import latents, long_transformer, max_error, noise, pipeline


@pytest.fixture(scope="module")
def pipe() -> FARVideoPipeline:
    return pipeline(long_transformer(std=0.1))


def sample(pipe: FARVideoPipeline, solver: str, num_steps: int) -> torch.Tensor:
    pipe.scheduler = sampling.SOLVERS[solver](1.0)
    frames = {"video_latents": latents(1, 3), "num_frames": 4, "latents": noise(1, 1, 4, 8, 8)}
    return pipe(**frames, num_inference_steps=num_steps, output_type="latent").frames[:, -1]


@pytest.mark.parametrize("solver", sampling.SOLVERS)
def test_all_solvers_come_to_the_same_frame(pipe: FARVideoPipeline, solver: str) -> None:
    exact = sample(pipe, "Euler", 400)
    assert max_error(sample(pipe, solver, 40), exact) < 0.1 * max_error(noise(1, 1, 4, 8, 8)[:, 0], exact)
