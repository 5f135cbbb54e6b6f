"""Calls of the pipeline under evaluation, which may be any with the call of FARVideoPipeline."""

import hashlib
import inspect
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..actions import ActionSpace
from ..inputs import action_tensor, check_size
from ..training.encode_latents import hash_autoencoder
from .clips import Clip, RealClip, RealVideos
from .protocols import EvaluateOptions

logger = logging.getLogger("evaluate")
NEEDED = ("video", "num_frames", "generator", "output_type")  # arguments that a pipeline must take
OWN = ("video", "video_latents", "num_frames", "actions", "class_labels", "generator", "output_type")


class Predictor:
    """A pipeline, with all that its calls have in common.

    It is given what it takes: actions and labels if its call has `actions` and `class_labels`, and if its
    `transformer`, where it has one, says that it knows them.

    Args:
        pipeline: called with `video` `[B, T, 3, H, W]` in [0, 1], `num_frames` (those T included),
            `generator` (one for each video) and `output_type="pt"`, and with `actions`, `class_labels`,
            `guidance_scale` and `num_inference_steps` where they are known. Without context, `height`,
            `width` and `batch_size` take the place of `video`. It returns `frames` `[B, num_frames, 3, H, W]`
            in [0, 1], or a tuple that begins with them.
        videos: what it will predict.
        options: of the evaluation.
        call_arguments: others for every call.

    Raises:
        ValueError: for a pipeline that cannot do it, and for actions that its model does not have.
    """

    def __init__(
        self,
        pipeline: Any,
        videos: RealVideos,
        options: EvaluateOptions,
        call_arguments: Mapping[str, Any] | None = None,
    ) -> None:
        self.pipeline, self.options = pipeline, options
        self.name = type(pipeline).__name__
        parameters = inspect.signature(pipeline.__call__).parameters
        takes_all = any(item.kind is inspect.Parameter.VAR_KEYWORD for item in parameters.values())
        self.known = {*parameters} | ({*OWN} if takes_all else set())
        needed = [*NEEDED, *(["video_latents"] if videos.are_latents else [])]
        if not options.context:
            needed += ["height", "width", "batch_size"]
        if missing := [name for name in needed if name not in self.known and not takes_all]:
            raise ValueError(f"pipeline: a call of {self.name} takes no {', '.join(missing)}")
        if videos.are_latents and not hasattr(pipeline, "decode_latents"):
            raise ValueError(f"data are latents, but {self.name} has no decode_latents; give the videos")
        self._check_autoencoder(videos)
        model = getattr(pipeline, "transformer", None)
        self.space: Any = getattr(model, "action_space", "unknown")
        num_classes = getattr(getattr(model, "config", None), "num_classes", "unknown")
        self.takes_actions = "actions" in self.known and self.space is not None
        self.takes_labels = "class_labels" in self.known and num_classes not in (None, 0)
        self.has_actions = self._check_actions(videos)
        self.has_labels = self.takes_labels and all(clip.class_label is not None for clip in videos.clips)
        self.arguments = self._common_arguments(dict(call_arguments or {}), takes_all)
        self._check_size()

    def _check_autoencoder(self, videos: RealVideos) -> None:
        vae = getattr(self.pipeline, "vae", None)
        # Rounded weights have another hash, though what they decode is much the same.
        if videos.autoencoder is None or vae is None or vae.dtype != torch.float32:
            return
        if hash_autoencoder(vae) != videos.autoencoder:
            logger.warning(
                "the latents were encoded by other weights than those of this pipeline's autoencoder: unless "
                "only their rounding differs, all figures are wrong"
            )

    def _check_actions(self, videos: RealVideos) -> bool:
        found = False
        if not self.takes_actions:
            return found
        for where, values in videos.actions:
            found = True
            if isinstance(self.space, ActionSpace):
                action_tensor(where, values[None], self.space, (1, len(values)), torch.device("cpu"))
        return found

    def _common_arguments(self, given: dict[str, Any], takes_all: bool) -> dict[str, Any]:
        options = self.options
        if owned := [name for name in OWN if name in given]:
            raise ValueError(f"call_arguments: {owned[0]} is what the evaluation gives itself")
        if unknown := [name for name in given if name not in self.known and not takes_all]:
            raise ValueError(f"call_arguments: a call of {self.name} takes no {', '.join(unknown)}")
        scale = given.get("guidance_scale", options.guidance_scale)
        if scale is None:
            scale = options.prescribed.guidance_scale if self.has_actions or self.has_labels else 1.0
        self.guidance_scale = float(scale)
        given |= {"guidance_scale": self.guidance_scale}
        if options.num_inference_steps is not None:
            given["num_inference_steps"] = options.num_inference_steps
        if "guidance_scale" not in self.known and not takes_all:
            if self.guidance_scale != 1:
                raise ValueError(f"guidance_scale={scale}: a call of {self.name} takes none; pass 1")
            del given["guidance_scale"]
        if "num_inference_steps" in given and "num_inference_steps" not in self.known and not takes_all:
            raise ValueError(f"num_inference_steps: a call of {self.name} takes none")
        return given

    def _check_size(self) -> None:
        size = self.options.frame_size
        if size is not None and (multiple := getattr(self.pipeline, "frame_multiple", None)):
            try:
                check_size(*size, multiple)
            except ValueError as error:
                raise ValueError(f"resolution={self.options.resolution}: {error}") from error

    @property
    def device(self) -> torch.device:
        return torch.device(getattr(self.pipeline, "device", "cpu"))

    @property
    def conditions(self) -> list[str]:
        """What the model is told besides frames."""
        known = {"actions": self.has_actions, "class labels": self.has_labels}
        return [name for name, is_given in known.items() if is_given]

    @property
    def default_resolution(self) -> str | None:
        """At which it works, as an option; None if it does not say."""
        height, width = getattr(self.pipeline, "default_size", (None, None))
        return None if height is None or width is None else f"{height}x{width}"

    def identity(self) -> str:
        """A hash of weights, configurations and arguments of calls."""
        digest = hashlib.sha256(repr((self.name, sorted(self.arguments.items()))).encode())
        for name, part in sorted(getattr(self.pipeline, "components", {}).items()):
            settings = {key: value for key, value in config_of(part).items() if not key.startswith("_")}
            digest.update(repr((name, type(part).__name__, sorted(settings.items(), key=repr))).encode())
            if isinstance(part, nn.Module):
                for key, tensor in sorted(part.state_dict().items()):
                    digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
                    values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
                    digest.update(values.numpy().tobytes())
        own = config_of(self.pipeline)
        defaults = ("num_inference_steps", "flex_rope_slope", "num_training_frames")
        digest.update(repr([own.get(name) for name in defaults]).encode())
        return digest.hexdigest()

    @torch.no_grad()
    def truth(self, real: RealClip) -> Tensor:
        """Frames `[T, 3, H, W]` in [0, 1], on the CPU."""
        if real.frames is not None:
            return real.frames
        assert real.latents is not None
        return self._decode(real.latents)

    @torch.no_grad()
    def reconstruction(self, real: RealClip) -> Tensor | None:
        """What the autoencoder makes of the frames to predict, `[F, 3, H, W]`; None if nothing is known."""
        parts = ("encode_video", "decode_latents")
        if real.frames is None or not all(hasattr(self.pipeline, name) for name in parts):
            return None
        frames = real.frames[self.options.context :]
        return self._decode(self.pipeline.encode_video(frames[:, None])[:, 0])  # frames as videos of one

    def _decode(self, latents: Tensor) -> Tensor:
        chunks = latents.to(self.device).split(max(1, self.options.batch_size))
        frames = torch.cat([self.pipeline.decode_latents(chunk) for chunk in chunks])
        return (frames / 2 + 0.5).clamp(0, 1).float().cpu()

    @torch.no_grad()
    def predict(self, items: Sequence[tuple[RealClip, int]]) -> Tensor:
        """Predicted frames `[B, F, 3, H, W]` in [0, 1], on the CPU, of clips with a seed each.

        The noise of a clip depends on its name and the seed only, not on what is predicted beside it.
        """
        options, context = self.options, self.options.context
        clips = [real for real, _ in items]
        shapes = {(clip.frames if clip.latents is None else clip.latents).shape for clip in clips}  # type: ignore[union-attr]
        if len(shapes) > 1:
            sizes = sorted({f"{shape[2]} x {shape[3]}" for shape in shapes})
            raise ValueError(f"resolution=None: videos have frames of {', '.join(sizes)} pixels; give one")
        arguments = dict(self.arguments)
        if context and clips[0].latents is not None:
            arguments["video_latents"] = torch.stack([clip.latents[:context] for clip in clips])  # type: ignore[index]
        elif context:
            arguments["video"] = torch.stack([clip.frames[:context] for clip in clips])  # type: ignore[index]
        else:
            height, width = self.truth(clips[0]).shape[-2:]
            arguments |= {"height": height, "width": width, "batch_size": len(clips)}
        if self.has_actions:
            if missing := [clip.clip.video for clip in clips if clip.actions is None]:
                raise ValueError(f"actions: {missing[0]} has none, and others do; or give ignore_actions")
            arguments["actions"] = torch.stack([clip.actions for clip in clips])  # type: ignore[misc]
        if self.has_labels:
            arguments["class_labels"] = torch.tensor([clip.clip.class_label for clip in clips])
        result = self.pipeline(
            num_frames=options.length,
            generator=[generator(clip.clip, seed) for clip, seed in items],
            output_type="pt",
            **arguments,
        )
        frames = result.frames if hasattr(result, "frames") else result[0]
        wanted = (len(items), options.length, 3)
        if not isinstance(frames, Tensor) or tuple(frames.shape[:3]) != wanted or frames.ndim != 5:
            found = tuple(frames.shape) if isinstance(frames, Tensor) else type(frames).__name__
            raise ValueError(f"pipeline: {self.name} returned frames {found}; it should be {wanted} and size")
        predicted = frames[:, context:].float().cpu()
        if not predicted.isfinite().all():
            raise ValueError(f"pipeline: {self.name} predicted NaN or infinite pixels")
        return predicted.clamp(0, 1)


def config_of(part: Any) -> dict[str, Any]:
    """The configuration of a pipeline or a part of it; empty where there is none that can be listed."""
    config: Any = getattr(part, "config", None)
    if hasattr(config, "to_dict"):  # of transformers
        config = config.to_dict()
    return dict(config) if isinstance(config, Mapping) else {}


def generator(clip: Clip, seed: int) -> torch.Generator:
    """Of the noise of one sample."""
    name = int.from_bytes(hashlib.sha256(clip.key.encode()).digest()[:8], "big")
    (state,) = np.random.SeedSequence([seed, name]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state))
