"""Encode every video of a videofolder once, so that training FAR reads latents instead of frames.

    python -m training.encode_latents DATA --autoencoder DIR --output LATENTS [--splits train validation]
    accelerate launch -m training.encode_latents DATA ...              # several processes share the videos

Writes LATENTS/<split>/<name of the video>.safetensors (training/clips.py has the format). The metadata of a
file identify the autoencoder, by a hash of the encoder's weights and the scaling factor, and the video with
its actions, revisits and class label. Finished files are kept, so a run can be started again; those whose
video or actions have changed are made anew. A folder with latents of another autoencoder is refused.
"""

import hashlib
import logging
import sys
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Literal

import torch
from accelerate import PartialState
from diffusers import AutoencoderDC
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffusers_far import read_video
from diffusers_far.whole_files import written_whole
from training.clips import AUTOENCODER_KEY, Episode, list_episodes
from training.options import Count, check_ranges, option, parse, script

EPISODE_KEY = "episode_sha256"  # in the metadata of a file of latents

logger = logging.getLogger("encode_latents")


@dataclass(kw_only=True)
class EncodeOptions:
    """Options of the script."""

    autoencoder: str = option(MISSING, "folder that save_pretrained wrote")
    output: str = option(MISSING, "folder for the latents")
    splits: list[str] = option(["train", "validation"], "folders of the data to encode")
    mixed_precision: Literal["no", "bf16"] = option("no", "number format of the encoder")
    batch_size: Count = option(50, "frames encoded at once")

    def __post_init__(self) -> None:
        check_ranges(self)
        if not (Path(self.autoencoder) / "config.json").is_file():
            raise ValueError(f"autoencoder={self.autoencoder!r} must be a folder with config.json")


def hash_autoencoder(autoencoder: AutoencoderDC) -> str:
    """Hash of what latents depend on: the encoder's weights and the scaling factor.

    The decoder is left out, so that latents stay valid when only the decoder was trained further.
    """
    digest = hashlib.sha256(repr(float(autoencoder.config.scaling_factor)).encode())
    for name, weight in sorted(autoencoder.encoder.state_dict().items()):
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().float().numpy().tobytes())
    return digest.hexdigest()


def hash_episode(episode: Episode) -> str:
    """Hash of a video file and what is known of it."""
    with episode.video.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(repr((episode.actions, episode.revisits, episode.class_label)).encode())
    return digest.hexdigest()


@torch.no_grad()
def encode_video(autoencoder: AutoencoderDC, frames: Tensor, batch_size: int) -> Tensor:
    """Scaled latents, float16 [T, C, h, w] on the CPU, of uint8 frames [T, H, W, 3]."""
    latents = []
    for chunk in frames.split(batch_size):
        inputs = 2 * (chunk.to(autoencoder.device).movedim(-1, 1).float() / 255) - 1
        latents.append(autoencoder.encode(inputs).latent.float() * autoencoder.config.scaling_factor)
    encoded = torch.cat(latents)
    half = encoded.half()
    if not half.isfinite().all():
        raise ValueError(
            f"latents up to {encoded.abs().max().item()} do not fit float16: is scaling_factor set?"
        )
    return half.cpu().contiguous()


def claim_folder(output: Path, autoencoder_hash: str) -> None:
    """Make the folder one of this autoencoder, before another script that has just begun can."""
    output.mkdir(parents=True, exist_ok=True)
    claim = output / f".autoencoder-{autoencoder_hash[:16]}"
    claim.touch()
    others = [file for file in output.glob(".autoencoder-*") if file != claim]
    files = (file for file in sorted(output.rglob("*.safetensors")))
    others += (file for file in files if read_metadata(file).get(AUTOENCODER_KEY) != autoencoder_hash)
    if others:
        claim.unlink()
        raise ValueError(
            f"output: {others[-1]} is of another autoencoder than {autoencoder_hash[:16]}; it takes a new "
            "folder, or latents of the same autoencoder"
        )


def read_metadata(file: Path) -> dict[str, str]:
    try:
        with safe_open(file, framework="pt") as content:
            return content.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{file} is not a safetensors file: {error}; remove it") from error


def encode_episode(
    autoencoder: AutoencoderDC, episode: Episode, file: Path, batch_size: int, metadata: dict[str, str]
) -> None:
    """Write latents and labels of an episode to `file`, which appears when it is complete."""
    frames = torch.from_numpy(read_video(episode.video))
    height, width, factor = *frames.shape[1:3], autoencoder.spatial_compression_ratio
    if height % factor or width % factor:
        raise ValueError(
            f"{episode.video}: frames of {height} x {width} pixels; it takes multiples of {factor}"
        )
    tensors = {}
    for name, values in (("actions", episode.actions), ("revisits", episode.revisits)):
        if values is not None:
            if len(values) != len(frames):
                raise ValueError(f"{episode.video}: {len(frames)} frames, but {len(values)} {name}")
            tensors[name] = torch.tensor(values, dtype=torch.int64)
    if episode.class_label is not None:
        tensors["class_label"] = torch.tensor(episode.class_label, dtype=torch.int64)
    tensors["latents"] = encode_video(autoencoder, frames, batch_size)
    file.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(file) as partial:
        save_file(tensors, partial, metadata=metadata)


def encode_split(
    autoencoder: AutoencoderDC, data: Path, split: str, options: EncodeOptions, own: str
) -> None:
    """Encode the episodes of a split that the output lacks; each process takes its share of them."""
    folder = Path(options.output) / split
    files: dict[Path, Episode] = {}
    for episode in list_episodes(data, split):
        name = episode.video.relative_to(data / split)
        file = folder / name.parent / f"{name.stem}.safetensors"
        if file in files:
            raise ValueError(f"{episode.video} and {files[file].video} would both become {file}: rename one")
        files[file] = episode
    if strange := sorted(set(folder.rglob("*.safetensors")) - set(files)):
        names = ", ".join(str(file) for file in strange[:10])
        raise ValueError(
            f"output: {len(strange)} files are of no video of {data / split}: {names}; remove them"
        )
    with PartialState().split_between_processes(list(files.items())) as share:
        for number, (file, episode) in enumerate(share, start=1):
            metadata = {AUTOENCODER_KEY: own, EPISODE_KEY: hash_episode(episode)}
            if not file.exists() or read_metadata(file) != metadata:
                encode_episode(autoencoder, episode, file, options.batch_size, metadata)
            if number % 50 == 0 or number == len(share):
                logger.info("%s: %d of %d episodes", split, number, len(share))


def main(command_line: list[str]) -> None:
    data, options = parse(command_line, (EncodeOptions,), __doc__, positional="data")
    state = PartialState()
    autoencoder = AutoencoderDC.from_pretrained(options.autoencoder).to(state.device).eval()
    autoencoder.to(memory_format=torch.channels_last)
    own = hash_autoencoder(autoencoder)
    if state.is_main_process:
        claim_folder(Path(options.output), own)
    state.wait_for_everyone()
    with torch.autocast(state.device.type, torch.bfloat16, enabled=options.mixed_precision == "bf16"):
        for split in options.splits:
            encode_split(autoencoder, Path(data), split, options, own)


if __name__ == "__main__":
    with script():
        main(sys.argv[1:])
