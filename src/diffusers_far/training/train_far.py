"""Train FAR on encoded videos.

    python -m training.train_far training/recipes/far_doom_maze.yaml --latents LATENTS --output-dir OUTPUT
    python -m training.train_far --pretrained PIPELINE --lora-rank 16 --latents LATENTS ...
    accelerate launch -m training.train_far RECIPE.yaml ...            # several processes

A recipe is a YAML file of the options below; options on the command line win. OUTPUT gets `ema/` (averaged
weights, as `FARTransformer3DModel.from_pretrained` reads them), `log.jsonl`, and `checkpoint-<step>/` to
go on from with `--resume-from latest`. Clips, noise and timesteps of a step depend on the seed and the step
only, so a run of `--max-train-steps` that was interrupted ends with the weights of one that was not, bit for
bit.

With `--pretrained` it goes on from a trained model: all weights, changed first where actions, classes or
long-term frames are to be other ones (training/pretrained.py), or an adapter with `--lora-rank`. Then OUTPUT
gets `lora/`, as `FARVideoPipeline.load_lora_weights` reads it, in place of `ema/`.

The objective is flow matching, as published (section 3 of the paper), or with `--objective flow_map` an
any-step model is made of a trained one (training/objectives.py).
"""

import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderDC
from torch import Tensor
from torch.utils.data import DataLoader

from ..hub import fill_lora_card
from ..inputs import ActionNames
from ..memory_loss import memory_loss
from ..pipeline_far_video import FARVideoPipeline
from ..transformer_far import LATER_OPTIONS, FARTransformer3DModel
from .clips import ClipBatches, Clips, LatentVideos
from .encode_latents import hash_autoencoder
from .make_pipeline import let_all_read, make_scheduler
from .matmul_attn_processor import MatmulAttnProcessor
from .objectives import FlowMap, FlowMatching
from .options import FAROptions, ModelOptions, parse, script
from .pretrained import (
    Change,
    Pretrained,
    add_lora,
    change_model,
    check_action_names,
    find_pretrained,
    plan_change,
    save_lora,
)
from .run import Run
from .validation_samples import ValidationSamples

MEMORY_VIDEOS, MEMORY_FRAMES = 16, 96  # held-out videos, and first frames of them, for `memory_loss`
NUM_INFERENCE_STEPS = 25  # of a pipeline of a new model

logger = logging.getLogger(__name__)


class FARTrainer:
    """What training FAR adds to a run.

    Args:
        sizes: of a new model, or what is to be other than in a pretrained one.
        facts: lines for a model card about the data.
    """

    def __init__(self, sizes: ModelOptions, options: FAROptions, facts: Sequence[str] = ()) -> None:
        self.options, self.facts = options, facts
        self.validation: dict[str, float] = {}  # the last one
        # The weights of long-term tokens have no part in a clip as short as the window.
        self.run = Run("far", options, find_unused_parameters=True)
        videos = LatentVideos(Path(options.latents) / "train")
        self.pretrained = None if options.pretrained is None else find_pretrained(options.pretrained)
        model, teacher, self.action_names = self.create_models(sizes, videos)
        self.batches = self._batches(videos, model)
        self.validation_batches = self.samples = None
        self.sample_size: int | tuple[int, int] | None = None
        if options.validation_steps:
            held_out = LatentVideos(Path(options.latents) / "validation")
            self.validation_batches = self._batches(held_out, model, held_out_of=videos)
            if options.validation_seconds:
                self._check_autoencoder(videos)
                folder, seconds = Path(options.output_dir) / "samples", options.validation_seconds
                self.samples = ValidationSamples(held_out, options.num_frames, seconds, folder, options.seed)
        self.network = model
        # Checkpoints of earlier versions, which lack them, resume.
        unset = {name for name in LATER_OPTIONS if model.config[name] is None}
        config = {name: value for name, value in model.config.items() if name not in unset}
        if options.lora_rank is not None:
            config["lora_rank"] = options.lora_rank
        data = videos.fingerprint()
        optimizers = create_optimizers(model, options)
        self.model, self.optimizers = self.run.prepare(model, optimizers, config, data, asdict(sizes))
        self.models = [self.model]
        own_context = options.own_context_probability
        self.objective: FlowMap | FlowMatching
        if teacher is None:
            noisy_windows = options.noisy_window_probability
            clean_context = options.clean_context_probability
            self.objective = FlowMatching(self.model, clean_context, own_context, noisy_windows)
        else:
            self.objective = FlowMap(self.model, teacher.to(self.run.accelerator.device), own_context)

    def create_models(
        self, sizes: ModelOptions, videos: LatentVideos
    ) -> tuple[FARTransformer3DModel, FARTransformer3DModel | None, ActionNames | None]:
        """As [`create_models`] does; experiments change what comes out."""
        return create_models(sizes, self.options, self.pretrained, videos)

    def _batches(
        self, videos: LatentVideos, model: FARTransformer3DModel, held_out_of: LatentVideos | None = None
    ) -> ClipBatches:
        options, held_out = self.options, held_out_of is not None
        if held_out_of is not None and videos.frame_shape != held_out_of.frame_shape:
            raise ValueError(
                f"{videos.folder} has latents of {videos.frame_shape}, {held_out_of.folder} of "
                f"{held_out_of.frame_shape}: both must be equal"
            )
        config = model.config
        videos.keep_conditions(config.num_actions, config.num_classes, config.action_dim)
        return ClipBatches(
            videos,
            options.batch_size,
            options.num_frames,
            model.short_window,
            "uniform" if held_out else options.length_distribution,
            0.0 if held_out else options.revisit_probability,
            0.0 if held_out else options.condition_dropout,
            seed=1 if held_out else options.seed,
            rank=self.run.accelerator.process_index,
            num_ranks=self.run.accelerator.num_processes,
        )

    def train(self) -> bool:
        """From the first step, or the checkpoint to resume from, to the end; False if a signal ended it."""
        return self.run.train(self)

    def step(self, index: int) -> dict[str, float]:
        """Forward and backward of batch `index` of the run."""
        run, clips = self.run, next(self._clips).to(self.run.accelerator.device)
        frames = len(clips.latents) * clips.window * run.accelerator.num_processes
        loss, max_norm = self.loss(clips, index), self.options.max_grad_norm
        return {
            **run.descend(loss, self.model, self.optimizers, max_norm, clips.sources),
            "frames": frames,
        }

    def loss(self, clips: Clips, index: int) -> Tensor:
        """Of batch `index` of the run."""
        return self.objective.loss(clips, self.run.generator(index))

    @cached_property
    def _clips(self) -> Iterator[Clips]:
        """The batches from the step on at which this process begins."""
        remaining = range(self.run.clock.step * self.options.gradient_accumulation_steps, 2**62)
        workers = self.options.dataloader_workers
        return iter(DataLoader(self.batches, batch_size=None, sampler=remaining, num_workers=workers))

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Of the held-out clips, with fixed noise: mean losses, and how good continuations are."""
        self.validation = self._losses() | self._memory_losses() | self._sample()
        return self.validation

    def _losses(self) -> dict[str, float]:
        run, batches = self.run, self.validation_batches
        assert batches is not None
        means = {}
        for name, objective in self.objective.held_out().items():
            losses = [
                objective.loss(batches[index].to(run.accelerator.device), run.generator(index, seed=1))
                for index in range(self.options.validation_batches)
            ]
            means[name] = float(run.accelerator.reduce(torch.stack(losses).mean(), "mean"))
        return means

    def _memory_losses(self) -> dict[str, float]:
        """Of a Long model: the loss of noisy windows after right and wrong long-term frames (held out)."""
        assert self.validation_batches is not None
        videos = self.validation_batches.videos
        num_frames = min(MEMORY_FRAMES, self.options.num_frames)
        window = self.network.short_window
        chosen = [video for video, length in enumerate(videos.num_frames) if length >= num_frames]
        chosen = chosen[:MEMORY_VIDEOS]
        if window is None or num_frames <= window or len(chosen) < 2:
            return {}
        latents = torch.stack([videos.clip(video, 0, num_frames) for video in chosen])
        actions = [videos.actions[video] for video in chosen]
        known = None
        if actions[0] is not None:
            known = torch.stack([values[:num_frames] for values in actions if values is not None])
        with self.run.accelerator.autocast():
            losses = memory_loss(self.network, latents, known, num_frames, torch.Generator().manual_seed(0))
        return {f"memory_{name}": value for name, value in losses.items()}

    def _sample(self) -> dict[str, float]:
        """What the main process measures on continuations; nothing in others, which wait for it."""
        if self.samples is None:
            return {}
        run, measured = self.run, {}
        model = run.whole_model()
        if run.accelerator.is_main_process:
            pipeline = self.make_pipeline(model).to(run.accelerator.device)
            pipeline.set_progress_bar_config(disable=True)
            measured = self.samples(pipeline, run.accelerator, run.clock.step)
        run.accelerator.wait_for_everyone()
        return measured

    def _check_autoencoder(self, videos: LatentVideos) -> None:
        options, pretrained = self.options, self.pretrained
        if pretrained is not None and pretrained.pipeline is not None:
            return  # its own was checked
        if options.autoencoder is not None:
            check_autoencoder(f"autoencoder={options.autoencoder!r}", Path(options.autoencoder), videos)
        else:
            raise ValueError(
                f"autoencoder=None: validation_seconds={options.validation_seconds:g} takes the folder of "
                "the autoencoder that made the latents, or 0"
            )

    @cached_property
    def _parts(self) -> dict[str, Any]:
        """Of a pipeline of the model, but for the model: those of the pretrained pipeline, or new ones."""
        num_frames = self.options.num_frames
        if self.pretrained is not None and self.pretrained.pipeline is not None:
            before = FARVideoPipeline.from_pretrained(self.pretrained.pipeline, transformer=self.network)
            vae, scheduler = before.vae, before.scheduler
            defaults = {name: before.config[name] for name in ("num_inference_steps", "flex_rope_slope")}
            num_frames = max(num_frames, before.config.num_training_frames or 0)
        else:
            vae, scheduler = AutoencoderDC.from_pretrained(self.options.autoencoder), make_scheduler("Euler")
            defaults = {"num_inference_steps": NUM_INFERENCE_STEPS}
        return defaults | {
            "vae": vae,
            "scheduler": scheduler,
            "num_training_frames": num_frames,
            "sample_size": self.sample_size,
            "action_names": self.action_names,
        }

    def make_pipeline(self, model: FARTransformer3DModel) -> FARVideoPipeline:
        """Of a model that has weights of this run."""
        return FARVideoPipeline(model, **self._parts)

    def save_weights(self) -> None:
        if self.options.lora_rank is None:
            self.run.export("ema", FARTransformer3DModel.save_pretrained)
        else:
            self.run.export("lora", self._write_lora)

    def _write_lora(self, model: FARTransformer3DModel, folder: Path) -> None:
        save_lora(model, folder)
        assert self.pretrained is not None
        output = Path(self.options.output_dir)
        card = fill_lora_card(
            model,
            self.pretrained.name,
            str(output / "lora"),
            training=self.training_facts(),
            evaluation=self.evaluation_facts(),
            name=output.resolve().name,
        )
        card.save(folder / "README.md")
        let_all_read(folder)

    def training_facts(self) -> str:
        """Section of a model card."""
        options, clock = self.options, self.run.clock
        clips = options.batch_size * options.gradient_accumulation_steps
        lines = [
            *self.facts,
            *([] if self.pretrained is None else [f"from the weights of {self.pretrained.name}"]),
            f"{clock.step:,} steps of {clips} clips of up to {options.num_frames} frames, in "
            f"{clock.seconds / 60:.1f} minutes of training",
            f"learning rate {options.learning_rate:g}, {options.lr_scheduler}; seed {options.seed}",
        ]
        return "\n".join(f"- {line}" for line in lines)

    def evaluation_facts(self) -> str:
        """Section of a model card."""
        if not self.validation:
            return "Not measured yet."
        lines = [f"- {name.replace('_', ' ')}: {value:.4f}" for name, value in self.validation.items()]
        return "\n".join(["On clips of the held-out videos:", "", *lines])


def create_models(
    sizes: ModelOptions, options: FAROptions, pretrained: Pretrained | None, videos: LatentVideos
) -> tuple[FARTransformer3DModel, FARTransformer3DModel | None, ActionNames | None]:
    """The model as training begins; for a flow map, the trained one that it learns from; names of actions."""
    in_channels, teacher = videos.frame_shape[0], None
    statistics = videos.action_statistics() if sizes.action_dim else {}
    if pretrained is None:
        names: ActionNames | None = list(options.action_names or videos.action_names) or None
        if options.action_names is not None:
            check_action_names(options.action_names, sizes.num_actions)
        model = FARTransformer3DModel(in_channels=in_channels, **asdict(sizes), **statistics)
    else:
        change = plan_change(pretrained, sizes, options, videos.action_names, statistics)
        check_latents(pretrained, videos)
        for line in change.told:
            logger.info("%s: %s", pretrained.name, line)
        model, names = pretrained.load(), change.action_names
        if options.objective == "flow_map":
            if change.told:
                raise ValueError(
                    f"objective=flow_map takes the model as it is, but {'; '.join(change.told)}: train it so "
                    "first"
                )
            teacher = model
            change = Change({"use_meanflow": True})
        elif pretrained.config["use_meanflow"]:
            raise ValueError(
                f"pretrained={pretrained.name!r} is an any-step model (use_meanflow), which flow matching "
                "would undo: take the model that it was made of, then make an any-step model with "
                "objective=flow_map"
            )
        if change.options or change.replaced or change.rows:
            model = change_model(model, change)
        if options.lora_rank is not None:
            add_lora(model, options.lora_rank)
    if options.attention == "matmul":
        for network in (model, teacher or model):
            network.set_attn_processor(MatmulAttnProcessor())
    if options.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if options.compile:
        model.compile_repeated_blocks(dynamic=True)
    return model, teacher, names


def check_latents(pretrained: Pretrained, videos: LatentVideos) -> None:
    """Raise unless the latents are such as the pretrained model was trained on."""
    channels = pretrained.config["in_channels"]
    if channels != videos.frame_shape[0]:
        raise ValueError(
            f"pretrained={pretrained.name!r} takes {channels} channels; {videos.folder} has "
            f"{videos.frame_shape[0]}"
        )
    if pretrained.pipeline is not None and videos.autoencoder is not None:
        check_autoencoder(f"pretrained={pretrained.name!r}", pretrained.pipeline / "vae", videos)


def check_autoencoder(argument: str, folder: Path, videos: LatentVideos) -> None:
    """Raise unless the autoencoder in a folder can have made the latents."""
    autoencoder = AutoencoderDC.from_pretrained(folder)
    known = videos.autoencoder is not None
    if autoencoder.config.latent_channels != videos.frame_shape[0] or (
        known and hash_autoencoder(autoencoder) != videos.autoencoder
    ):
        raise ValueError(
            f"{argument}: {videos.folder} was encoded by another autoencoder; encode with {folder}"
        )


def create_optimizers(model: FARTransformer3DModel, options: FAROptions) -> list[torch.optim.Optimizer]:
    """AdamW and, with a rate for it, Muon for the matrices of the blocks."""
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    optimizers: list[torch.optim.Optimizer] = []
    if options.muon_learning_rate is not None:
        blocks = model.transformer_blocks.named_parameters(prefix="transformer_blocks")
        matrices = [weights.pop(name) for name, weight in blocks if weight.ndim == 2]
        rate = options.muon_learning_rate
        muon = torch.optim.Muon(matrices, lr=rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        optimizers.append(muon)
    rate, betas = options.learning_rate, (options.adam_beta1, options.adam_beta2)
    adamw = torch.optim.AdamW(list(weights.values()), lr=rate, betas=betas, weight_decay=0.0, fused=True)
    return [adamw, *optimizers]


def main(command_line: list[str]) -> None:
    with script():
        trainer = FARTrainer(*parse(command_line, (ModelOptions, FAROptions), __doc__))
        if not trainer.train():
            sys.exit(128 + (trainer.run.received_signal or 0))  # as the shell says of what a signal ended


if __name__ == "__main__":
    main(sys.argv[1:])
