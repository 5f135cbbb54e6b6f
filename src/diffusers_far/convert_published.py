r"""Convert published FAR checkpoints to a pipeline folder of diffusers-far, and back.

    diffusers-far convert FAR.pth --autoencoder DCAE.pth --preset far-b-long-dmlab --output DIR
    diffusers-far convert FAR.pth --autoencoder DCAE.pth --config FAR.json --autoencoder-config DCAE.json \
        --output DIR
    diffusers-far convert --reverse DIR --output FAR.pth --autoencoder DCAE.pth

In a checkout, `python conversion/convert_far.py` does the same. The files are PyTorch or safetensors files.
FAR.json has the authors' keys (`short_term_ctx_winsize`, `condition_cfg`, `context_patch_size`, ...); a
`slope_scale` other than 0 becomes the pipeline's default `flex_rope_slope`. DCAE.json is a configuration of
diffusers' `AutoencoderDC`. Every tensor must be known and of the right shape, or nothing is written.

The way back writes the published names. Our models do not have `context_proj_out`, which published Long files
have and neither loss nor sampling uses: it is written as zeros, so that the authors' code loads the file.
"""

import argparse
import inspect
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from torch import Tensor

from .key_map import published_state_dict, unused_shapes
from .pipeline_far_video import FARVideoPipeline
from .presets import PRESETS, convert_published_config, preset
from .single_file import (
    Model,
    load_checked,
    load_published_transformer,
    read_checkpoint,
    read_json_object,
)
from .transformer_far import FARTransformer3DModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as temporary:
        pipeline.save_pretrained(Path(temporary) / "pipeline")
        if output.is_dir():
            output.rmdir()  # empty, and in the way of a rename on Windows
        (Path(temporary) / "pipeline").rename(output)
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
    with ExitStack() as stack:
        written = {}
        for file, tensors in files.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix=".convert-", dir=file.parent))
            written[file] = Path(folder) / file.name
            if file.suffix == ".safetensors":
                safetensors.torch.save_file(tensors, written[file])
            else:
                torch.save(tensors, written[file])
        for file, temporary in written.items():
            temporary.rename(file)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage=argparse.SUPPRESS
    )
    parser.add_argument("transformer", type=Path, nargs="?", metavar="FAR.pth", help="published transformer")
    parser.add_argument("--autoencoder", type=Path, metavar="DCAE.pth", help="published autoencoder")
    parser.add_argument("--preset", choices=PRESETS, metavar="NAME", help=f"one of {', '.join(PRESETS)}")
    parser.add_argument("--config", type=Path, metavar="FAR.json", help="the authors' configuration")
    parser.add_argument("--autoencoder-config", type=Path, metavar="DCAE.json", help="of AutoencoderDC")
    parser.add_argument(
        "--num-training-frames",
        type=int,
        help="of the longest training clip; with --config (default: unknown)",
    )
    parser.add_argument("--reverse", type=Path, metavar="DIR", help="convert this pipeline folder back")
    parser.add_argument(
        "--output", type=Path, required=True, help="pipeline folder, or FAR.pth with --reverse"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights written; as in the files by default")
    options = parser.parse_args(arguments)

    configs = (options.config, options.autoencoder_config)
    if options.reverse is not None:
        if options.transformer or options.preset or options.dtype or any(configs):
            parser.error("--reverse goes with --output and --autoencoder only")
    elif options.transformer is None or options.autoencoder is None:
        parser.error("needs FAR.pth and --autoencoder DCAE.pth")
    elif (options.preset is None and not all(configs)) or (options.preset is not None and any(configs)):
        parser.error("needs either --preset, or both --config and --autoencoder-config")
    if options.num_training_frames is not None and options.config is None:
        parser.error("--num-training-frames goes with --config: presets know it")
    return options


def run(options: argparse.Namespace) -> None:
    """Do what the command line asks for."""
    if options.reverse is not None:
        zeros = convert_back(options.reverse, options.output, options.autoencoder)
        print(f"{options.output}: written" + (f", with zeros for {', '.join(zeros)}" if zeros else ""))
        return
    slope, sample_size, num_training_frames = 0.0, None, options.num_training_frames
    autoencoder_config: Mapping[str, Any]
    if options.preset is not None:
        published = preset(options.preset)
        transformer_config, autoencoder_config = published.transformer, published.autoencoder
        sample_size, num_training_frames = published.resolution, published.num_frames
    else:
        published_config = read_json_object(options.config)
        try:
            transformer_config, slope = convert_published_config(published_config)
        except ValueError as error:
            raise ValueError(f"{options.config}: {error}") from error
        autoencoder_config = read_autoencoder_config(options.autoencoder_config)
    pipeline = convert(
        options.transformer,
        options.autoencoder,
        transformer_config,
        autoencoder_config,
        options.output,
        flex_rope_slope=slope,
        sample_size=sample_size,
        num_training_frames=num_training_frames,
        dtype=DTYPES.get(options.dtype),
    )
    millions = sum(parameter.numel() for parameter in pipeline.transformer.parameters()) / 1e6
    print(f"{options.output}: written, transformer of {millions:.1f} million parameters")


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = parse_arguments(arguments)
    try:
        run(options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        print(f"convert: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0
