"""What published papers prescribe: how many frames are given and predicted, of which videos, how often.

| protocol | what is measured |
|---|---|
| `next` | the next frame and the 15 after it, of observed video with its actions |
| `latte` | generated videos, of the classes of real ones where there are any (Latte, arXiv 2401.03048) |
| `mcvd` | the best of many predictions of short videos (MCVD, arXiv 2205.09853) |
| `teco` | long predictions after a long context (TECO, arXiv 2210.02396) |
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal, get_args

from ..fvd import LEAST_FRAMES
from ..training.options import (
    Count,
    CountOrZero,
    FrameOptions,
    NotNegative,
    option,
)

ProtocolName = Literal["next", "latte", "mcvd", "teco"]
MEASURES = ("psnr", "ssim", "lpips", "fvd")


@dataclass(frozen=True)
class Protocol:
    """Numbers that options replace one by one."""

    num_context: int  # real frames that are given
    num_frames: int  # of a video, the given ones included
    num_videos: int | None  # None: all
    seeds: tuple[int, ...] = (0,)  # one for each sample of a video
    guidance_scale: float = 1.0  # of models with a condition
    measures: tuple[str, ...] = MEASURES
    split: str = "validation"
    balanced: bool = False  # as many videos of each class
    fvd_frames: Literal["all", "new"] = "all"  # all: the given frames, too, which are equal in both videos


PROTOCOLS: dict[str, Protocol] = {
    "next": Protocol(32, 48, None, fvd_frames="new"),
    "latte": Protocol(
        0, 16, 2048, (0, 2, 4, 6), guidance_scale=2.0, measures=("fvd",), split="train", balanced=True
    ),
    "mcvd": Protocol(4, 16, 256, tuple(range(100))),
    "teco": Protocol(144, 300, 256, tuple(range(4)), guidance_scale=1.5),
}


@dataclass(kw_only=True)
class EvaluateOptions(FrameOptions):
    """What is measured of what. Once made, it has the protocol's number wherever none was given.

    Raises:
        ValueError: for options that do not go together.
    """

    protocol: ProtocolName = option("next", "published way of measuring")
    output_dir: str = option("far-evaluation", "folder for the figures; finished videos in it are kept")
    split: str | None = option(None, "part of the data; train is all of it where there is no validation")
    num_context: CountOrZero | None = option(None, "real frames that are given")
    num_frames: Count | None = option(None, "of a video, the given ones included")
    num_videos: CountOrZero | None = option(
        None, "real videos, spread over all that are long enough; 0 for all of these"
    )
    every: Count = option(1, "take every so many of the videos, before num_videos: 10 for UCF-101 of mcvd")
    clips_per_video: Count = option(1, "clips of a video, evenly spread; of one, it is the beginning")
    num_samples: Count | None = option(None, "predictions of each clip, of which the best counts, too")
    seeds: list[int] | None = option(None, "of the samples, in place of num_samples")
    guidance_scale: NotNegative | None = option(
        None, "1 for none, 0 for the null condition; default: the protocol's where the model has a condition"
    )
    num_inference_steps: Count | None = option(None, "per frame; default: the checkpoint's")
    measures: list[str] | None = option(None, f"some of {', '.join(MEASURES)}")
    ignore_actions: bool = option(False, "predict without the actions of the data")
    batch_size: Count = option(16, "videos that are predicted at once")
    num_shown: CountOrZero = option(8, "videos in the report")

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise ValueError(f"protocol={self.protocol!r} must be {', '.join(get_args(ProtocolName))}")
        super().__post_init__()
        for name in ("split", "num_context", "num_frames", "num_videos"):
            if getattr(self, name) is None:
                setattr(self, name, getattr(self.prescribed, name))
        self.seeds = self._seeds()
        self.measures = list(self.measures or self.prescribed.measures)
        self._check()

    def _seeds(self) -> list[int]:
        number, seeds = self.num_samples, self.seeds
        if seeds is None:
            seeds = list(self.prescribed.seeds)
            if number is not None:
                seeds = seeds[:number] if number <= len(seeds) else list(range(number))
        if len(set(seeds)) < len(seeds) or not seeds or min(seeds) < 0:
            raise ValueError(f"seeds={seeds} must be different integers of at least 0")
        if number is not None and number != len(seeds):
            raise ValueError(f"num_samples={number}, but seeds has {len(seeds)}; give one of the two")
        return list(seeds)

    def _check(self) -> None:
        assert self.num_frames is not None and self.num_context is not None and self.measures is not None
        if self.num_frames <= self.num_context:
            raise ValueError(
                f"num_frames={self.num_frames} must be more than num_context={self.num_context}, those given"
            )
        unknown = [name for name in self.measures if name not in MEASURES]
        if unknown or len(set(self.measures)) < len(self.measures):
            raise ValueError(f"measures={self.measures} must be some of {', '.join(MEASURES)}, each once")
        compared = [name for name in self.measures if name != "fvd"]
        if compared and not self.num_context:
            raise ValueError(
                f"measures={self.measures}: {compared[0]} compares with what really follows; num_context=0 "
                "takes fvd only"
            )
        if "fvd" in self.measures and self.num_fvd_frames < LEAST_FRAMES:
            raise ValueError(
                f"num_frames={self.num_frames}: fvd takes {LEAST_FRAMES} frames or more"
                + (", those predicted" if self.prescribed.fvd_frames == "new" else "")
                + f"; these are {self.num_fvd_frames}. Or choose other measures"
            )

    @property
    def prescribed(self) -> Protocol:
        """The protocol's numbers."""
        return PROTOCOLS[self.protocol]

    @property
    def context(self) -> int:
        """Real frames that are given."""
        assert self.num_context is not None
        return self.num_context

    @property
    def length(self) -> int:
        """Frames of a video, the given ones included."""
        assert self.num_frames is not None
        return self.num_frames

    @property
    def num_fvd_frames(self) -> int:
        """Of each video that FVD compares."""
        return self.length if self.prescribed.fvd_frames == "all" else self.length - self.context

    @property
    def sample_seeds(self) -> list[int]:
        """One for each sample."""
        assert self.seeds is not None
        return self.seeds

    @property
    def measure_names(self) -> list[str]:
        """In the order of tables."""
        assert self.measures is not None
        return [name for name in MEASURES if name in self.measures]

    def frame_options(self) -> FrameOptions:
        """Which frames of a video are used."""
        names = [item.name for item in dataclasses.fields(FrameOptions)]
        return FrameOptions(**{name: getattr(self, name) for name in names})
