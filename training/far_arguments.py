"""Options of training/train_far.py, from a recipe and the command line."""

from dataclasses import dataclass, field
from pathlib import Path

import yaml
from transformers import HfArgumentParser


@dataclass
class ModelArguments:
    """Size of the model; `in_channels` comes from the latents. See [`FARTransformer3DModel`]."""

    patch_size: int = 1
    long_patch_size: int | None = None
    num_layers: int = 12
    num_attention_heads: int = 12
    attention_head_dim: int = 64
    axes_dims_rope: list[int] = field(default_factory=lambda: [16, 24, 24])
    num_classes: int | None = None
    num_actions: int | None = None
    short_window: int = 16


@dataclass
class TrainingArguments:
    """How to train. The defaults are the published ones where there are any.

    Args:
        latents: folder with the splits `train/` and `validation/` of an encoded data set.
        output_dir: where weights, checkpoints and logs go.
        num_frames: frames of a clip; of the longest clip for a Long model.
        clean_context_probability: chance of a frame of the window to be given clean.
        condition_dropout: chance of the label of a video, or the action of a frame, to be dropped.
        own_context_probability: chance of a batch whose clean frames of the window are the model's own
            estimates of them (scheduled sampling); not published. It keeps long rollouts from washing out.
        length_distribution: of a Long model's clips, "uniform" as published, or "log_uniform", mostly short.
        noisy_window_probability: chance of a batch whose windows have no clean frame, so that only the
            long-term frames can tell what comes.
        revisit_probability: chance of a clip whose window shows a view that the clip has before its window.
        batch_size: clips per process and forward.
        gradient_accumulation_steps: forwards per step of the optimizer.
        max_train_steps, max_minutes: length of the run in steps of the optimizer, in minutes, or in both: it
            ends with the first. The learning rate is scheduled over that length.
        pretrained: folder of a model, such as `ema/` of another run, to start from. The model keeps its
            sizes; the options for them do nothing then.
        learning_rate: the highest one, of AdamW.
        muon_learning_rate: the highest one of Muon, which then trains the matrices of the blocks and leaves
            the rest to AdamW. Unset, AdamW trains all weights, as published.
        lr_scheduler: a name that `get_scheduler` of diffusers knows, or "warmup_stable_decay": the rate stays
            at its highest until the last part of the run, so that an earlier checkpoint can go on for longer.
        warmup_ratio: share of the run in which the learning rate rises.
        decay_ratio: share of the run in which "warmup_stable_decay" falls to zero.
        adam_beta1, adam_beta2, max_grad_norm: of AdamW, which has no weight decay here.
        ema_decay, ema_power: the decay after n steps is `1 - (1 + n) ** -ema_power`, at most `ema_decay`.
        mixed_precision: "no", "bf16" or "fp16".
        attention: "sdpa", or "matmul", which is faster on CPUs with bf16 matrix units.
        compile: compile the transformer blocks, which takes minutes once.
        seed: of the weights and all draws.
        dataloader_workers: processes that read clips ahead.
        logging_steps: steps between two lines of the log.
        validation_steps: steps between two validations; 0 for none.
        validation_batches: batches of one validation.
        save_minutes: minutes between two checkpoints, each with averaged weights beside it, or
        save_steps: steps between them.
        keep_checkpoints: so many of the last ones are kept.
        resume_from: a checkpoint to go on from, or "latest": the newest one, if there is any.
        report_to: a tracker that accelerate knows, such as "tensorboard".
    """

    latents: str
    output_dir: str
    num_frames: int = 16
    clean_context_probability: float = 0.1
    condition_dropout: float = 0.1
    own_context_probability: float = 0.0
    length_distribution: str = "uniform"
    noisy_window_probability: float = 0.0
    revisit_probability: float = 0.0
    batch_size: int = 32
    gradient_accumulation_steps: int = 1
    max_train_steps: int | None = None
    max_minutes: float | None = None
    pretrained: str | None = None
    learning_rate: float = 1e-4
    muon_learning_rate: float | None = None
    lr_scheduler: str = "constant_with_warmup"
    warmup_ratio: float = 0.01
    decay_ratio: float = 0.2
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    max_grad_norm: float = 1.0
    ema_decay: float = 0.9999
    ema_power: float = 0.75
    mixed_precision: str = "no"
    attention: str = "sdpa"
    compile: bool = False
    seed: int = 0
    dataloader_workers: int = 0
    logging_steps: int = 50
    validation_steps: int = 1000
    validation_batches: int = 8
    save_minutes: float = 10.0
    save_steps: int | None = None
    keep_checkpoints: int = 2
    resume_from: str | None = None
    report_to: str | None = None

    def __post_init__(self) -> None:
        if self.max_train_steps is None and self.max_minutes is None:
            raise ValueError("max_train_steps=None and max_minutes=None: give the length of the run")
        for name in (
            *("batch_size", "gradient_accumulation_steps", "max_train_steps", "max_minutes", "learning_rate"),
            *("muon_learning_rate", "max_grad_norm", "logging_steps", "validation_batches", "save_minutes"),
            *("save_steps", "keep_checkpoints"),
        ):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}={value} must be greater than 0")
        for name in (
            *("clean_context_probability", "condition_dropout", "own_context_probability"),
            *("noisy_window_probability", "warmup_ratio", "decay_ratio", "ema_decay"),
        ):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 1)")
        if not 0 <= self.revisit_probability <= 1:
            raise ValueError(f"revisit_probability={self.revisit_probability} must be in [0, 1]")
        for name, choices in (
            ("mixed_precision", ("no", "bf16", "fp16")),
            ("attention", ("sdpa", "matmul")),
            ("length_distribution", ("uniform", "log_uniform")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(choices)}")


def parse_arguments(
    argv: list[str], description: str | None = None
) -> tuple[ModelArguments, TrainingArguments]:
    """Options of `[RECIPE.yaml] [--option value ...]`; the command line wins."""
    parser = HfArgumentParser((ModelArguments, TrainingArguments), description=description)
    options = list(argv)
    if argv and argv[0].endswith((".yaml", ".yml")):
        recipe = yaml.safe_load(Path(options.pop(0)).read_text())
        known = {action.dest: action for action in parser._actions}
        for name in recipe:
            if name not in known:
                raise ValueError(f"{argv[0]} sets {name!r}, which is no option; options: {', '.join(known)}")
            known[name].required = False
        parser.set_defaults(**recipe)
    model_args, args = parser.parse_args_into_dataclasses(options)
    return model_args, args
