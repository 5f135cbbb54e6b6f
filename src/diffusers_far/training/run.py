"""One run of a training script: where it stands, what it keeps, and how it goes on after an interruption.

    OUTPUT/arguments.json           options of the run
    OUTPUT/log.jsonl                a line every `logging_steps`
    OUTPUT/checkpoint-<step>/       what `resume_from` goes on from: run.json (step, seconds, which model and
                                    data), averaged.safetensors, what accelerate saves; with FSDP2 sharded/
    OUTPUT/<weights>/               averaged weights, as `from_pretrained` reads them

Folders are written beside their place, brought to the disk and renamed: what has the name is whole. Nothing
of a checkpoint is read in a way that could run code of its own.
"""

import copy
import json
import logging
import math
import pickle
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from tqdm import tqdm
from transformers import get_wsd_schedule

from ..whole_files import bring_to_disk
from . import sharded
from .options import RunOptions

logger = logging.getLogger(__name__)

# What reading a checkpoint raises when a file of it is cut, emptied, missing, or of another model.
DAMAGE = (
    *(SafetensorError, pickle.UnpicklingError, RuntimeError, ValueError, KeyError, TypeError, AttributeError),
    *(EOFError, OSError, CheckpointException),
)


class Trainee(Protocol):
    """What a run trains."""

    models: list[nn.Module]  # as the accelerator runs them

    def step(self, index: int) -> dict[str, float]:
        """Forward and backward of batch `index` of the run: values for the log, `frames` among them."""

    def validate(self) -> dict[str, float]:
        """Values for the log, with the averaged weights in the model."""

    def save_weights(self) -> None:
        """Called beside every checkpoint."""


class Clock:
    """Where a run stands: steps and seconds of training, those before a resume included.

    The learning rate follows the share of the run that is over, in steps or in time, whichever is greater.
    """

    SCHEDULE_LENGTH = 1_000_000  # of the whole run, in the units of `get_scheduler`

    def __init__(self, options: RunOptions, optimizer: torch.optim.Optimizer) -> None:
        self.step = 0
        self.seconds = 0.0
        self._started = time.monotonic()
        self._max_steps = options.max_train_steps or math.inf
        self._max_seconds = (options.max_minutes or math.inf) * 60
        length = self.SCHEDULE_LENGTH
        warmup, decay = int(options.warmup_ratio * length), int(options.decay_ratio * length)
        if options.lr_scheduler == "warmup_stable_decay":
            schedule = get_wsd_schedule(optimizer, warmup, decay, length, decay_type="linear")
        else:
            schedule = get_scheduler(options.lr_scheduler, optimizer, None, warmup, length)
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
    def share(self) -> float:
        """How much of the run is over, from 0 to 1."""
        return min(1.0, max(self.step / self._max_steps, self.seconds / self._max_seconds))

    @property
    def learning_rate_share(self) -> float:
        """Learning rate of the step that comes next, as a share of the highest one."""
        # From the middle of a step, so that neither the first nor the last has a rate of zero.
        share = max((self.step + 0.5) / self._max_steps, self.seconds / self._max_seconds)
        return float(self._scale_at(share * self.SCHEDULE_LENGTH))


def check_output(options: RunOptions) -> None:
    """Raise a ValueError for a folder that holds a run, unless told to resume, and for no checkpoint."""
    folder = Path(options.output_dir)
    if options.resume_from is None:
        found = (folder / "log.jsonl", *_checkpoints(folder))
        if used := [path.name for path in found if path.exists()]:
            raise ValueError(
                f"output_dir={options.output_dir!r} was used: it has {used[-1]}; it takes a new folder, "
                "or resume_from=latest to go on with that run"
            )
    elif options.resume_from != "latest" and not _is_checkpoint(Path(options.resume_from)):
        raise ValueError(f"resume_from={options.resume_from!r} is not a folder checkpoint-<step>, nor latest")


class Run:
    """Accelerator, clock, averaged weights, checkpoints and logs of one run.

    Made first, as it refuses an output folder that was used; then `prepare`, then `train`.

    Args:
        name: of the project in a tracker.
        options: of the run, and those of the script.
        find_unused_parameters: whether some weights may have no part in a step.

    Raises:
        ValueError: for a folder that holds a run, unless told to resume; for a checkpoint that is not there.
    """

    def __init__(self, name: str, options: RunOptions, find_unused_parameters: bool = False) -> None:
        self.name, self.options = name, options
        self.output_dir = Path(options.output_dir)
        check_output(options)
        if options.num_threads is not None:
            torch.set_num_threads(options.num_threads)
        self.accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),  # else processes on CPUs know nothing of each other
            mixed_precision=options.mixed_precision,
            gradient_accumulation_steps=options.gradient_accumulation_steps,
            log_with=options.report_to,
            project_dir=options.output_dir,
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=find_unused_parameters)],
        )
        self.is_sharded = sharded.is_sharded(self.accelerator)
        set_seed(options.seed)
        self.received_signal: int | None = None  # that ends the run, in all processes after the same step
        self._own_signal = 0
        self._resumed_step = self._saved_step = -1

    def prepare(
        self,
        model: nn.Module,
        optimizers: list[torch.optim.Optimizer],
        config: dict[str, Any],
        data: str,
        arguments: dict[str, Any],
    ) -> tuple[nn.Module, list[Any]]:
        """Model and optimizers, as the accelerator runs them.

        Args:
            model: whose weights are averaged.
            optimizers: whose learning rates follow the clock.
            config: of the model; a run is resumed with the same one.
            data: a hash of the training data; a run is resumed with the same one.
            arguments: for arguments.json, besides the options of the run.
        """
        options = self.options
        known = {name: value for name, value in config.items() if not name.startswith("_")}
        self.identity = json.loads(json.dumps({"model": known, "data": data}))
        self.clock = Clock(options, optimizers[0])
        if self.is_sharded:
            self._empty = copy.deepcopy(model).to("meta")
            sharded.plan_sharding(self.accelerator, model)
        prepared, *prepared_optimizers = self.accelerator.prepare(model, *optimizers)
        if self.is_sharded:
            sharded.autocast(self.accelerator, prepared)
        self.ema = EMAModel(
            model.parameters(), options.ema_decay, use_ema_warmup=True, power=options.ema_power, foreach=True
        )
        self.model, self.optimizers = model, prepared_optimizers
        self.arguments = {**arguments, **asdict(options)}
        return prepared, prepared_optimizers

    def _open_output(self) -> None:
        arguments = self.arguments
        if self.accelerator.is_main_process:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            (self.output_dir / "arguments.json").write_text(json.dumps(arguments, indent=2) + "\n")
        if self.options.report_to:
            config = {key: str(value) for key, value in arguments.items() if value is not None}
            self.accelerator.init_trackers(self.name, config=config)

    # --------------------------------------------------------------------------------------------------------
    # Training

    def train(self, trainee: Trainee) -> bool:
        """From the first step, or the checkpoint to resume from, to the end; False if a signal ended it."""
        options, clock = self.options, self.clock
        self._resume()
        self._open_output()
        before = {number: signal.signal(number, self._stop) for number in (signal.SIGTERM, signal.SIGINT)}
        values, busy, saved_at = [], 0.0, clock.seconds
        bar = tqdm(
            total=1.0,
            initial=clock.share,
            bar_format="{percentage:3.0f}%|{bar:20}| {desc}, {elapsed} + {remaining} left{postfix}",
            disable=None if self.accelerator.is_main_process else True,  # None: unless it is a terminal
        )
        clock.start()
        try:
            while not clock.over and self.received_signal is None:
                started = clock.seconds
                for optimizer in self.optimizers:
                    optimizer.param_groups[0]["lr"] = optimizer.defaults["lr"] * clock.learning_rate_share
                values.append(self._step(trainee))
                self.ema.step(self.model.parameters())
                clock.step += 1
                self._tick()
                busy += clock.seconds - started
                speed = sum(line["frames"] for line in values) / busy
                bar.set_description_str(f"step {clock.step}", refresh=False)
                bar.set_postfix_str(f"loss {values[-1]['loss']:.4f}, {speed:.0f} frames/s", refresh=False)
                bar.update(clock.share - bar.n)

                if clock.step % options.logging_steps == 0 or clock.over:
                    means = _means(values)
                    del means["frames"]
                    self.log(**means, frames_per_second=speed)
                    values, busy = [], 0.0
                if options.validation_steps and (clock.step % options.validation_steps == 0 or clock.over):
                    with self.averaged_weights():
                        self.log(**trainee.validate())
                due = clock.seconds - saved_at >= options.save_minutes * 60
                if clock.step % options.save_steps == 0 if options.save_steps else due:
                    self._save(trainee)
                    saved_at = clock.seconds
                self._tick()
            self._save(trainee)
        finally:
            bar.close()
            for number, handler in before.items():
                signal.signal(number, handler)
        self.accelerator.end_training()
        return self.received_signal is None

    def _step(self, trainee: Trainee) -> dict[str, float]:
        """One step of the optimizers."""
        num_batches, values = self.options.gradient_accumulation_steps, []
        for index in range(self.clock.step * num_batches, (self.clock.step + 1) * num_batches):
            with self.accelerator.accumulate(*trainee.models):
                values.append(trainee.step(index))
        return {**_means(values), "frames": sum(line["frames"] for line in values)}

    def descend(
        self,
        loss: Tensor,
        model: nn.Module,
        optimizers: Iterable[Any],
        max_grad_norm: float,
        sources: Iterable[str] = (),
    ) -> dict[str, float]:
        """Backward, and a step of the optimizers if the gradient is complete: values for the log.

        Args:
            sources: of the batch, for the error when loss or gradient are not finite.
        """
        accelerator = self.accelerator
        values = {"loss": float(accelerator.reduce(loss.detach(), "mean"))}
        self._require_finite("loss", values["loss"], sources)
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            for optimizer in optimizers:
                accelerator.unscale_gradients(optimizer)
            norm = float(sharded.whole(nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)))
            if accelerator.mixed_precision != "fp16":  # whose scaler leaves out such a step
                self._require_finite("norm of the gradient", norm, sources)
            values["grad_norm"] = norm
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return values

    def generator(self, index: int, seed: int | None = None, rank: int = 0) -> torch.Generator:
        """Of all draws for batch `index`, on the CPU; by default with the seed of the run.

        Args:
            rank: of the process, where each has draws of its own.
        """
        seed = self.options.seed if seed is None else seed
        draw = np.random.default_rng((seed, index, 1 + rank, 1)).integers(2**62)
        return torch.Generator().manual_seed(int(draw))

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """The model holds the averaged weights."""
        self._exchange_weights()
        try:
            yield
        finally:
            self._exchange_weights()

    @contextmanager
    def averaged_model(self) -> Iterator[Any]:
        """The model with the averaged weights, whole in each process; all must ask for it."""
        if self.is_sharded:
            yield self._joined(self._averaged())
        else:
            with self.averaged_weights():
                yield self.model

    def whole_model(self) -> Any:
        """The model as it stands, whole in each process; all must ask for it."""
        if not self.is_sharded:
            return self.model
        sharded.share_out_again(self.model)
        return self._joined(dict(self.model.named_parameters()))

    def _joined(self, weights: dict[str, Tensor]) -> nn.Module:
        """A model of its own with weights that are shared out."""
        model = copy.deepcopy(self._empty)
        model.load_state_dict({name: sharded.whole(weight) for name, weight in weights.items()}, assign=True)
        return model.requires_grad_(False)

    @torch.no_grad()
    def _exchange_weights(self) -> None:
        """The model gets the averaged weights, and they its own; a second time undoes it."""
        if self.is_sharded:
            sharded.share_out_again(self.model)
        for weight, averaged in zip(self.model.parameters(), self.ema.shadow_params, strict=True):
            kept = weight.detach().clone()
            weight.detach().copy_(averaged)
            averaged.copy_(kept)

    def _averaged(self) -> dict[str, Tensor]:
        names = [name for name, _ in self.model.named_parameters()]
        return dict(zip(names, self.ema.shadow_params, strict=True))

    def log(self, **values: float) -> None:
        """One line of log.jsonl and of the console."""
        clock = self.clock
        rate = self.options.learning_rate * clock.learning_rate_share
        values = {"minutes": clock.seconds / 60, "learning_rate": rate, **values}
        values = {"step": clock.step, **{name: float(f"{value:.5g}") for name, value in values.items()}}
        self.accelerator.log(values, step=clock.step)
        if self.accelerator.is_main_process:
            with self._writing("log.jsonl"), (self.output_dir / "log.jsonl").open("a") as file:
                file.write(json.dumps(values) + "\n")
            tqdm.write(" ".join(f"{name}={value:g}" for name, value in values.items()))

    def _require_finite(self, name: str, value: float, sources: Iterable[str] = ()) -> None:
        """Stop before anything is spoilt."""
        if not math.isfinite(value):
            last = next(reversed(self.checkpoints()), "none")
            batch = "".join(f"; of {source}" for source in list(sources)[:4])
            raise FloatingPointError(
                f"step {self.clock.step}: {name} is {value}; last checkpoint: {last}{batch}"
            )

    def _tick(self) -> None:
        self.clock.tick()
        if self.accelerator.num_processes > 1:  # all processes agree on the time, and on stopping
            own = torch.tensor([[self.clock.seconds, self._own_signal]], device=self.accelerator.device)
            seconds, signals = self.accelerator.gather(own).T
            self.clock.seconds, received = float(seconds.mean()), int(signals.max())
        else:
            received = self._own_signal
        self.received_signal = received or None

    def _stop(self, number: int, _: Any) -> None:
        self._own_signal = number
        # A second Ctrl-C ends the process at once. SIGTERM may come twice by itself: from a scheduler of jobs
        # to each process, and from the launcher to those that it began.
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)

    # --------------------------------------------------------------------------------------------------------
    # Checkpoints

    def checkpoints(self) -> list[Path]:
        """The checkpoints of the output folder, the one saved last at the end."""
        return _checkpoints(self.output_dir)

    def _save(self, trainee: Trainee) -> None:
        """Checkpoint and weights of this step, unless they are there."""
        if self.clock.step == self._saved_step:
            return
        named = [*self.model.named_parameters(), *self._averaged().items()]
        sums = torch.stack([sharded.own_part(weight.detach()).abs().sum() for _, weight in named])
        for (name, _), value in zip(named, self.accelerator.reduce(sums, "sum").tolist(), strict=True):
            self._require_finite(f"sum of {name}", value)
        if self.clock.step != self._resumed_step:
            self._save_checkpoint()
        trainee.save_weights()
        self.accelerator.wait_for_everyone()
        self._saved_step = self.clock.step

    def _save_checkpoint(self) -> None:
        accelerator, clock = self.accelerator, self.clock
        with self._replacement(f"checkpoint-{clock.step:07d}") as partial:
            accelerator.wait_for_everyone()  # every process has a file of its own in it
            averaged = {name: weight.contiguous() for name, weight in self._averaged().items()}
            if self.is_sharded:
                sharded.save(partial / sharded.FOLDER, self.model, averaged, self._inner_optimizers())
            else:
                accelerator.save_state(str(partial))
            if accelerator.is_main_process:
                if not self.is_sharded:
                    save_file(averaged, partial / "averaged.safetensors")
                state = {"step": clock.step, "seconds": clock.seconds, "saved_at": time.time()}
                (partial / "run.json").write_text(json.dumps(state | self.identity) + "\n")
            accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            for old in self.checkpoints()[: -self.options.keep_checkpoints]:
                _remove(old)

    def _inner_optimizers(self) -> list[torch.optim.Optimizer]:
        return [optimizer.optimizer for optimizer in self.optimizers]  # in those that accelerate puts around

    def export(self, name: str, write: Callable[[Any, Path], Any]) -> None:
        """Write a folder, which takes the place of an earlier one when it is complete.

        Args:
            write: of the main process; gets the model with averaged weights, and the folder.
        """
        with self.averaged_model() as model:
            if self.accelerator.is_main_process:
                with self._replacement(name) as partial:
                    write(model, partial)

    def _resume(self) -> None:
        name = self.options.resume_from
        if name is None:
            return
        if self.accelerator.is_main_process:
            self._finish_replacements()
        self.accelerator.wait_for_everyone()
        folders = self.checkpoints() if name == "latest" else [Path(name)]
        if not folders:
            return
        folder = folders[-1]
        try:
            state = self._read_state(folder)
            for kind in ("model", "data"):
                if kind in state and state[kind] != self.identity[kind]:
                    difference = _difference(state[kind], self.identity[kind])
                    raise _OtherRun(
                        f"resume_from: {folder} was trained with {difference}; it takes the same "
                        f"{kind}, or a new output_dir"
                    )
            if self.is_sharded and not (folder / sharded.FOLDER).is_dir():
                raise _OtherRun(
                    f"resume_from: {folder} was saved without FSDP; go on without it, or begin a new run "
                    "with its averaged weights as pretrained"
                )
            self._load(folder, state)
            self.clock.step, self.clock.seconds = int(state["step"]), float(state["seconds"])
        except _OtherRun:
            raise
        except DAMAGE as error:
            others = [other for other in self.checkpoints() if other.resolve() != folder.resolve()]
            instead = f"; before it was saved {others[-1]}, which resume_from takes too" if others else ""
            message = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(f"resume_from: {folder} is damaged ({message}){instead}") from error
        self.ema.optimization_step = self._resumed_step = self.clock.step
        logger.info("resumed from %s", folder)

    def _read_state(self, folder: Path) -> dict[str, Any]:
        if (folder / "run.json").exists():
            return json.loads((folder / "run.json").read_text())
        # Of an earlier version, which left averaged weights and clock to accelerate.
        state = {"step": int(folder.name.partition("-")[2]), "seconds": 0.0}
        for file in sorted(folder.glob("custom_checkpoint_*.pkl")):
            state |= torch.load(file, map_location="cpu", weights_only=True)
        if "shadow_params" not in state:
            raise FileNotFoundError("it has no run.json")
        return state

    def _load(self, folder: Path, state: dict[str, Any]) -> None:
        if (folder / sharded.FOLDER).is_dir():
            sharded.load(folder / sharded.FOLDER, self.model, self._averaged(), self._inner_optimizers())
            return
        if "shadow_params" in state:
            averaged = dict(zip(self._averaged(), state["shadow_params"], strict=True))
        else:
            averaged = load_file(folder / "averaged.safetensors")
        for name, weight in self._averaged().items():
            weight.copy_(averaged[name])
        with tempfile.TemporaryDirectory() as view:  # without the files that accelerate would unpickle
            for file in folder.iterdir():
                if not file.name.startswith("custom_checkpoint_"):
                    (Path(view) / file.name).symlink_to(file.resolve())
            self.accelerator.load_state(view)

    # --------------------------------------------------------------------------------------------------------
    # Folders

    @contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        """Say where a run stood whose disk is full."""
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            last = next(reversed(self.checkpoints()), "none")
            message = (str(error) or type(error).__name__).splitlines()[0]
            raise OSError(
                f"step {self.clock.step}: {self.output_dir / name} cannot be written ({message}); "
                f"last checkpoint: {last}"
            ) from error

    @contextmanager
    def _replacement(self, name: str) -> Iterator[Path]:
        """An empty folder to write in, which becomes `name` of the output folder at the end."""
        destination = self.output_dir / name
        partial = self.output_dir / f".{name}.being-written"
        if self.accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
        try:
            with self._writing(name):
                yield partial
        except BaseException:  # a full disk has the place again
            shutil.rmtree(partial, ignore_errors=True)
            raise
        if self.accelerator.is_main_process:
            bring_to_disk(partial)
            old = self.output_dir / f".{name}.being-replaced"
            if destination.exists():
                destination.rename(old)
            partial.rename(destination)
            shutil.rmtree(old, ignore_errors=True)

    def _finish_replacements(self) -> None:
        """Clean up after a run that was killed while it replaced a folder."""
        for old in self.output_dir.glob(".*.being-replaced"):
            destination = self.output_dir / old.name[1:].removesuffix(".being-replaced")
            if destination.exists():
                shutil.rmtree(old)
            else:
                old.rename(destination)
        for partial in self.output_dir.glob(".*.being-written"):
            shutil.rmtree(partial)


class _OtherRun(ValueError):
    """A checkpoint that is whole, but of other data, another model or another kind of run."""


def _difference(earlier: Any, now: Any) -> str:
    """Where two models, or the data, of a run differ."""
    if isinstance(earlier, dict):
        for name in {**earlier, **now}:
            if earlier.get(name) != now.get(name):
                return f"{name}={earlier.get(name)} of the model, which is {now.get(name)} now"
    return "other data"


def _means(values: list[dict[str, float]]) -> dict[str, float]:
    """Of those that the last of some lines has."""
    return {name: float(np.mean([line[name] for line in values if name in line])) for name in values[-1]}


def _checkpoints(folder: Path) -> list[Path]:
    """Those in a folder, the one saved last at the end."""
    return sorted(filter(_is_checkpoint, folder.iterdir() if folder.is_dir() else ()), key=_saved_at)


def _is_checkpoint(folder: Path) -> bool:
    return folder.is_dir() and re.fullmatch(r"checkpoint-\d+", folder.name) is not None


def _saved_at(checkpoint: Path) -> float:
    try:
        return float(json.loads((checkpoint / "run.json").read_text())["saved_at"])
    except (OSError, ValueError, KeyError, TypeError):  # of an earlier version, or damaged
        return checkpoint.stat().st_mtime


def _remove(checkpoint: Path) -> None:
    """Remove a folder under another name, so that half of it never has the name of a checkpoint."""
    doomed = checkpoint.with_name(f".{checkpoint.name}.being-written")
    shutil.rmtree(doomed, ignore_errors=True)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)
