"""Convert published FAR checkpoints to a pipeline folder, and back."""

import inspect
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor

from .key_map import published_state_dict, unused_shapes
from .pipeline_far_video import FARVideoPipeline
from .presets import convert_published_config, preset
from .single_file import (
    Model,
    load_checked,
    load_published_transformer,
    read_checkpoint,
    read_json_object,
)
from .transformer_far import FARTransformer3DModel
from .whole_files import written_whole


def read_autoencoder_config(file: Path) -> dict[str, Any]:
    """Arguments of `AutoencoderDC` from a JSON file as diffusers writes it."""
    content = read_json_object(file)
    config = {key: value for key, value in content.items() if not key.startswith("_")}
    class_name = content.get("_class_name", "AutoencoderDC")
    unknown = sorted(config.keys() - inspect.signature(AutoencoderDC.__init__).parameters.keys())
    if class_name != "AutoencoderDC" or unknown:
        problem = f"unknown keys {', '.join(unknown)}" if unknown else f"it is one of {class_name}"
        raise ValueError(f"{file}: not a configuration of AutoencoderDC: {problem}")
    return config


def convert(
    transformer_file: Path,
    autoencoder_file: Path,
    transformer_config: Mapping[str, Any],
    autoencoder_config: Mapping[str, Any],
    output: Path,
    flex_rope_slope: float = 0.0,
    sample_size: int | None = None,
    num_training_frames: int | None = None,
    dtype: torch.dtype | None = None,
) -> FARVideoPipeline:
    """Write the pipeline folder `output`, which must not exist or be empty; on any error nothing is left.

    Args:
        flex_rope_slope: the pipeline's default temporal decay.
        sample_size: the pipeline's default height and width in pixels.
        num_training_frames: frames of the longest clip that the model was trained with.
        dtype: of the weights written; None keeps those of the files.
    """
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise FileExistsError(f"{output}: exists already, and is not an empty folder")
    pipeline = FARVideoPipeline(
        transformer=load_published_transformer(
            FARTransformer3DModel,
            transformer_config,
            read_checkpoint(transformer_file),
            source=str(transformer_file),
            dtype=dtype,
        ),
        vae=load_checked(
            AutoencoderDC,
            autoencoder_config,
            read_checkpoint(autoencoder_file),
            source=str(autoencoder_file),
            dtype=dtype,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000),
        flex_rope_slope=flex_rope_slope,
        sample_size=sample_size,
        num_training_frames=num_training_frames,
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(output) as partial:
        pipeline.save_pretrained(partial)
    return pipeline


def convert_back(folder: Path, transformer_file: Path, autoencoder_file: Path | None = None) -> list[str]:
    """Write the weights of the pipeline in `folder` under their published names.

    Returns:
        The names of the tensors that are zeros because our model does not have them.
    """
    outputs = [transformer_file] if autoencoder_file is None else [transformer_file, autoencoder_file]
    if len(set(outputs)) < len(outputs):
        raise ValueError(f"{transformer_file}: named for both the transformer and the autoencoder")
    for file in outputs:
        if file.exists():
            raise FileExistsError(f"{file}: exists already")
    transformer = load_component(FARTransformer3DModel, folder / "transformer")
    space = transformer.action_space
    if space is not None and space.shape:
        raise ValueError(
            f"{folder} has actions that are {space}; published models have one integer per frame"
        )
    files = {transformer_file: published_state_dict(transformer.state_dict(), transformer.config)}
    if autoencoder_file is not None:
        files[autoencoder_file] = load_component(AutoencoderDC, folder / "vae").state_dict()
    write_checkpoints(files)
    return list(unused_shapes(transformer.config))


def load_component(model_class: type[Model], folder: Path) -> Model:
    """A component of a pipeline folder, its weights as stored (`from_pretrained` makes them float32)."""
    config = read_json_object(folder / "config.json")
    if config.get("_class_name") != model_class.__name__:
        raise ValueError(f"{folder} is a {config.get('_class_name')}, expected {model_class.__name__}")
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    return load_checked(model_class, config, read_checkpoint(weights), source=str(weights))


def write_checkpoints(files: Mapping[Path, dict[str, Tensor]]) -> None:
    """Write all files, or none: each beside its place first."""
    with ExitStack() as stack:  # renames when all are written
        for file, tensors in files.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = stack.enter_context(written_whole(file))
            if file.suffix == ".safetensors":
                safetensors.torch.save_file(tensors, partial)
            else:
                torch.save(tensors, partial)


def convert_files(
    transformer_file: Path,
    autoencoder_file: Path,
    output: Path,
    preset_name: str | None = None,
    config_file: Path | None = None,
    autoencoder_config_file: Path | None = None,
    num_training_frames: int | None = None,
    dtype: torch.dtype | None = None,
) -> FARVideoPipeline:
    """[`convert`], with the configurations of a preset, or of the two files.

    Args:
        preset_name: see [`preset`].
        config_file: JSON with the authors' keys.
        autoencoder_config_file: JSON with those of `AutoencoderDC`.
        num_training_frames: with the two files; a preset knows it.
    """
    slope, sample_size = 0.0, None
    autoencoder_config: Mapping[str, Any]
    if config_file is None or autoencoder_config_file is None:
        if preset_name is None:
            raise ValueError("needs a preset, or both configurations")
        published = preset(preset_name)
        transformer_config, autoencoder_config = published.transformer, published.autoencoder
        sample_size, num_training_frames = published.resolution, published.num_frames
    else:
        published_config = read_json_object(config_file)
        try:
            transformer_config, slope = convert_published_config(published_config)
        except ValueError as error:
            raise ValueError(f"{config_file}: {error}") from error
        autoencoder_config = read_autoencoder_config(autoencoder_config_file)
    return convert(
        transformer_file,
        autoencoder_file,
        transformer_config,
        autoencoder_config,
        output,
        flex_rope_slope=slope,
        sample_size=sample_size,
        num_training_frames=num_training_frames,
        dtype=dtype,
    )
