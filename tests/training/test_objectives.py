"""training/objectives.py: what the model is given, what a noisy copy sees, and what is learnt."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from diffusers_far import FARTransformer3DModel
from diffusers_far.flow_matching import CLEAN_TIMESTEP, add_noise, sample_flow_map_steps
from diffusers_far.kv_cache import Slot
from diffusers_far.training.clips import Clips
from diffusers_far.training.matmul_attn_processor import MatmulAttnProcessor
from diffusers_far.training.objectives import NUM_TEACHER_STEPS, FlowMap, FlowMatching, draw_noise
from diffusers_far.training.options import FAROptions, ModelOptions, parse
from diffusers_far.training.train_far import FARTrainer
from tests.tiny_models import TOLERANCE, generator, latents, long_transformer, relative_error, transformer

WINDOW = 4


def make_clips(num_frames: int = 9, batch_size: int = 4) -> Clips:
    actions = torch.randint(3, (batch_size, num_frames), generator=generator())
    names = ("somewhere",) * batch_size
    return Clips(latents(batch_size, num_frames), min(WINDOW, num_frames), actions, None, names)


class Recorder(nn.Module):
    """Notes what a model is called with; its velocity is `scale` times the latents of the window."""

    def __init__(self, scale: float = 0.0) -> None:
        super().__init__()
        self.scale = scale
        self.calls: list[tuple[Tensor, Tensor]] = []

    def forward(self, hidden_states: Tensor, timestep: Tensor, **conditions: Tensor) -> "Recorder":
        self.calls.append((hidden_states, timestep))
        self.sample = self.scale * hidden_states[:, -WINDOW:]
        return self


# ----------------------------------------------------------------------------------------------------
# Flow matching


def test_what_the_model_is_given() -> None:
    """Frames before the window and some of the window as they are; the others noisy, as the timestep says."""
    clips, model = make_clips(batch_size=16), Recorder()
    FlowMatching(model, clean_context_probability=0.5).loss(clips, generator(3))
    noise, sigmas = draw_noise(clips, generator(3))
    ((hidden_states, timestep),) = model.calls
    assert torch.equal(hidden_states[:, :5], clips.before) and (timestep[:, :5] == CLEAN_TIMESTEP).all()
    clean = timestep[:, 5:] == CLEAN_TIMESTEP
    assert 0.3 < clean.float().mean() < 0.7 and not clean.all(dim=1).any()
    assert torch.equal(hidden_states[:, 5:][clean], clips.target[clean])
    share = sigmas[..., None, None, None]
    expected = share * noise + (1 - share) * clips.target
    assert torch.equal(hidden_states[:, 5:][~clean], expected[~clean])
    assert torch.equal(timestep[:, 5:][~clean], 1000 * sigmas[~clean])


def test_the_loss_is_that_of_noisy_frames_only() -> None:
    clips = make_clips(batch_size=8)
    noise, _ = draw_noise(clips, generator(3))
    model = Recorder()
    loss = FlowMatching(model, clean_context_probability=0.5).loss(clips, generator(3))
    noisy = model.calls[0][1][:, -WINDOW:] != CLEAN_TIMESTEP
    errors = (noise - clips.target).square().mean(dim=(2, 3, 4))
    videos = [video[kept].mean() for video, kept in zip(errors, noisy, strict=True)]
    assert loss.item() == pytest.approx(torch.stack(videos).mean().item(), rel=1e-5)


def test_own_frames_stand_in_for_clean_ones() -> None:
    """The first call sees the whole window noisy; the second gets its estimates where frames are clean."""
    clips, model = make_clips(batch_size=16), Recorder(scale=0.5)
    FlowMatching(model, 0.5, own_context_probability=0.999999).loss(clips, generator(3))
    _, sigmas = draw_noise(clips, generator(3))
    (noisy, all_noisy), (given, timestep) = model.calls
    assert (all_noisy[:, 5:] != CLEAN_TIMESTEP).all()
    window = noisy[:, 5:]
    estimates = window - sigmas[..., None, None, None] * 0.5 * window
    clean = timestep[:, 5:] == CLEAN_TIMESTEP
    assert clean.any() and torch.equal(given[:, 5:][clean], estimates[clean])
    assert torch.equal(given[:, 5:][~clean], window[~clean])
    assert torch.equal(given[:, :5], clips.before)


def test_shares_of_own_frames_and_of_noisy_windows() -> None:
    """A noisy window has one level, no clean frame, and nothing of the model's own to put in."""
    clips, own, noisy = make_clips(batch_size=2), 0, 0
    for seed in range(400):
        model = Recorder()
        FlowMatching(model, 0.5, 0.4, noisy_window_probability=0.3).loss(clips, generator(seed))
        timestep = model.calls[-1][1][:, 5:]
        own += len(model.calls) == 2
        if (timestep == timestep[:, :1]).all() and (timestep != CLEAN_TIMESTEP).all():
            noisy += 1
            assert len(model.calls) == 1
    assert noisy / 400 == pytest.approx(0.3, abs=0.07)
    assert own / 400 == pytest.approx(0.4 * 0.7, abs=0.07)


def test_a_base_model_learns_from_every_frame() -> None:
    model = transformer(num_actions=3)
    loss = FlowMatching(model).loss(make_clips(num_frames=4), generator(3))
    loss.backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in model.parameters())


# ----------------------------------------------------------------------------------------------------
# Flow maps


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "matmul"])
def test_a_noisy_copy_sees_the_clean_frames_before_it_and_itself(attention: str) -> None:
    model = long_transformer(num_actions=3, use_meanflow=True)
    if attention == "matmul":
        model.set_attn_processor(MatmulAttnProcessor())
    clean, noisy = latents(2, 9), latents(2, WINDOW, seed=4)
    actions = torch.randint(3, (2, 9), generator=generator())
    start = torch.rand(2, WINDOW, generator=generator()) * 1000
    end = start / 3
    cache = model.create_cache(2, 8, 8)
    model(clean, torch.full((2, 9), CLEAN_TIMESTEP), actions=actions, cache=cache, num_long_frames=5)
    cache.commit([Slot(frame, frame < 5, frame) for frame in range(9)])
    positions, copied = torch.arange(5, 9), actions[:, 5:]
    together = model(
        noisy, start, actions=copied, cache=cache, frame_positions=positions, timestep_r=end
    ).sample
    for index in range(WINDOW):
        num_frames = 6 + index
        frames = torch.cat([clean[:, : num_frames - 1], noisy[:, index : index + 1]], dim=1)
        timestep, timestep_r = (torch.full((2, num_frames), CLEAN_TIMESTEP) for _ in range(2))
        timestep[:, -1], timestep_r[:, -1] = start[:, index], end[:, index]
        alone = model(
            frames, timestep, actions=actions[:, :num_frames], timestep_r=timestep_r, num_long_frames=5
        ).sample[:, -1]
        assert relative_error(together[:, index], alone) <= TOLERANCE


def last_velocity(
    model: FARTransformer3DModel,
    clips: Clips,
    frame: Tensor,
    index: int,
    start: Tensor,
    end: Tensor | None,
) -> Tensor:
    """`[B, C, H, W]` of one noisy frame of the window after clean ones, without a cache."""
    num_frames = 6 + index
    timestep, timestep_r = (torch.full((len(frame), num_frames), CLEAN_TIMESTEP) for _ in range(2))
    timestep[:, -1], timestep_r[:, -1] = 1000 * start, 0 if end is None else 1000 * end
    return model(
        torch.cat([clips.latents[:, : num_frames - 1], frame[:, None]], dim=1),
        timestep,
        actions=clips.actions[:, :num_frames],
        timestep_r=None if end is None else timestep_r,
        num_long_frames=5,
    ).sample[:, -1]


@torch.no_grad()
@pytest.mark.parametrize("own_context", [False, True])
def test_the_loss_is_the_distance_to_where_the_trained_model_comes(own_context: bool) -> None:
    teacher = long_transformer(std=0.08, num_actions=3)
    model = FARTransformer3DModel.from_config(teacher.config, use_meanflow=True)
    model.load_state_dict(teacher.state_dict(), strict=False)
    model.interval_embedder.linear_2.weight.data = 0.1 * torch.randn(32, 32, generator=generator(3))
    clips = make_clips()
    found = FlowMap(model, teacher, 0.999999 if own_context else 0.0).loss(clips, generator(5))

    draws = generator(5)
    noise, sigmas = draw_noise(clips, draws)
    steps = sample_flow_map_steps((4, WINDOW), generator=draws)
    given = clips
    if own_context:
        timestep = torch.cat([torch.full((4, 5), CLEAN_TIMESTEP), 1000 * sigmas], dim=1)
        noisy = add_noise(clips.target, noise, sigmas)
        frames = torch.cat([clips.before, noisy], dim=1)
        velocity = teacher(frames, timestep, actions=clips.actions).sample
        own = noisy - sigmas[..., None, None, None] * velocity
        given = Clips(torch.cat([clips.before, own], dim=1), WINDOW, clips.actions, None, clips.sources)
    losses = []
    for index in range(WINDOW):
        start, end = steps[..., index]
        first = add_noise(clips.target, noise, steps[0])[:, index]
        predicted = last_velocity(model, given, first, index, start, end)
        frame, step = first, (start - end) / NUM_TEACHER_STEPS
        for number in range(NUM_TEACHER_STEPS):
            velocity = last_velocity(teacher, given, frame, index, start - number * step, None)
            frame = frame - step[:, None, None, None] * velocity
        target = (first - frame) / (start - end)[:, None, None, None]
        losses.append((predicted - target).square().mean())
    assert found.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)


def test_one_step_comes_to_do_what_thirty_do(tmp_path: Path) -> None:
    """Of frames that are one picture or its negative, an instant's velocity says nothing about which."""
    picture = latents(1, 1)[0, :, :2, :4, :4]
    for split in ("train", "validation"):
        (tmp_path / "data" / split).mkdir(parents=True)
        for sign in (-1, 1):
            file = tmp_path / "data" / split / f"{sign}.safetensors"
            save_file({"latents": (sign * picture).expand(4, -1, -1, -1).half().contiguous()}, file)

    def train(command: list[str]) -> None:
        FARTrainer(*parse(command, (ModelOptions, FAROptions), None)).train()

    def distance(model: FARTransformer3DModel, num_steps: int) -> float:
        """Of first frames, made in so many steps, to the nearer picture; 1 is that of gray."""
        frame = latents(16, 1, seed=7)[:, :, :2, :4, :4]
        for index in range(num_steps):
            start, end = (torch.full((16, 1), 1000 * (1 - (index + i) / num_steps)) for i in range(2))
            with torch.no_grad():
                timestep_r = end if model.config.use_meanflow else None
                frame = frame - model(frame, start, timestep_r=timestep_r).sample / num_steps
        errors = torch.stack([(frame - sign * picture).square().mean(dim=(1, 2, 3, 4)) for sign in (-1, 1)])
        return (errors.amin(dim=0).mean() / picture.square().mean()).item()

    size = ["--num_layers", "2", "--num_attention_heads", "4", "--attention_head_dim", "16"]
    size += ["--axes_dims_rope", "4", "6", "6", "--patch_size", "2"]
    run = [
        "--latents",
        str(tmp_path / "data"),
        "--num_frames",
        "4",
        "--batch_size",
        "16",
        "--patch_size",
        "4",
    ]
    run += [
        "--learning_rate",
        "3e-3",
        "--ema_decay",
        "0.99",
        "--lr_scheduler",
        "cosine",
        "--logging_steps",
        "500",
        "--validation_steps",
        "0",
    ]
    first = [*size, *run, "--output_dir", str(tmp_path / "first"), "--max_train_steps", "600"]
    train(first)
    second = [*run, "--output_dir", str(tmp_path / "second"), "--pretrained", str(tmp_path / "first/ema")]
    second += ["--objective", "flow_map", "--attention", "matmul"]
    train([*second, "--max_train_steps", "400"])
    instant, mean = (
        FARTransformer3DModel.from_pretrained(tmp_path / name / "ema") for name in ("first", "second")
    )
    assert distance(instant, 30) < 0.05
    assert distance(mean, 30) < 0.05
    assert distance(mean, 1) < 0.65 * distance(instant, 1)
