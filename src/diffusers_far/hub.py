"""What goes to the Hub beside the weights: a model card that is filled in."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import PushToHubMixin
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError
from torch.utils.flop_counter import FlopCounterMode

from .inputs import describe_actions
from .kv_cache import Slot

TEMPLATE = Path(__file__).with_name("model_card.md")
NOT_STATED = "Not stated."
MARKER = "<!-- Written by diffusers_far, which renews it. To keep changes of your own, remove this line. -->"
TAGS = ["diffusers", "far", "video-prediction", "world-model"]


def describe_model(model: Any) -> dict[str, Any]:
    """Names and figures of a FARTransformer3DModel."""
    config = model.config
    width = config.num_attention_heads * config.attention_head_dim
    figures = {
        "model": f"FAR {'Long' if model.is_long else 'base'}, {config.num_layers} layers, width {width}, "
        f"{config.num_attention_heads} heads",
        "parameters": f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f} million",
        "window": f"{config.short_window} frames" if model.is_long else "all frames",
        "classes": config.num_classes,
        "actions": None if model.action_space is None else str(model.action_space),
        "any-step": "yes (use_meanflow)" if config.use_meanflow else "no",
    }
    return {name: value for name, value in figures.items() if value is not None}


def describe_pipeline(pipeline: Any) -> dict[str, Any]:
    """Names and figures of a FARVideoPipeline, at its default size, or 64 x 64 pixels if it has none."""
    model, config = pipeline.transformer, pipeline.transformer.config
    height, width = (side or 64 for side in pipeline.default_size)
    grid = (height // pipeline.vae_scale_factor, width // pipeline.vae_scale_factor)
    dim = config.num_attention_heads * config.attention_head_dim
    long_tokens, short_tokens = model.tokens_per_frame(*grid)
    kilobytes = 2 * config.num_layers * dim * 4 / 1024  # keys and values of a token in float32
    figures = describe_model(model)
    if pipeline.config.action_names and model.action_space is not None:
        figures["actions"] = describe_actions(pipeline.config.action_names, model.action_space)
    vae_parameters = sum(parameter.numel() for parameter in pipeline.vae.parameters())
    figures |= {
        "autoencoder": f"{vae_parameters / 1e6:.1f} million parameters",
        "frames": f"{height} x {width} pixels, {config.in_channels} x {grid[0]} x {grid[1]} latents",
        "tokens of a frame": f"{short_tokens}" + (f", long-term {long_tokens}" if model.is_long else ""),
        "cache of a frame": f"{short_tokens * kilobytes:.0f} kB"
        + (f", long-term {long_tokens * kilobytes:.0f} kB" if model.is_long else "")
        + " in float32",
        "operations": f"{count_flops(model, grid) / 1e9:.2f} GFLOP for a denoising step after 16 frames",
    }
    defaults = ("num_training_frames", "num_inference_steps", "flex_rope_slope", "sample_size")
    return figures | {name: pipeline.config[name] for name in defaults}


@torch.no_grad()
def count_flops(model: Any, grid: tuple[int, int], num_context: int = 16) -> int:
    """Floating-point operations of a denoising step of one video after `num_context` short-term frames.

    Args:
        grid: height and width of the latents.
    """
    cache = model.create_cache(1, *grid)
    shape = (model.config.in_channels, *grid)
    context = torch.zeros(1, num_context, *shape, device=model.device, dtype=model.dtype)
    clean = torch.full((1, num_context), -1.0, device=model.device)
    model(context, clean, cache=cache, num_long_frames=0)
    cache.commit([Slot(frame, is_long=False, position=frame) for frame in range(num_context)])
    with FlopCounterMode(display=False) as counter:
        model(context[:, :1], clean[:, :1] * 0 + 500, cache=cache)
    return int(counter.get_total_flops())


def fill_model_card(
    model: Any,
    repo_id: str,
    card_data: ModelCardData | None = None,
    summary: str = "",
    usage: str = "frames = pipe(num_frames=32).frames[0]",
    training: str = NOT_STATED,
    evaluation: str = NOT_STATED,
    limits: str = NOT_STATED,
    name: str | None = None,
) -> ModelCard:
    """The card of `model_card.md` for a pipeline or a transformer.

    Args:
        model: FARVideoPipeline or FARTransformer3DModel.
        repo_id: where it is to be loaded from.
        card_data: license, datasets, metrics (`eval_results`) and the like; tags are added.
        summary, usage, training, evaluation, limits: Markdown of the sections; usage is Python.
        name: title; by default the last part of `repo_id`.
    """
    is_pipeline = hasattr(model, "transformer")
    facts = describe_pipeline(model) if is_pipeline else describe_model(model)
    return _fill_template(
        card_data or ModelCardData(),
        name=name or repo_id.rpartition("/")[2],
        repo=repo_id,
        class_name=type(model).__name__,
        variable="pipe" if is_pipeline else "model",
        summary=summary,
        usage=usage if is_pipeline else "",
        facts=_as_list(facts),
        training=training,
        evaluation=evaluation,
        limits=limits,
    )


def fill_lora_card(
    model: Any,
    base: str,
    repo_id: str,
    training: str = NOT_STATED,
    evaluation: str = NOT_STATED,
    name: str | None = None,
) -> ModelCard:
    """The card of a LoRA.

    Args:
        model: the FARTransformer3DModel that has it, all else frozen.
        base: folder or repo of the pipeline that it is for.
        repo_id: where the LoRA is to be loaded from.
        training, evaluation: Markdown of the sections.
        name: title; by default the last part of `repo_id`.
    """
    sizes = {True: 0, False: 0}
    for parameter in model.parameters():
        sizes[parameter.requires_grad] += parameter.numel()
    rank = next(iter(model.peft_config.values())).r
    facts = describe_model(model) | {
        "parameters": f"{sizes[False] / 1e6:.1f} million",
        "adapter": f"LoRA of rank {rank}, {sizes[True] / 1e6:.2f} million parameters",
    }
    card_data = ModelCardData(tags=["lora"])
    if not Path(base).exists():
        card_data.base_model = base
    return _fill_template(
        card_data,
        name=name or repo_id.rpartition("/")[2],
        repo=base,
        class_name="FARVideoPipeline",
        variable="pipe",
        summary=f"A LoRA for {base}.",
        usage=f'pipe.load_lora_weights("{repo_id}")\nframes = pipe(num_frames=32).frames[0]',
        facts=_as_list(facts),
        training=training,
        evaluation=evaluation,
        limits=NOT_STATED,
    )


def _as_list(facts: dict[str, Any]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in facts.items())


def _fill_template(card_data: ModelCardData, **sections: str) -> ModelCard:
    card_data.library_name, card_data.pipeline_tag = "diffusers", "image-to-video"
    card_data.tags = sorted({*(card_data.tags or []), *TAGS})
    return ModelCard.from_template(card_data, template_path=str(TEMPLATE), **sections)


def automatic_card(model: Any, repo_id: str) -> str:
    """A card that nobody has written to: a later upload renews it."""
    card = fill_model_card(model, repo_id)
    card.text = f"\n{MARKER}\n{card.text}"
    return str(card)


def upload_folder(
    model: Any,
    working_dir: str | os.PathLike[str],
    repo_id: str,
    token: str | None = None,
    subfolder: str | None = None,
    **kwargs: Any,
) -> Any:
    """The last step of diffusers' `push_to_hub`, with our model card in place of its bare one.

    A repository keeps a card that people have written; one of ours is renewed.

    Args:
        model: FARVideoPipeline or FARTransformer3DModel.
        working_dir: what diffusers has saved, and is to be uploaded.
        repo_id: "name/repository".
        token: by default the one of `hf auth login`.
        subfolder: where in the repository; the card is written only if it is the root.
        kwargs: `commit_message` and `create_pr`.
    """
    card = Path(working_dir) / "README.md"  # the repository's own, where it has one
    if not subfolder and card.is_file():
        is_ours = MARKER in card.read_text(encoding="utf-8")
        if is_ours or not HfApi(token=token).file_exists(repo_id, card.name):
            card.write_text(automatic_card(model, repo_id), encoding="utf-8")
    return PushToHubMixin._upload_folder(
        model, working_dir, repo_id, token=token, subfolder=subfolder, **kwargs
    )


def push_folder(
    folder: str | os.PathLike[str],
    repo_id: str,
    pipeline: Any,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
    sample_video: str | os.PathLike[str] | None = None,
) -> str:
    """Upload a pipeline's folder as it is, in one commit, with a model card where people have written none.

    Args:
        folder: of the pipeline.
        repo_id: "name/repository"; created where it does not exist.
        pipeline: loaded from the folder, for the card.
        private: whether a new repository is.
        revision: branch; created where it does not exist.
        token: by default the one of `hf auth login`.
        sample_video: file to add as `sample.mp4`.

    Returns:
        Address of the commit.
    """
    api = HfApi(token=token)
    repo_id = str(api.create_repo(repo_id, private=private, exist_ok=True).repo_id)
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    files = visible_files(folder)
    if "README.md" in files and MARKER in files["README.md"].read_text(encoding="utf-8"):
        del files["README.md"]
    operations = [CommitOperationAdd(name, path) for name, path in files.items()]
    if "README.md" not in files and not is_written_by_people(api, repo_id, revision):
        card = automatic_card(pipeline, repo_id)
        operations.append(CommitOperationAdd("README.md", card.encode()))
    if sample_video is not None:
        operations.append(CommitOperationAdd("sample.mp4", Path(sample_video)))
    message = f"Upload {type(pipeline).__name__}"
    return str(api.create_commit(repo_id, operations, commit_message=message, revision=revision).commit_url)


def visible_files(folder: str | os.PathLike[str]) -> dict[str, Path]:
    """The files of a folder by their names in it, hidden ones left out."""
    return {
        path.relative_to(folder).as_posix(): path
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }


@contextmanager
def told_in_our_words(repo_id: str) -> Iterator[None]:
    """What the Hub refuses becomes a ValueError that names the repository and what helps."""
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        said = error.server_message or " ".join(str(error).split())
        if status in (401, 403):
            raise ValueError(
                f"{repo_id}: the Hub does not let you ({status}: {said}). It takes a token that may do this: "
                "`hf auth login`, or --token"
            ) from error
        raise ValueError(f"{repo_id}: the Hub answers {status}: {said}") from error


def is_written_by_people(api: HfApi, repo_id: str, revision: str | None) -> bool:
    """Whether a repository has a card that is not one of ours."""
    if not api.file_exists(repo_id, "README.md", revision=revision):
        return False
    card = api.hf_hub_download(repo_id, "README.md", revision=revision)
    return MARKER not in Path(card).read_text(encoding="utf-8")
