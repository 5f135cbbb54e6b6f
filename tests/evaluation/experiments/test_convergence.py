"""The experiment on three ways to learn video, with tiny models and walks."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from diffusers_far.tokens import patchify
from diffusers_far.training.clips import Clips, LatentVideos
from evaluation.experiments import convergence, equal_time
from evaluation.experiments.convergence import Codebook
from tests import tiny_models

OBSERVED, PREDICTED, CODES = 2, 3, 6


class Means(nn.Module):
    """Features of videos as cheap as can be."""

    def forward(self, videos: Tensor) -> Tensor:
        return videos.mean(dim=(1, 3, 4))


@pytest.fixture(autouse=True)
def short_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convergence, "seconds_per_step", lambda trainings: [0.1])  # 6 steps
    sizes = {"OBSERVED": OBSERVED, "PREDICTED": PREDICTED, "CODES": CODES, "STEPS": 2}
    monkeypatch.setattr(equal_time, "I3D", Means)
    for name, value in sizes.items():
        monkeypatch.setattr(convergence, name, value)


@pytest.mark.filterwarnings("ignore:.*resume")
@pytest.mark.usefixtures("tiny_experiment")
def test_all_three_learn_for_as_many_operations(
    walks: Path, autoencoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "output"
    arguments = [str(walks), "--autoencoder", str(autoencoder), "--output", str(output), "--minutes", "0.01"]
    arguments += ["--clips", "4", "--marks", "2", "--batch-size", "2", "--measured-at-once", "3"]
    arguments += ["--mixed-precision", "no", "--plot", str(tmp_path / "plot.png")]
    monkeypatch.setattr(sys, "argv", ["convergence", *arguments])
    convergence.main()

    results = json.loads((output / "results.json").read_text())
    rows = results["rows"]
    assert [row["kind"] for row in rows] == ["FAR"] * 2 + ["bidirectional"] * 2 + ["tokens"] * 2 + ["codes"]
    for early, late in zip(rows[:6:2], rows[1:6:2], strict=True):
        assert late["steps"] == 2 * early["steps"]
        per_step = results["plan"][late["kind"]]["flops_per_step"]
        assert late["petaflops"] == pytest.approx(late["steps"] * per_step / 1e15)
        # To the last two steps, since steps are a multiple of the marks.
        assert abs(late["petaflops"] - rows[1]["petaflops"]) <= 2 * per_step / 1e15
        assert early["psnr"]["mean"] != late["psnr"]["mean"]
    text = (output / "results.md").read_text()
    assert text.count("\n") == len(rows) + 2 and "| codes | - | - |" in text
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")

    monkeypatch.setattr(convergence, "Trainer", None)  # not made again
    monkeypatch.setattr(convergence, "make_model", None)
    convergence.main()
    assert json.loads((output / "results.json").read_text())["rows"] == rows


def test_bidirectional_frames_see_later_ones() -> None:
    model = tiny_models.transformer(num_actions=3)
    frames, timestep = tiny_models.latents(1, 4), torch.full((1, 4), 300.0)
    changed = torch.cat([frames[:, :3], frames[:, 3:] + 1], dim=1)
    for processor, sees in (
        (convergence.BiasAttnProcessor(), False),
        (convergence.FullAttnProcessor(), True),
    ):
        model.set_attn_processor(processor)
        first, other = (model(video, timestep).sample[:, 0] for video in (frames, changed))
        assert (tiny_models.relative_error(first, other) > 0.001) is sees


def test_observed_frames_of_the_bidirectional_model_are_clean_and_have_no_loss() -> None:
    seen = {}

    class Model(nn.Module):
        def forward(self, hidden_states: Tensor, timestep: Tensor, **conditions: Tensor) -> object:
            seen["frames"], seen["timestep"] = hidden_states, timestep
            return type("Output", (), {"sample": torch.zeros_like(hidden_states)})()

    clips = Clips(tiny_models.latents(3, OBSERVED + PREDICTED), OBSERVED + PREDICTED, None, None, ())
    convergence.JointFlowMatching(Model()).loss(clips, tiny_models.generator())
    torch.testing.assert_close(seen["frames"][:, :OBSERVED], clips.latents[:, :OBSERVED])
    assert (seen["timestep"][:, :OBSERVED] == -1).all()
    levels = seen["timestep"][:, OBSERVED:]
    assert (levels > 0).all() and (levels == levels[:, :1]).all() and len(levels[:, 0].unique()) > 1


def codes_model() -> tuple[nn.Module, Codebook]:
    model = convergence.give_codes(tiny_models.transformer(num_actions=3, patch_size=4))
    nn.init.normal_(model.proj_out.weight, generator=tiny_models.generator(4))
    size = tiny_models.CHANNELS * 16
    return model.eval(), Codebook(tiny_models.noise(CODES, size, seed=2), 4)


def test_codes_come_back_as_frames_and_the_nearest_is_taken() -> None:
    _, codebook = codes_model()
    codes = torch.randint(CODES, (2, 3, 4), generator=tiny_models.generator())
    frames = codebook.decode(codes, tiny_models.GRID, tiny_models.GRID)
    assert torch.equal(codebook.encode(frames + 0.01), codes)
    assert torch.equal(patchify(frames, 4), codebook.codes[codes])


@torch.no_grad()
def test_a_code_is_told_from_those_before_it_alone_and_one_by_one_as_all_at_once() -> None:
    model, _ = codes_model()
    codes = torch.randint(CODES, (2, 3, 4), generator=tiny_models.generator())
    actions = torch.randint(3, (2, 3), generator=tiny_models.generator(1))
    logits = convergence.code_logits(model, convergence.shifted(codes), actions, 0, (2, 2))
    changed = codes.clone()
    changed[:, 1, 2] = (changed[:, 1, 2] + 1) % CODES
    others = convergence.code_logits(model, convergence.shifted(changed), actions, 0, (2, 2))
    same = (logits.flatten(1, 2) - others.flatten(1, 2)).abs().amax(dim=(0, 2)) < 1e-5
    assert same.tolist() == [True] * 7 + [False] * 5  # the code after the changed one is the first to know

    caches = [convergence.KeptTokens() for _ in model.transformer_blocks]
    first = convergence.code_logits(
        model, convergence.shifted(codes)[:, :1], actions[:, :1], 0, (2, 2), caches
    )
    found = [first.flatten(1, 2)]
    for number in range(4, 12):
        before, frame = codes.flatten(1)[:, number - 1, None, None], slice(number // 4, number // 4 + 1)
        found.append(
            convergence.code_logits(model, before, actions[:, frame], number, (2, 2), caches).flatten(1, 2)
        )
    assert tiny_models.relative_error(torch.cat(found, dim=1), logits.flatten(1, 2)) <= tiny_models.TOLERANCE


def test_predicted_codes_are_drawn_as_the_model_says() -> None:
    """A model that is sure of a code says it, whatever came before."""
    model, codebook = codes_model()
    nn.init.zeros_(model.proj_out.weight)
    with torch.no_grad():
        model.proj_out.bias[4] = 100.0
    sources = [tiny_models.generator(seed) for seed in range(2)]
    context, actions = (
        tiny_models.latents(2, OBSERVED),
        torch.zeros(2, OBSERVED + PREDICTED, dtype=torch.long),
    )
    made = convergence.predict_codes(model, codebook, context, actions, sources)
    assert made.shape == (2, PREDICTED, *context.shape[2:])
    assert (codebook.encode(made) == 4).all()


def test_k_means_finds_codes_of_the_frames(walks: Path) -> None:
    codes = convergence.find_codes(LatentVideos(walks / "train"), 4)
    assert codes.shape == (CODES, tiny_models.CHANNELS * 16)
    codebook, frames = Codebook(codes, 4), LatentVideos(walks / "train").clip(0, 0, 5)[None]
    back = codebook.decode(codebook.encode(frames), tiny_models.GRID, tiny_models.GRID)
    assert (back - frames).square().mean() < frames.square().mean()
