"""Continuations of held-out videos, sampled while a model trains, as files, numbers and what trackers show.

The model predicts the last frames of clips; the truth is what the autoencoder makes of their latents, so PSNR
measures the prediction alone, without the autoencoder's own error.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from ..demo import side_by_side, zoom_of
from ..metrics import psnr
from ..pipeline_far_video import FARVideoPipeline
from ..video_files import save_video
from .clips import LatentVideos

MOST_NEW_FRAMES = 16
MEASURED_FRAMES = (1, 4, 16)  # how far ahead, if so many are predicted
FRAME_RATE = 10.0  # of the files: latents do not tell that of their videos


class ValidationSamples:
    """Samples of held-out videos, the same ones each time, as many as the time allows and one at least.

    Args:
        videos: encoded, held out.
        num_frames: of a clip: the context, and up to half of it, at most 16 frames, that are predicted.
        seconds: after which no other video is begun.
        folder: for the files `step-<step>-<name>.mp4`, truth left, prediction right.
        seed: of the noise.
    """

    def __init__(
        self, videos: LatentVideos, num_frames: int, seconds: float, folder: Path, seed: int
    ) -> None:
        self.videos, self.seconds, self.folder, self.seed = videos, seconds, folder, seed
        self.num_frames = min(num_frames, max(videos.num_frames))
        self.num_new_frames = min(MOST_NEW_FRAMES, self.num_frames // 2)
        if self.num_new_frames < 1:
            raise ValueError("validation_seconds: clips of one frame; samples take two or more")

    def __call__(self, pipeline: FARVideoPipeline, accelerator: Accelerator, step: int) -> dict[str, float]:
        """Sample with a pipeline: mean PSNR in dB at 1, 4 and 16 frames ahead, and the number of videos."""
        started = time.monotonic()
        qualities: list[Tensor] = []
        self.folder.mkdir(exist_ok=True)
        for video, length in enumerate(self.videos.num_frames):
            if length < self.num_frames:
                continue
            if qualities and time.monotonic() - started >= self.seconds:
                break
            with accelerator.autocast():
                prediction, truth = self.continue_video(pipeline, video)
            new = slice(self.num_frames - self.num_new_frames, None)
            qualities.append(psnr(prediction[:, new], truth[:, new])[0])
            self.show(prediction[0], truth[0], video, accelerator, step)
        mean = torch.stack(qualities).mean(dim=0).tolist()
        ahead = {
            f"validation_psnr_{frame}": mean[frame - 1] for frame in MEASURED_FRAMES if frame <= len(mean)
        }
        return {**ahead, "validation_samples": float(len(qualities))}

    def continue_video(self, pipeline: FARVideoPipeline, video: int) -> tuple[Tensor, Tensor]:
        """Frames that begin as those of a video, and its own: `[1, F, 3, H, W]` each, in [0, 1]."""
        latents = self.videos.clip(video, 0, self.num_frames)[None].to(pipeline.device)
        actions, label = self.videos.actions[video], self.videos.class_labels[video]
        result: Any = pipeline(
            video_latents=latents[:, : self.num_frames - self.num_new_frames],
            num_frames=self.num_frames,
            actions=None if actions is None else actions[None, : self.num_frames],
            class_labels=None if label is None else label.reshape(1),
            generator=torch.Generator().manual_seed(self.seed),
            output_type="pt",
        )
        decoded = pipeline.decode_latents(latents[0])
        truth = pipeline.video_processor.postprocess(decoded, output_type="pt")
        return result.frames.float().cpu(), truth[None].float().cpu()

    def show(
        self, prediction: Tensor, truth: Tensor, video: int, accelerator: Accelerator, step: int
    ) -> None:
        """Write a video `[F, 3, H, W]` beside the truth, and give it to the trackers."""
        relative = self.videos.paths[video].relative_to(self.videos.folder).with_suffix("")
        name = "-".join(relative.parts)
        file = self.folder / f"step-{step:07d}-{name}.mp4"
        pictures = truth.movedim(1, -1).numpy(), prediction.movedim(1, -1).numpy()
        num_context = self.num_frames - self.num_new_frames
        zoom = zoom_of(*truth.shape[-2:])
        save_video(side_by_side(*pictures, num_context, zoom), file, FRAME_RATE)
        report(accelerator.trackers, f"samples/{name}", file, pictures, step)


def report(trackers: Sequence[Any], name: str, file: Path, pictures: Sequence[np.ndarray], step: int) -> None:
    """Show a sample in trackers: as a video or, in TensorBoard, frames in a row, the truth above."""
    for tracker in trackers:
        if tracker.name == "tensorboard":
            rows = [np.concatenate(frames, axis=1) for frames in pictures]
            tracker.writer.add_image(name, np.concatenate(rows), step, dataformats="HWC")
        elif tracker.name == "wandb":
            import wandb

            tracker.log({name: wandb.Video(str(file), format="mp4")}, step=step)
        elif tracker.name == "trackio":
            import trackio

            tracker.log({name: trackio.Video(str(file), format="mp4")}, step=step)
