"""Encode every video of a videofolder once, so that training FAR reads latents instead of frames.

    python training/encode_latents.py DATA --autoencoder DIR --output LATENTS [--splits train validation]
    accelerate launch training/encode_latents.py DATA ...              # several processes share the videos

Writes LATENTS/<split>/<name of the video>.safetensors: `latents` float16 [T, C, h, w], **already scaled** by
scaling_factor, and where the data has them `actions` int64 [T] (`actions[t]` led to frame t) and `revisits`
int64 [T] (how many frames ago the view of frame t was last seen; 0 for never). The metadata of each file
identifies the autoencoder by a hash of the encoder's weights and the scaling factor. Finished files are kept,
so a run can be started again; a folder with latents of another autoencoder is refused.
"""

import argparse
import hashlib
import logging
import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from diffusers import AutoencoderDC
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout: this file is run as a script

from diffusers_far import read_video
from training.data.video_folder import Episode, list_episodes

HASH_KEY = "autoencoder_sha256"

logger = logging.getLogger("encode_latents")


def hash_autoencoder(autoencoder: AutoencoderDC) -> str:
    """Hash of what latents depend on: the encoder's weights and the scaling factor.

    The decoder is left out, so that latents stay valid when only the decoder was trained further.
    """
    digest = hashlib.sha256(repr(float(autoencoder.config.scaling_factor)).encode())
    for name, weight in sorted(autoencoder.encoder.state_dict().items()):
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().float().numpy().tobytes())
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


def check_same_autoencoder(output: Path, autoencoder_hash: str) -> None:
    """Refuse an output folder where any file is of another autoencoder."""
    for file in sorted(output.glob("*/*.safetensors")):
        try:
            with safe_open(file, framework="pt") as content:
                found = (content.metadata() or {}).get(HASH_KEY)
        except SafetensorError as error:
            raise ValueError(f"{file}: not a safetensors file: {error}") from error
        if found != autoencoder_hash:
            raise ValueError(
                f"output: got a folder whose {file} was encoded by another autoencoder ({HASH_KEY} {found}, "
                f"now {autoencoder_hash}); it takes a new folder, or latents of the same autoencoder"
            )


def encode_episode(
    autoencoder: AutoencoderDC, episode: Episode, file: Path, batch_size: int, autoencoder_hash: str
) -> None:
    """Write the latents and actions of one episode to `file`, which appears only when it is complete."""
    frames = torch.from_numpy(read_video(episode.video))
    per_frame = {"actions": episode.actions, "revisits": episode.revisits}
    tensors = {}
    for name, values in per_frame.items():
        if values is not None:
            if len(values) != len(frames):
                raise ValueError(f"{episode.video}: {len(frames)} frames, but {len(values)} {name}")
            tensors[name] = torch.tensor(values, dtype=torch.int64)
    tensors["latents"] = encode_video(autoencoder, frames, batch_size)
    partial = file.with_suffix(f".{os.getpid()}.partial")  # two runs by mistake do not write into one another
    save_file(tensors, partial, metadata={HASH_KEY: autoencoder_hash})
    partial.replace(file)


def encode_split(
    data: Path, split: str, autoencoder: AutoencoderDC, output: Path, batch_size: int, autoencoder_hash: str
) -> None:
    """Encode the episodes of a split that `output` lacks; each process takes its share of them."""
    (output / split).mkdir(parents=True, exist_ok=True)
    with PartialState().split_between_processes(list_episodes(data, split)) as episodes:
        for number, episode in enumerate(episodes, start=1):
            file = output / split / f"{episode.video.stem}.safetensors"
            if not file.exists():
                encode_episode(autoencoder, episode, file, batch_size, autoencoder_hash)
            if number % 50 == 0 or number == len(episodes):
                logger.info("%s: %d of %d episodes", split, number, len(episodes))


def parse_arguments(command_line: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="videofolder: <split>/*.mp4 and <split>/metadata.jsonl")
    parser.add_argument("--autoencoder", type=Path, required=True, help="folder that save_pretrained wrote")
    parser.add_argument("--output", type=Path, required=True, help="folder for the latents")
    parser.add_argument("--splits", nargs="+", default=["train", "validation"])
    parser.add_argument("--mixed_precision", choices=["no", "bf16"], default="no")
    parser.add_argument(
        "--batch_size", type=int, default=50, help="frames encoded at once (default: %(default)s)"
    )
    arguments = parser.parse_args(command_line)
    if arguments.batch_size < 1:
        raise ValueError(f"batch_size: got {arguments.batch_size}; it takes a positive number")
    if not (arguments.autoencoder / "config.json").is_file():
        raise ValueError(
            f"autoencoder: got {str(arguments.autoencoder)!r}; it takes a folder with config.json"
        )
    return arguments


def main(command_line: list[str]) -> None:
    arguments = parse_arguments(command_line)
    state = PartialState()
    autoencoder = AutoencoderDC.from_pretrained(arguments.autoencoder).to(state.device).eval()
    autoencoder.to(memory_format=torch.channels_last)
    autoencoder_hash = hash_autoencoder(autoencoder)
    check_same_autoencoder(arguments.output, autoencoder_hash)
    state.wait_for_everyone()  # nobody writes while another still looks
    with torch.autocast(state.device.type, torch.bfloat16, enabled=arguments.mixed_precision == "bf16"):
        for split in arguments.splits:
            encode_split(
                arguments.data, split, autoencoder, arguments.output, arguments.batch_size, autoencoder_hash
            )


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    main(sys.argv[1:])
