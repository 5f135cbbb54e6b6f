"""Encode every video of a source once, so that training FAR reads latents instead of frames.

    python -m training.encode_latents DATA --autoencoder DIR --output LATENTS [--resolution 64] [--fps 10]
    accelerate launch -m training.encode_latents DATA ...              # several processes share the videos
    python -m training.encode_latents DATA ... --shard 3/64            # so do several jobs, one part each

DATA is a folder of videos, a repo of the Hub, or anything else in docs/data.md. Writes
LATENTS/<split>/<name of the video>.safetensors (training/clips.py has the format). With `--fps` or
`--stride`, the action of a frame is the one that led to it from the frame before it in the video, and
`revisits` are left out.

The metadata of a file identify the autoencoder, by a hash of the encoder's weights and the scaling factor,
and the video with its actions, revisits and class label, and with the options that its frames depend on.
Finished files are kept, so a run can be started again; those whose video, actions or options have changed are
made anew.
A folder with latents of another autoencoder is refused.
"""

import hashlib
import json
import logging
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import MISSING, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate import PartialState
from diffusers import AutoencoderDC
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..whole_files import written_whole
from .clips import ACTION_NAMES_KEY, AUTOENCODER_KEY, stack_actions
from .episodes import Episode, Episodes
from .options import Count, FrameOptions, option, parse, script
from .sources import Source, open_source

EPISODE_KEY = "episode_sha256"  # in the metadata of a file of latents

logger = logging.getLogger("encode_latents")


@dataclass(kw_only=True)
class EncodeOptions(FrameOptions):
    """Options of the script."""

    autoencoder: str = option(MISSING, "folder that save_pretrained wrote")
    output: str = option(MISSING, "folder for the latents")
    splits: list[str] = option(["train", "validation"], "parts of the data to encode")
    mixed_precision: Literal["no", "bf16"] = option("no", "number format of the encoder")
    batch_size: Count = option(50, "frames encoded at once")
    ignore_actions: bool = option(False, "encode the videos without their actions")
    shard: str = option(
        "1/1", "part of the videos that this job encodes: 3/64 is the third of 64, for an array of jobs"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.part
        if not (Path(self.autoencoder) / "config.json").is_file():
            raise ValueError(f"autoencoder={self.autoencoder!r} must be a folder with config.json")

    @property
    def part(self) -> tuple[int, int]:
        """Number of the part, from 0, and of all parts."""
        found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", self.shard)
        if found is None or not 1 <= int(found[1]) <= int(found[2]):
            raise ValueError(f"shard={self.shard!r} must be a part of all parts, from 1 on, such as 3/64")
        return int(found[1]) - 1, int(found[2])


def processes() -> PartialState:
    """Those that share the work; on CPUs they know nothing of each other unless told that it is CPUs."""
    return PartialState(cpu=not torch.accelerator.is_available())


def hash_autoencoder(autoencoder: AutoencoderDC) -> str:
    """Hash of what latents depend on: the encoder's weights and the scaling factor.

    The decoder is left out, so that latents stay valid when only the decoder was trained further.
    """
    digest = hashlib.sha256(repr(float(autoencoder.config.scaling_factor)).encode())
    for name, weight in sorted(autoencoder.encoder.state_dict().items()):
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().float().numpy().tobytes())
    return digest.hexdigest()


def hash_episode(episode: Episode, options: FrameOptions) -> str:
    """Hash of a video, what is known of it, and which of its frames are used."""
    digest = episode.video.digest()
    digest.update(repr((episode.actions, episode.revisits, episode.class_label)).encode())
    digest.update(options.identity.encode())
    return str(digest.hexdigest())


@torch.no_grad()
def encode_frames(autoencoder: AutoencoderDC, frames: list[np.ndarray]) -> Tensor:
    """Scaled latents, float16 [T, C, h, w] on the CPU, of uint8 frames [H, W, 3]."""
    pixels = torch.from_numpy(np.stack(frames)).to(autoencoder.device)
    inputs = 2 * (pixels.movedim(-1, 1).float() / 255) - 1
    encoded = autoencoder.encode(inputs).latent.float() * autoencoder.config.scaling_factor
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
    autoencoder: AutoencoderDC, episode: Episode, file: Path, options: EncodeOptions, metadata: dict[str, str]
) -> None:
    """Write latents and labels of an episode to `file`, which appears when it is complete."""
    factor = autoencoder.spatial_compression_ratio
    numbers: list[int] = []
    latents: list[np.ndarray] = []
    frames = episode.frames(options)
    while batch := list(islice(frames, options.batch_size)):
        height, width = batch[0][1].shape[:2]
        if height % factor or width % factor:
            raise ValueError(
                f"{episode.where}: frames of {height} x {width} pixels; it takes multiples of {factor}, or "
                "give a resolution"
            )
        numbers += [number for number, _ in batch]
        latents.append(encode_frames(autoencoder, [frame for _, frame in batch]).numpy())
    tensors = {"latents": torch.from_numpy(np.concatenate(latents))}
    if (actions := episode.actions) is not None:
        tensors["actions"] = stack_actions(actions)[numbers]
    if episode.revisits is not None and numbers == list(range(len(episode.revisits))):
        tensors["revisits"] = torch.tensor(episode.revisits, dtype=torch.int64)
    if episode.class_label is not None:
        tensors["class_label"] = torch.tensor(episode.class_label, dtype=torch.int64)
    file.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(file) as unfinished:
        save_file(tensors, unfinished, metadata=metadata)


def encode_split(
    autoencoder: AutoencoderDC,
    episodes: Episodes,
    split: str,
    options: EncodeOptions,
    own: str,
    encoded: Callable[[int], None] = lambda number: None,
) -> None:
    """Encode the episodes of a split that the output lacks; each process of each job takes its share.

    Args:
        own: hash of the autoencoder.
        encoded: called with the number of episodes that this process has been through.
    """
    folder = Path(options.output) / split
    files = [folder / f"{name}.safetensors" for name in episodes.names]
    if twice := [str(file) for file, number in Counter(files).items() if number > 1]:
        raise ValueError(f"two videos would both become {twice[0]}: rename one")
    if strange := sorted(set(folder.rglob("*.safetensors")) - set(files)):
        names = ", ".join(str(file) for file in strange[:10])
        raise ValueError(f"output: {len(strange)} files are of no video of {split}: {names}; remove them")
    state, (part, num_parts) = processes(), options.part
    own_share = part * state.num_processes + state.process_index
    number = 0
    for index, episode in enumerate(episodes):
        if index % (num_parts * state.num_processes) != own_share:
            continue
        file = folder / f"{episode.name}.safetensors"
        metadata = {AUTOENCODER_KEY: own, EPISODE_KEY: hash_episode(episode, options)}
        if called := episode.action_names:
            metadata[ACTION_NAMES_KEY] = json.dumps(called)
        if not file.exists() or read_metadata(file) != metadata:
            encode_episode(autoencoder, episode, file, options, metadata)
        number += 1
        encoded(number)
        if number % 50 == 0:
            logger.info("%s: %d of %d episodes", split, number, len(episodes))
    logger.info("%s: %d of %d episodes", split, number, len(episodes))


def encode(
    source: Source, options: EncodeOptions, encoded: Callable[[str, int], None] = lambda split, number: None
) -> None:
    """Encode what the output lacks of a source.

    Args:
        encoded: called with a split and the number of its episodes that this process has been through.
    """
    state = processes()
    autoencoder = AutoencoderDC.from_pretrained(options.autoencoder).to(state.device).eval()
    autoencoder.to(memory_format=torch.channels_last)
    own = hash_autoencoder(autoencoder)
    if state.is_main_process:
        claim_folder(Path(options.output), own)
    state.wait_for_everyone()
    with torch.autocast(state.device.type, torch.bfloat16, enabled=options.mixed_precision == "bf16"):
        for split in options.splits:
            encode_split(autoencoder, source.split(split), split, options, own, partial(encoded, split))


def main(command_line: list[str]) -> None:
    data, options = parse(command_line, (EncodeOptions,), __doc__, positional="data")
    source = open_source(data, options.ignore_actions, options.camera)
    if "validation" not in options.splits:
        source = replace(source, holds_out=False)  # all that there is, then
    if processes().is_main_process:
        for line in source.describe(options).splitlines():
            logger.info(line)
    encode(source, options)


if __name__ == "__main__":
    with script():
        main(sys.argv[1:])
