"""ExportedRollout: a running video from exported graphs, in NumPy and ONNX Runtime, without PyTorch."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np

from .frame_plan import MAX_REWIND, MISSING, Call, FramePlan
from .noise import seeded_noise

Array = np.ndarray


class ExportedRollout:
    """One video that grows by a frame per `step`, as [`Rollout`] does, from a folder of `export_onnx`.

    Args:
        folder: what `export_onnx` wrote.
        seed: of the noise, see `seeded_noise`.
        class_label: class of the video; -1 or None is the null condition.
        guidance_scale: 1 samples with the condition, 0 with the null condition, anything else mixes the two.
        num_inference_steps: denoising steps per frame, one of those exported; by default the checkpoint's.
        flex_rope_slope: temporal decay of FlexRoPE; by default the checkpoint's.
        rope_interpolation: ratio by which RoPE's frame positions are divided.
        num_threads: of ONNX Runtime; by default its own choice.
        max_rewind: frames that `rewind` can take back. Latents of older ones are forgotten, so that a game
            of any length takes the same memory.

    Raises:
        ValueError: for an argument that does not fit the exported model.
    """

    def __init__(
        self,
        folder: str | Path,
        seed: int = 0,
        class_label: int | None = None,
        guidance_scale: float = 1.0,
        num_inference_steps: int | None = None,
        flex_rope_slope: float | None = None,
        rope_interpolation: float = 1.0,
        num_threads: int | None = None,
        max_rewind: int = MAX_REWIND,
    ) -> None:
        import onnxruntime

        self.folder = folder = Path(folder)
        if not (folder / "rollout.json").is_file():
            raise ValueError(f"folder={folder} has no rollout.json; it takes what export_onnx wrote")
        self.config: dict[str, Any] = json.loads((folder / "rollout.json").read_text())
        number = self.config["num_inference_steps"] if num_inference_steps is None else num_inference_steps
        samplers, classes = self.config["samplers"], self.config["num_classes"]
        if str(number) not in samplers:
            known = ", ".join(samplers)
            raise ValueError(f"num_inference_steps={number}: this export has samplers of {known} steps")
        if class_label is not None and not (classes and -1 <= class_label <= classes):
            takes = f"-1 to {classes}" if classes else "None: the model has no classes"
            raise ValueError(f"class_label={class_label} must be {takes}")
        if guidance_scale != 1 and not (classes or self.config["actions"]):
            raise ValueError(f"guidance_scale={guidance_scale}: this model has nothing to guide; pass 1")
        slope = self.config["flex_rope_slope"] if flex_rope_slope is None else flex_rope_slope
        if slope < 0 or rope_interpolation <= 0:
            raise ValueError(f"{flex_rope_slope=} must be 0 or more, {rope_interpolation=} more than 0")
        if max_rewind < 0:
            raise ValueError(f"{max_rewind=} must be 0 or more")
        self.sampler = samplers[str(number)]
        self.seed = seed
        self.guidance_scale = guidance_scale
        self.rope_interpolation = rope_interpolation
        self.class_label = -1 if class_label is None else class_label
        self.slope = np.array([slope], np.float32)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # The graphs' threads are apart: those of one would keep the next one waiting.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if num_threads is not None:
            options.intra_op_num_threads = num_threads
        self._sessions = {
            name: onnxruntime.InferenceSession(
                folder / graph["file"], options, providers=["CPUExecutionProvider"]
            )
            for name, graph in self.config["graphs"].items()
        }
        self.plan = FramePlan(self.config["ring_frames"], self.config["window_frames"], max_rewind)
        self.reset()

    @property
    def num_frames(self) -> int:
        """Frames so far, the given ones included."""
        return self.plan.num_frames

    def reset(self) -> None:
        """Go back to a video without frames. The noise of a frame is what it was."""
        self.plan.reset()
        self.calls: list[Call] = []  # that made the last frame: commits, then the step
        self._latents: dict[int, Array] = {}  # of the frames from `plan.first_kept` on
        self._actions: dict[int, Array | None] = {}
        guided = self.guidance_scale not in (0, 1)
        # Guidance needs a sequence without conditions and one with them, each with its own keys and values.
        self._conditioned = [False, True] if guided else [self.guidance_scale != 0]
        inputs = self.config["graphs"]["step"]["inputs"]
        empty = {
            one["name"]: np.zeros(one["shape"], one["dtype"])
            for one in inputs
            if one["name"].endswith(("_keys", "_values"))
        }
        self._caches = [dict(empty) for _ in self._conditioned]

    def append_start(self, index: int = 0) -> None:
        """Let the frames of a start of the export follow, with their actions."""
        starts = self.config["starts"]
        if not 0 <= index < len(starts):
            raise ValueError(f"index={index}: this export has {len(starts)} starts, numbered from 0")
        start = starts[index]
        shape = (start["num_frames"], *self.config["latent_shape"])
        latents = np.fromfile(self.folder / start["latents"], "<f2").reshape(shape)
        for number, frame in enumerate(latents):
            self.append_latents(frame, None if start["actions"] is None else start["actions"][number])

    def rewind(self, num_frames: int) -> None:
        """Take back the last `num_frames` frames. The noise of those that follow is what it was.

        Raises:
            ValueError: for more than there are, or than `max_rewind`.
        """
        self.plan.rewind(num_frames)
        for frame in [frame for frame in self._latents if frame >= self.num_frames]:
            del self._latents[frame], self._actions[frame]

    def fork(self) -> "ExportedRollout":
        """Another rollout that goes on from here. The two share the graphs, and nothing that changes."""
        branch = copy.copy(self)
        branch.plan = copy.copy(self.plan)
        branch._latents, branch._actions = dict(self._latents), dict(self._actions)
        branch._caches = [dict(cache) for cache in self._caches]
        return branch

    def append(self, frame: Array, action: Any = None) -> None:
        """Let a given frame follow.

        Args:
            frame: `[H, W, 3]` uint8, or float in [0, 1].
            action: that led to it, as for `step`.
        """
        height, width = self.config["frame_size"]
        if frame.shape != (height, width, 3):
            raise ValueError(f"frame has shape {frame.shape}; it takes {(height, width, 3)}")
        pixels = frame.astype(np.float32) / 255 if frame.dtype == np.uint8 else frame.astype(np.float32)
        self.append_latents(self._run("encode", {"pixels": pixels.transpose(2, 0, 1)[None]})[0][0], action)

    def append_latents(self, latents: Array, action: Any = None) -> None:
        """Let a frame of given scaled latents `[C, h, w]` follow."""
        if list(latents.shape) != self.config["latent_shape"]:
            raise ValueError(f"latents has shape {latents.shape}; it takes {self.config['latent_shape']}")
        self._add(latents.astype(np.float32), self._checked_action(action))

    def step(self, action: Any = None) -> Array:
        """Make the next frame, `[H, W, 3]` float32 in [0, 1].

        Args:
            action: that leads to it: an int; `[G]` ints of groups; `[A]` numbers of vectors. None is
                the null condition, as is -1, and a vector of NaN alone.
        """
        return self.decode(self.step_latents(action))

    def decode(self, latents: Array) -> Array:
        """The frame `[H, W, 3]` float32 in [0, 1] of scaled latents `[C, h, w]`."""
        return self._run("decode", {"latents": latents[None]})[0][0].transpose(1, 2, 0)

    def step_latents(self, action: Any = None, noise: Array | None = None) -> Array:
        """Make the next frame: its scaled latents `[C, h, w]`, of its noise `[C, h, w]` by default."""
        checked = self._checked_action(action)
        if noise is None:
            noise = seeded_noise(self.seed, self.num_frames, self.config["latent_shape"])
        self.calls = self.plan.next_frame()
        *commits, step = self.calls
        for call in commits:
            self._commit(call)
        sampler = self.sampler
        latents, known = noise.astype(np.float32), [noise.astype(np.float64)]
        for level, end, weights in zip(
            sampler["timesteps"], sampler["ends"], sampler["weights"], strict=True
        ):
            known.append(self._velocity(step, latents, level, end, checked).astype(np.float64))
            latents = sum(w * x for w, x in zip(weights, known, strict=True)).astype(np.float32)
        if not np.isfinite(latents).all():
            raise FloatingPointError(f"frame {self.num_frames} came out with NaN or infinite values")
        self._add(latents, checked)
        return latents

    def _add(self, latents: Array, action: Array | None) -> None:
        frame = self.plan.add_frame()
        self._latents[frame], self._actions[frame] = latents, action
        self._latents.pop(self.plan.first_kept - 1, None)  # one comes, so at most one goes
        self._actions.pop(self.plan.first_kept - 1, None)

    def _commit(self, call: Call) -> None:
        none = np.zeros(self.config["latent_shape"], np.float32)
        latents = np.stack([self._latents.get(frame, none) for frame in call.frames])
        inputs = {
            "latents": latents,
            "frame_ages": np.array(call.frame_ages, np.int32),
            "slot": np.array([call.slot], np.int32),
        }
        actions = [self._actions.get(frame) for frame in call.frames]
        for cache, conditioned in zip(self._caches, self._conditioned, strict=True):
            results = self._run_frames(call, inputs, actions, cache, conditioned)
            cache.update(zip(cache, results, strict=True))

    def _velocity(self, call: Call, latents: Array, level: float, end: float, action: Array | None) -> Array:
        inputs = {
            "latents": latents[None],
            "timestep": np.array([level], np.float32),
            "timestep_r": np.array([end], np.float32),
            "window_ages": np.array(call.window_ages, np.int32),
        }
        velocities = [
            self._run_frames(call, inputs, [action], cache, conditioned)[0][0]
            for cache, conditioned in zip(self._caches, self._conditioned, strict=True)
        ]
        if len(velocities) == 1:
            return velocities[0]
        null, guided = velocities
        return null + self.guidance_scale * (guided - null)

    def _run_frames(
        self,
        call: Call,
        inputs: dict[str, Array],
        actions: list[Array | None],
        cache: dict[str, Array],
        conditioned: bool,
    ) -> list[Array]:
        places = np.maximum(call.frames, 0)[:, None] / self.rope_interpolation
        angles = places * np.array(self.config["rope_frequencies"])  # float64: exact for any number of frames
        if self.config["actions"] is not None:
            null = self._null_action()
            rows = [null if action is None or not conditioned else action for action in actions]
            inputs = inputs | {"actions": np.stack(rows)}
        return self._run(
            call.graph,
            inputs
            | cache
            | {
                "frame_rotary": np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32),
                "flex_rope_slope": self.slope,
                "ring_ages": np.array(call.ring_ages, np.int32),
                "class_labels": np.array([self.class_label if conditioned else MISSING], np.int32),
            },
        )

    def _run(self, graph: str, inputs: dict[str, Array]) -> list[Array]:
        names = [one["name"] for one in self.config["graphs"][graph]["inputs"]]
        return self._sessions[graph].run(None, {name: inputs[name] for name in names})

    def _null_action(self) -> Array:
        kind, sizes = self.config["actions"]["kind"], self.config["actions"]["sizes"]
        if kind == "vector":
            return np.full(sizes, np.nan, np.float32)
        return np.full(() if kind == "integer" else (len(sizes),), MISSING, np.int32)

    def _checked_action(self, action: Any) -> Array | None:
        if action is None:
            return None
        if self.config["actions"] is None:
            raise ValueError(f"action={action!r}: this model has no actions; pass None")
        kind, sizes, null = (
            self.config["actions"]["kind"],
            self.config["actions"]["sizes"],
            self._null_action(),
        )
        given = np.asarray(action)
        fits = given.shape == null.shape and given.dtype.kind in ("iuf" if kind == "vector" else "iu")
        if fits and kind == "vector":
            fits = bool(np.isfinite(given).all() or np.isnan(given).all())
        elif fits:
            bounds = np.array(sizes if kind == "groups" else sizes[0])
            fits = bool(((given >= -1) & (given <= bounds)).all())
        if not fits:
            takes = (
                f"{sizes[0]} numbers (finite, or NaN alone)"
                if kind == "vector"
                else f"integers of -1 to {sizes}"
            )
            raise ValueError(f"action={action!r} must be {takes}, or None")
        return given.astype(null.dtype)
