"""training/train_flow_map.py: what a noisy copy sees, what is learnt, and its use."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusers_far import FARTransformer3DModel
from diffusers_far.flow_matching import CLEAN_TIMESTEP, add_noise
from diffusers_far.kv_cache import Slot
from tests.tiny_models import TOLERANCE, generator, latents, long_transformer, relative_error
from training.data.latents import ClipBatch
from training.far_arguments import parse_arguments
from training.matmul_attn_processor import MatmulAttnProcessor
from training.train_far import Trainer
from training.train_flow_map import NUM_TEACHER_STEPS, FlowMapTrainer

WINDOW = 4


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos of 9 frames of noise, whose latents keep their sign from frame to frame."""
    folder = tmp_path_factory.mktemp("latents")
    for split in ("train", "validation"):
        (folder / split).mkdir()
        for index in range(4):
            video = latents(1, 1, seed=index)[0].sign() * latents(1, 9, seed=9 + index)[0].abs()
            actions = torch.randint(3, (9,), generator=generator())
            save_file({"latents": video.half(), "actions": actions}, folder / split / f"{index}.safetensors")
    return folder


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained")
    long_transformer(std=0.08, num_actions=3).save_pretrained(folder)
    return folder


def trainer(data: Path, pretrained: Path, output: Path, *more: str) -> FlowMapTrainer:
    run = ["--latents", str(data), "--output_dir", str(output), "--pretrained", str(pretrained)]
    run += ["--num_frames", "9", "--batch_size", "4", "--max_train_steps", "4", "--validation_steps", "0"]
    return FlowMapTrainer(*parse_arguments([*run, *more]))


@torch.no_grad()
@pytest.mark.parametrize("processor", [None, MatmulAttnProcessor()], ids=["sdpa", "matmul"])
def test_a_noisy_copy_sees_the_clean_frames_before_it_and_itself(
    processor: MatmulAttnProcessor | None,
) -> None:
    model = long_transformer(num_actions=3, use_meanflow=True)
    if processor is not None:
        model.set_attn_processor(processor)
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
    batch: ClipBatch,
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
        torch.cat([batch.latents[:, : num_frames - 1], frame[:, None]], dim=1),
        timestep,
        actions=batch.actions[:, :num_frames],
        timestep_r=None if end is None else timestep_r,
        num_long_frames=5,
    ).sample[:, -1]


@torch.no_grad()
def test_the_loss_is_the_distance_to_where_the_trained_model_comes(
    data: Path, pretrained: Path, tmp_path: Path
) -> None:
    run = trainer(data, pretrained, tmp_path)
    weights = torch.Generator().manual_seed(3)
    run.model.interval_embedder.linear_2.weight.data = 0.1 * torch.randn(32, 32, generator=weights)
    batch, losses = run.batches[0], []
    for index in range(WINDOW):
        start, end = batch.intervals[..., index]
        first = add_noise(batch.window_latents, batch.noise, batch.intervals[0])[:, index]
        predicted = last_velocity(run.model, batch, first, index, start, end)
        frame, step = first, (start - end) / NUM_TEACHER_STEPS
        for number in range(NUM_TEACHER_STEPS):
            velocity = last_velocity(run.teacher, batch, frame, index, start - number * step, None)
            frame = frame - step[:, None, None, None] * velocity
        target = (first - frame) / (start - end)[:, None, None, None]
        losses.append((predicted - target).square().mean())
    assert run.loss(batch).item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)


def test_one_step_comes_to_do_what_thirty_do(tmp_path: Path) -> None:
    """Of frames that are one picture or its negative, an instant's velocity says nothing about which."""
    picture = latents(1, 1)[0, :, :2, :4, :4]
    for split in ("train", "validation"):
        (tmp_path / "data" / split).mkdir(parents=True)
        for sign in (-1, 1):
            file = tmp_path / "data" / split / f"{sign}.safetensors"
            save_file({"latents": (sign * picture).expand(4, -1, -1, -1).half().contiguous()}, file)

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
    Trainer(*parse_arguments(first)).train()
    second = [*run, "--output_dir", str(tmp_path / "second"), "--pretrained", str(tmp_path / "first/ema")]
    FlowMapTrainer(*parse_arguments([*second, "--max_train_steps", "400"])).train()
    instant, mean = (
        FARTransformer3DModel.from_pretrained(tmp_path / name / "ema") for name in ("first", "second")
    )
    assert distance(instant, 30) < 0.05
    assert distance(mean, 30) < 0.05
    assert distance(mean, 1) < 0.65 * distance(instant, 1)


def test_a_resumed_run_equals_an_unbroken_one(data: Path, pretrained: Path, tmp_path: Path) -> None:
    unbroken, resumed = tmp_path / "unbroken", tmp_path / "resumed"
    trainer(data, pretrained, unbroken, "--save_steps", "2", "--own_context_probability", "0.5").train()
    shutil.copytree(unbroken / "checkpoint-0000002", resumed / "checkpoint-0000002")
    again = ["--own_context_probability", "0.5", "--resume_from", "latest"]
    trainer(data, pretrained, resumed, "--save_steps", "2", *again).train()
    name = "ema/diffusion_pytorch_model.safetensors"
    expected, got = load_file(unbroken / name), load_file(resumed / name)
    assert all(torch.equal(expected[key], got[key]) for key in expected)


def test_it_takes_a_trained_model(data: Path, tmp_path: Path) -> None:
    options = ["--latents", str(data), "--output_dir", str(tmp_path), "--max_train_steps", "1"]
    with pytest.raises(ValueError, match="pretrained=None: it takes the folder of a trained model"):
        FlowMapTrainer(*parse_arguments(options))


def test_the_shipped_recipe_is_valid(repository: Path) -> None:
    _, arguments = parse_arguments([str(repository / "training/recipes/far_doom_maze_any_step.yaml")])
    assert arguments.pretrained is not None
