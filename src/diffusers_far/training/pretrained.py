"""Trained models to go on from: where they are, what is changed before they are trained on, and LoRA.

A changed model takes over all weights that it still has, and begins as what it was, as far as that can be:

- a new action or class starts as the null condition, that of a frame whose action is not known; without
  actions (or classes) the model is what it was under the null condition;
- projections of long-term tokens start as those of short-term ones, the embedding of a long-term token as the
  mean of the short-term ones that it takes the place of.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor

from ..actions import ActionSpace
from ..inputs import ActionNames
from ..pipeline_far_video import FARVideoPipeline
from ..shipped import locate
from ..transformer_far import FARTransformer3DModel
from .options import ModelOptions, StartOptions

# Layers that an adapter is for: attention and feed-forward, of both kinds of tokens.
LORA_LAYERS = [
    *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    *("ff.net.0.proj", "ff.net.2"),
]
# Layers of long-term tokens, and those of short-term ones that they start from.
LONG_LAYERS = {
    "add_q_proj": "to_q",
    "add_k_proj": "to_k",
    "add_v_proj": "to_v",
    "norm_added_q": "norm_q",
    "norm_added_k": "norm_k",
    "to_add_out": "to_out.0",
}
ACTION_OPTIONS = {"num_actions", "action_dim"}


# ------------------------------------------------------------------------------------------------------------
# Where it is


@dataclass(frozen=True)
class Pretrained:
    """A trained model.

    Args:
        name: what the user calls it.
        transformer: folder of the model.
        pipeline: folder of the pipeline that it is a part of; None for a model alone.
    """

    name: str
    transformer: Path
    pipeline: Path | None

    @cached_property
    def config(self) -> dict[str, Any]:
        """Options of the model."""
        saved = dict(FARTransformer3DModel.load_config(self.transformer))
        if saved.get("_class_name") != "FARTransformer3DModel":
            raise ValueError(
                f"pretrained={self.name!r} is a {saved.get('_class_name')}; it takes a FARTransformer3DModel"
            )
        with torch.device("meta"):  # which fills in options that an earlier version did not have
            return dict(FARTransformer3DModel.from_config(saved).config)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Options of the pipeline; none of a model alone."""
        return {} if self.pipeline is None else json.loads((self.pipeline / "model_index.json").read_text())

    @property
    def action_names(self) -> ActionNames | None:
        return self.settings.get("action_names")

    @property
    def num_training_frames(self) -> int | None:
        return self.settings.get("num_training_frames")

    @property
    def resolution(self) -> str | None:
        """Default height and width of its frames, as the option of this name."""
        size = self.settings.get("sample_size")
        return None if size is None else "x".join(map(str, [size] if isinstance(size, int) else size))

    def load(self) -> FARTransformer3DModel:
        return FARTransformer3DModel.from_pretrained(self.transformer)


def find_pretrained(name: str) -> Pretrained:
    """The pipeline, or the model alone, of a folder or of a repo of the Hub, which is downloaded.

    Raises:
        ValueError: where there is none.
    """
    try:
        place = locate(name)
    except ValueError:
        raise ValueError(
            f"pretrained={name!r} is neither a folder nor a repo id such as name/model"
        ) from None
    folder = Path(place)
    if not folder.exists():
        folder = Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    if (folder / "model_index.json").is_file():
        if not (folder / "transformer/config.json").is_file():
            raise ValueError(f"pretrained={name!r} is a pipeline without a transformer; it takes one of FAR")
        return Pretrained(name, folder / "transformer", folder)
    if (folder / "config.json").is_file():
        return Pretrained(name, folder, None)
    if (folder / "pytorch_lora_weights.safetensors").is_file():
        raise ValueError(f"pretrained={name!r} is a LoRA; it takes the pipeline that the LoRA is for")
    raise ValueError(
        f"pretrained={name!r} has neither model_index.json, as a pipeline, nor config.json, as a transformer"
    )


# ------------------------------------------------------------------------------------------------------------
# What is changed


@dataclass(frozen=True)
class Change:
    """What is changed in a trained model before it is trained on."""

    options: dict[str, Any]  # of its configuration
    replaced: frozenset[str] = frozenset()  # embedders that go, or come, or both
    # For each action, which one of the trained model it was; None: a new one. Empty: all are as they were.
    rows: tuple[int | None, ...] = ()
    action_names: ActionNames | None = None  # when it is done
    told: tuple[str, ...] = ()  # to the user


def plan_change(
    pretrained: Pretrained,
    sizes: ModelOptions,
    options: StartOptions,
    names_in_data: Sequence[str] = (),
    statistics: Mapping[str, Any] = MappingProxyType({}),
) -> Change:
    """What has to be changed for these sizes and names of actions.

    Args:
        names_in_data: of groups of actions, or of the numbers of vectors.
        statistics: `action_mean` and `action_std` of vectors.

    Raises:
        ValueError: for sizes that stay as they are, and for changes that an adapter cannot hold.
    """
    config, wanted, names = pretrained.config, sizes.given(), options.action_names
    if names is not None:
        wanted.setdefault("num_actions", len(names))
        check_action_names(names, wanted["num_actions"])
    changed = {name: value for name, value in wanted.items() if value != _plain(config[name])}
    becomes_long = config["long_patch_size"] is None and "long_patch_size" in changed
    may_change = {*ACTION_OPTIONS, "num_classes"}
    may_change |= {"long_patch_size", "short_window"} if becomes_long else set()
    for name, value in changed.items():
        if name not in may_change:
            raise ValueError(f"{name}={value}: the pretrained model has {_plain(config[name])}, which stays")
    told, replaced, other_actions = [], set(), bool(ACTION_OPTIONS & changed.keys())
    if "action_dim" in changed:
        changed |= dict.fromkeys(("action_mean", "action_std")) | dict(statistics)
    after = {**config, **changed}
    rows = match_names(pretrained.action_names, names) if isinstance(config["num_actions"], int) else ()
    if any(row is not None for row in rows):
        told += describe_rows(rows, names or [])
    elif rows or other_actions:
        rows = ()
        replaced.add("action_embedder")
        told.append(describe_replaced("actions", ActionSpace.of(config), ActionSpace.of(after)))
    if "num_classes" in changed:
        replaced.add("class_embedder")
        told.append(describe_replaced("classes", config["num_classes"], after["num_classes"]))
    if becomes_long:
        told.append("long-term frames: new; their projections start as those of short-term frames")
    if told and options.lora_rank is not None:
        raise ValueError(
            f"lora_rank={options.lora_rank}: an adapter leaves the model as it is, but of "
            f"{pretrained.name} would be changed: {'; '.join(told)}. Train without lora_rank, or on data "
            "that fits"
        )
    names_after: ActionNames | None = names
    if names is None and ActionSpace.of(after) is not None:
        names_after = (list(names_in_data) or None) if other_actions else pretrained.action_names
    return Change(changed, frozenset(replaced), rows, names_after, tuple(told))


def check_action_names(names: list[str], num_actions: Any) -> None:
    if len(set(names)) < len(names):
        raise ValueError(f"action_names={names} has a name twice")
    if len(names) != (num_actions or 0):
        raise ValueError(f"action_names={names} are {len(names)}; num_actions is {num_actions}")


def match_names(before: ActionNames | None, names: list[str] | None) -> tuple[int | None, ...]:
    """For each name, its place before; empty where nothing is named, or nothing has changed."""
    if not before or not names or before == names:
        return ()
    return tuple(before.index(name) if name in before else None for name in names)


def describe_rows(rows: Sequence[int | None], names: Sequence[str]) -> list[str]:
    kept = [name for name, row in zip(names, rows, strict=True) if row is not None]
    new = [name for name, row in zip(names, rows, strict=True) if row is None]
    return [f"actions: kept from the model: {', '.join(kept)}" + "; made anew: " * bool(new) + ", ".join(new)]


def describe_replaced(things: str, before: Any, after: Any) -> str:
    if not after:
        return f"{things}: none any more; the model becomes what it was where none was known"
    return f"{things}: {after}, all made anew; the model had {before or 'none'}"


def change_model(model: FARTransformer3DModel, change: Change) -> FARTransformer3DModel:
    """A model with the weights of a trained one, and the changes."""
    changed = FARTransformer3DModel.from_config(model.config, **change.options)
    weights, drawn = dict(model.state_dict()), changed.state_dict()
    for embedder in change.replaced:
        null = null_condition(model, embedder)
        weights = {name: weight for name, weight in weights.items() if not name.startswith(f"{embedder}.")}
        if null is not None:
            bias = "timestep_embedder.linear_2.bias"
            weights[bias] = weights[bias] + null  # it is a part of every frame now
        for name, weight in drawn.items():
            if name.startswith(f"{embedder}."):
                says_nothing = name.startswith((f"{embedder}.weight", f"{embedder}.linear_2"))
                weights[name] = torch.zeros_like(weight) if says_nothing else weight
    if change.rows:
        table = weights["action_embedder.weight"]
        rows = [table[-1 if row is None else row] for row in change.rows]
        weights["action_embedder.weight"] = torch.stack([*rows, table[-1]])
    if changed.is_long and not model.is_long:
        patch, ratio = model.config.patch_size, changed.config.long_patch_size // model.config.patch_size
        weights["context_embedder.weight"] = mean_of_tokens(weights["x_embedder.weight"], patch, ratio)
        weights["context_embedder.bias"] = weights["x_embedder.bias"]
        for name in drawn:
            layer = next((layer for layer in LONG_LAYERS if f".{layer}." in name), None)
            if layer is not None:
                weights[name] = weights[name.replace(layer, LONG_LAYERS[layer])]
    for name, weight in drawn.items():
        if name.startswith("interval_embedder."):  # which says nothing as it is drawn
            weights.setdefault(name, weight)
    changed.load_state_dict(weights)
    return changed


@torch.no_grad()
def null_condition(model: FARTransformer3DModel, embedder: str) -> Tensor | None:
    """What a model adds to every frame whose action (or class) is not known, `[D]`."""
    like = model.timestep_embedder.linear_2.bias[None, None]
    if embedder == "class_embedder":
        classes = model.class_embedder
        return None if classes is None else model._embed_labels(classes, None, like)[0, 0]
    return None if model.action_embedder is None else model._embed_actions(None, like)[0, 0]


def mean_of_tokens(weight: Tensor, patch: int, ratio: int) -> Tensor:
    """Embedding of a larger patch: what the mean of those of `ratio` x `ratio` patches in it would be.

    Args:
        weight: `[D, C * patch * patch]`.

    Returns:
        `[D, C * (ratio * patch) ** 2]`.
    """
    pixels = weight.unflatten(1, (-1, patch, patch))
    return (pixels.tile(1, 1, ratio, ratio) / ratio**2).flatten(1)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


# ------------------------------------------------------------------------------------------------------------
# LoRA


def add_lora(model: FARTransformer3DModel, rank: int) -> None:
    """Freeze a model, and give it an adapter to train, which at first changes nothing."""
    from peft import LoraConfig

    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=LORA_LAYERS))


def save_lora(model: FARTransformer3DModel, folder: Path) -> None:
    """Write a model's adapter as `FARVideoPipeline.load_lora_weights` reads it."""
    from peft.utils import get_peft_model_state_dict

    FARVideoPipeline.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(model),
        transformer_lora_adapter_metadata=model.peft_config["default"].to_dict(),
    )
