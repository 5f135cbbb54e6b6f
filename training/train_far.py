"""Train FAR on encoded videos, with the published objective (section 3 of the paper).

    python training/train_far.py training/recipes/far_doom_maze.yaml --latents LATENTS --output_dir OUTPUT
    accelerate launch training/train_far.py RECIPE.yaml ...            # several processes

A recipe is a YAML file of the options below; options on the command line win. OUTPUT gets `ema/` (averaged
weights, as `FARTransformer3DModel.from_pretrained` reads them), `log.jsonl`, and `checkpoint-<step>/` to
go on from with `--resume_from latest`. Clips, noise and timesteps of a step depend on the seed and the step
only, so a run of `--max_train_steps` that was interrupted ends with the weights of one that was not, bit for
bit.
"""

import json
import math
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import get_wsd_schedule

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout: this file is run as a script

from diffusers_far.flow_matching import frame_loss, velocity_target
from diffusers_far.transformer_far import FARTransformer3DModel
from evaluation.memory_loss import memory_loss
from training.data.latents import ClipBatch, ClipBatches, LatentVideos
from training.far_arguments import ModelArguments, TrainingArguments, parse_arguments
from training.matmul_attn_processor import MatmulAttnProcessor

MEMORY_VIDEOS, MEMORY_FRAMES = 16, 96  # held-out videos, and first frames of them, for `memory_loss`


class RunClock:
    """Where a run stands: steps and seconds of training, those before a resume included.

    The learning rate follows the share of the run that is over, in steps or in time, whichever is greater.
    """

    SCHEDULE_LENGTH = 1_000_000  # of the whole run, in the units of `get_scheduler`

    def __init__(self, args: TrainingArguments, optimizer: torch.optim.Optimizer) -> None:
        self.step = 0
        self.seconds = 0.0
        self._started = time.monotonic()
        self._max_steps = args.max_train_steps or math.inf
        self._max_seconds = (args.max_minutes or math.inf) * 60
        length = self.SCHEDULE_LENGTH
        warmup, decay = int(args.warmup_ratio * length), int(args.decay_ratio * length)
        if args.lr_scheduler == "warmup_stable_decay":
            schedule = get_wsd_schedule(optimizer, warmup, decay, length, decay_type="linear")
        else:
            schedule = get_scheduler(args.lr_scheduler, optimizer, None, warmup, length)
        self._scale_at = schedule.lr_lambdas[0]

    def start(self) -> None:
        """Count the seconds from now on."""
        self._started = time.monotonic()

    def tick(self) -> None:
        """Bring `seconds` up to date."""
        now = time.monotonic()
        self.seconds += now - self._started
        self._started = now

    @property
    def over(self) -> bool:
        return self.step >= self._max_steps or self.seconds >= self._max_seconds

    @property
    def learning_rate_share(self) -> float:
        """Learning rate of the step that comes next, as a share of the highest one."""
        # From the middle of a step, so that neither the first nor the last has a rate of zero.
        share = max((self.step + 0.5) / self._max_steps, self.seconds / self._max_seconds)
        return float(self._scale_at(share * self.SCHEDULE_LENGTH))

    # The two methods that accelerate asks of what goes into a checkpoint.

    def state_dict(self) -> dict[str, float]:
        return {"step": self.step, "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.step, self.seconds = int(state["step"]), state["seconds"]


class Trainer:
    """One run: the model, what trains it, and where it is kept."""

    def __init__(self, model_args: ModelArguments, args: TrainingArguments) -> None:
        self.args = args
        self.output_dir = Path(args.output_dir)
        self.accelerator = Accelerator(
            mixed_precision=args.mixed_precision,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            log_with=args.report_to,
            project_dir=args.output_dir,
            # The weights of long-term tokens have no part in a clip as short as the window.
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
        set_seed(args.seed)
        videos = LatentVideos(Path(args.latents) / "train")
        channels = videos.frame_shape[0]
        model = self.create_model(model_args, channels)
        config = model.config
        if config.in_channels != channels:
            raise ValueError(
                f"pretrained={args.pretrained!r} takes {config.in_channels} channels; "
                f"{args.latents} has {channels}"
            )
        self.uses_actions, self.uses_labels = bool(config.num_actions), bool(config.num_classes)
        if self.uses_actions and not videos.has_actions:
            raise ValueError(f"num_actions={config.num_actions}: {args.latents} has no actions")
        if self.uses_labels and not videos.has_labels:
            raise ValueError(f"num_classes={config.num_classes}: {args.latents} has no class labels")
        self.batches = ClipBatches(
            videos,
            args.batch_size,
            args.num_frames,
            model.short_window,
            args.clean_context_probability,
            args.condition_dropout,
            args.own_context_probability,
            args.seed,
            self.accelerator.process_index,
            args.length_distribution,
            args.noisy_window_probability,
            args.revisit_probability,
        )
        decay, power = args.ema_decay, args.ema_power
        self.ema = EMAModel(model.parameters(), decay, use_ema_warmup=True, power=power, foreach=True)
        if args.compile:
            model.compile_repeated_blocks(dynamic=True)
        optimizers = create_optimizers(model, args)
        self.clock = RunClock(args, optimizers[0])
        self.model, *self.optimizers = self.accelerator.prepare(model, *optimizers)
        self.ema.to(self.accelerator.device)
        self.accelerator.register_for_checkpointing(self.ema, self.clock)
        self.validation_sets = self._validation_sets() if args.validation_steps else {}
        self.stop_requested = False
        if self.accelerator.is_main_process:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            arguments = {**asdict(model_args), **asdict(args)}
            (self.output_dir / "arguments.json").write_text(json.dumps(arguments, indent=2) + "\n")
        if args.report_to:
            config = {name: value for name, value in asdict(args).items() if value is not None}
            self.accelerator.init_trackers("far", config=config)

    def create_model(self, model_args: ModelArguments, in_channels: int) -> FARTransformer3DModel:
        """The model as training begins."""
        if self.args.pretrained:
            model = FARTransformer3DModel.from_pretrained(self.args.pretrained)
        else:
            model = FARTransformer3DModel(in_channels=in_channels, **asdict(model_args))
        if self.args.attention == "matmul":
            model.set_attn_processor(MatmulAttnProcessor())
        return model

    # --------------------------------------------------------------------------------------------------------
    # Training

    def train(self) -> None:
        """From the first step, or the checkpoint to resume from, to the end."""
        args, clock = self.args, self.clock
        if args.resume_from:
            self.load_checkpoint(args.resume_from)
        signal.signal(signal.SIGTERM, self._request_stop)
        remaining = range(clock.step * args.gradient_accumulation_steps, 2**62)
        workers = args.dataloader_workers
        batches = iter(DataLoader(self.batches, batch_size=None, sampler=remaining, num_workers=workers))
        losses, frames, busy = [], 0, 0.0
        saved_at = clock.seconds
        clock.start()
        while not clock.over and not self.stop_requested:
            started = clock.seconds
            loss, grad_norm, num_frames = self.train_step(batches)
            clock.step += 1
            self._tick()
            losses.append(loss)
            frames += num_frames
            busy += clock.seconds - started

            if clock.step % args.logging_steps == 0 or clock.over:
                self.log(loss=sum(losses) / len(losses), grad_norm=grad_norm, frames_per_second=frames / busy)
                losses, frames, busy = [], 0, 0.0
            if args.validation_steps and (clock.step % args.validation_steps == 0 or clock.over):
                self.log(**self.validate())
            due = clock.seconds - saved_at >= args.save_minutes * 60
            if clock.step % args.save_steps == 0 if args.save_steps else due:
                self.save()
                saved_at = clock.seconds
            self._tick()
        self.save()
        self.accelerator.end_training()

    def train_step(self, batches: Iterator[ClipBatch]) -> tuple[float, float, int]:
        """One optimizer step: loss, norm of the gradient, and frames of the windows, over all processes."""
        accelerator, num_forwards = self.accelerator, self.args.gradient_accumulation_steps
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["lr"] = optimizer.defaults["lr"] * self.clock.learning_rate_share
        mean_loss, num_frames = 0.0, 0
        for _ in range(num_forwards):
            batch = next(batches).to(accelerator.device)
            with accelerator.accumulate(self.model):
                loss = self.loss(batch)
                mean_loss += accelerator.reduce(loss.detach(), "mean").item() / num_forwards
                self._require_finite("loss", mean_loss)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm)
                    grad_norm = float(norm)
                    if accelerator.mixed_precision != "fp16":  # whose scaler leaves out such a step
                        self._require_finite("norm of the gradient", grad_norm)
                for optimizer in self.optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
            num_frames += batch.clean.numel() * accelerator.num_processes
        self.ema.step(self.model.parameters())
        return mean_loss, grad_norm, num_frames

    def _require_finite(self, name: str, value: float) -> None:
        """Stop before a step that would spoil the weights."""
        if not math.isfinite(value):
            last = next(reversed(self._checkpoints()), "none")
            raise FloatingPointError(f"step {self.clock.step}: {name} is {value}; last checkpoint: {last}")

    def loss(self, batch: ClipBatch) -> Tensor:
        """Squared error of the velocity of the window's noisy frames."""
        _, prediction = self.predict(self.model, self.with_own_context(self.model, batch))
        return frame_loss(prediction, velocity_target(batch.window_latents, batch.noise), batch.clean)

    @torch.no_grad()
    def with_own_context(self, model: nn.Module, batch: ClipBatch) -> ClipBatch:
        """The batch with the model's own frames as clean ones, where it asks for them."""
        return batch.with_estimates(*self.predict(model, batch.all_noisy())) if batch.own_context else batch

    def predict(self, model: nn.Module, batch: ClipBatch) -> tuple[Tensor, Tensor]:
        """The window as the model gets it, and the velocity it predicts, each `[B, window, C, H, W]`."""
        hidden_states, timestep = batch.model_input()
        velocity = model(
            hidden_states,
            timestep,
            class_labels=batch.class_labels if self.uses_labels else None,
            actions=batch.actions if self.uses_actions else None,
        ).sample
        return hidden_states[:, -velocity.shape[1] :], velocity

    def _tick(self) -> None:
        self.clock.tick()
        if self.accelerator.num_processes > 1:  # all processes agree on the time, and on stopping
            state = torch.tensor([self.clock.seconds, self.stop_requested], device=self.accelerator.device)
            self.clock.seconds, stop = self.accelerator.reduce(state, "mean").tolist()
            self.stop_requested = stop > 0

    def _request_stop(self, *_: Any) -> None:
        self.stop_requested = True

    # --------------------------------------------------------------------------------------------------------
    # Validation and logs

    def _validation_sets(self) -> dict[str, ClipBatches]:
        """Held-out clips with fixed noise: as in training, and as in sampling (one noisy frame, the last)."""
        train, videos = self.batches, LatentVideos(Path(self.args.latents) / "validation")
        fixed = (train.batch_size, train.num_frames, train.short_window)
        return {
            name: ClipBatches(videos, *fixed, probability, condition_dropout=0.0, seed=1, rank=train.rank)
            for name, probability in (
                ("validation_loss", train.clean_context_probability),
                ("next_frame_loss", 1.0),
            )
        }

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Mean losses of the averaged weights on the held-out clips."""
        with self.averaged_weights():
            losses = {name: self._mean_loss(batches) for name, batches in self.validation_sets.items()}
            return losses | self._memory_losses()

    def _memory_losses(self) -> dict[str, float]:
        """Of a Long model: the loss of noisy windows after right and wrong long-term frames (held out)."""
        videos = next(iter(self.validation_sets.values())).videos
        model = self.accelerator.unwrap_model(self.model)
        num_frames = min(MEMORY_FRAMES, self.args.num_frames, *videos.num_frames)
        if not model.is_long or num_frames <= model.short_window or len(videos) < 2:
            return {}
        chosen = range(min(MEMORY_VIDEOS, len(videos)))
        latents = torch.stack([videos.clip(video, 0, num_frames) for video in chosen])
        actions = None
        if self.uses_actions:
            actions = torch.stack([videos.actions(video, 0, num_frames) for video in chosen])
        with self.accelerator.autocast():
            losses = memory_loss(model, latents, actions, num_frames, torch.Generator().manual_seed(0))
        return {f"memory_{name}": value for name, value in losses.items()}

    def _mean_loss(self, batches: ClipBatches) -> float:
        device, number = self.accelerator.device, self.args.validation_batches
        losses = torch.stack([self.loss(batches[index].to(device)) for index in range(number)])
        return float(self.accelerator.reduce(losses.mean(), "mean"))

    def log(self, **values: float) -> None:
        """One line of `log.jsonl` and of the console."""
        clock = self.clock
        rate = self.args.learning_rate * clock.learning_rate_share
        values = {"minutes": clock.seconds / 60, "learning_rate": rate, **values}
        values = {"step": clock.step, **{name: float(f"{value:.5g}") for name, value in values.items()}}
        self.accelerator.log(values, step=clock.step)
        if self.accelerator.is_main_process:
            with (self.output_dir / "log.jsonl").open("a") as file:
                file.write(json.dumps(values) + "\n")
            print(" ".join(f"{name}={value:g}" for name, value in values.items()), flush=True)

    # --------------------------------------------------------------------------------------------------------
    # Weights and checkpoints: written beside their place, then renamed, so that what has the name is whole

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """The model holds the EMA weights."""
        self.ema.store(self.model.parameters())
        self.ema.copy_to(self.model.parameters())
        try:
            yield
        finally:
            self.ema.restore(self.model.parameters())

    def save(self) -> None:
        """Save the averaged weights, and all that is needed to go on."""
        checkpoint = self.output_dir / f"checkpoint-{self.clock.step:07d}"
        partial = self.output_dir / "checkpoint.partial"
        self.accelerator.save_state(str(partial))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            replace_folder(partial, checkpoint)
            for old in self._checkpoints()[: -self.args.keep_checkpoints]:
                shutil.rmtree(old)
            with self.averaged_weights():
                partial = self.output_dir / "ema.partial"
                self.accelerator.unwrap_model(self.model).save_pretrained(partial)
            replace_folder(partial, self.output_dir / "ema")
        self.accelerator.wait_for_everyone()

    def load_checkpoint(self, name: str) -> None:
        """Go on from a checkpoint folder, or from the `latest` one of the output folder, if there is any."""
        if name == "latest":
            folder = next(reversed(self._checkpoints()), None)
        else:
            folder = Path(name)
            if not folder.is_dir():
                raise ValueError(f"resume_from={name!r} is not a folder; it takes a checkpoint or latest")
        if folder is not None:
            self.accelerator.load_state(str(folder))

    def _checkpoints(self) -> list[Path]:
        return sorted(self.output_dir.glob("checkpoint-*"))


def create_optimizers(model: FARTransformer3DModel, args: TrainingArguments) -> list[torch.optim.Optimizer]:
    """AdamW and, with a rate for it, Muon for the matrices of the blocks."""
    weights = dict(model.named_parameters())
    optimizers: list[torch.optim.Optimizer] = []
    if args.muon_learning_rate is not None:
        blocks = model.transformer_blocks.named_parameters(prefix="transformer_blocks")
        matrices = [weights.pop(name) for name, weight in blocks if weight.ndim == 2]
        rate = args.muon_learning_rate
        muon = torch.optim.Muon(matrices, lr=rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        optimizers.append(muon)
    rate, betas = args.learning_rate, (args.adam_beta1, args.adam_beta2)
    adamw = torch.optim.AdamW(list(weights.values()), lr=rate, betas=betas, weight_decay=0.0, fused=True)
    return [adamw, *optimizers]


def replace_folder(source: Path, destination: Path) -> None:
    """Rename `source` to `destination`, in place of what is there."""
    old = destination.with_name(destination.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if destination.exists():
        destination.rename(old)
    source.rename(destination)
    shutil.rmtree(old, ignore_errors=True)


if __name__ == "__main__":
    Trainer(*parse_arguments(sys.argv[1:], __doc__)).train()
