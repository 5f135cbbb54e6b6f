"""export_onnx: a pipeline as ONNX graphs with fixed shapes, and the numbers that a rollout of them takes."""

import copy
import gzip
import hashlib
import json
import logging
import warnings
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import SchedulerMixin
from torch import nn

from ..context_schedule import ContextSchedule
from ..flow_matching import set_timesteps
from ..inputs import check_integer
from ..pipeline_far_video import FARVideoPipeline
from ..rollout import Rollout
from ..whole_files import written_whole
from .exported_starts import Clip, check_starts, write_starts
from .onnx_graphs import (
    CommitGraph,
    DecodeGraph,
    EncodeGraph,
    PlainAttnProcessor,
    StepGraph,
    example_inputs,
)
from .shared_weights import SharedWeights

DTYPES = ("float32", "float16", "int8")
OPSET = 20
VERSION = 1  # of rollout.json
NUMBERS_OF_STEPS = (1, 2, 4, 8)  # besides the checkpoint's own
FOLDED_SIZE = 2**30  # numbers of the largest tensor that is computed at the export
INT8_BLOCK = 32  # weights that share a scale
SHARED = "weights.bin"  # what step and commit have in common, and all else that is large in them
PACKED = ".packed"  # not .gz: some servers would have the browser unpack that


def export_onnx(
    pipeline: FARVideoPipeline,
    output: str | Path,
    dtype: str = "float32",
    *,
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: Sequence[int] | None = None,
    context_schedule: ContextSchedule | None = None,
    starts: Sequence[Clip] = (),
    packed: bool = False,
) -> Path:
    """Write a pipeline as a folder of ONNX graphs, which `ExportedRollout` and other languages run.

    The folder has `step.onnx` and `commit.onnx` with their `weights.bin`, `encode.onnx`, `decode.onnx` and
    `rollout.json`; docs/export.md tells what each takes. The pipeline stays as it is.

    Args:
        pipeline: on the CPU, or anywhere; a copy of it is exported.
        output: folder to write; it must not exist, or be empty.
        dtype: "float32"; "float16": weights, keys and values in half precision; "int8": weights of the
            transformer's matrices in 8 bits with a scale for every 32 of them, all else in float32.
        height, width: of the frames in pixels; by default the checkpoint's.
        num_inference_steps: numbers of denoising steps that a rollout may choose from; by default 1, 2, 4, 8
            and the checkpoint's.
        context_schedule: what the context keeps: bounds alone, no sink frames. By default as many frames as
            the model was trained with.
        starts: clips to begin a game with: frames `[T, H, W, 3]` uint8 of the model's size, and the actions
            `[T, ...]` that led to them, or None.
        packed: also write each graph and its weights compressed by gzip, as "step.onnx.packed" and so on:
            what the page of web/ loads where it is there, as it is smaller.

    Returns:
        The folder.

    Raises:
        ValueError: for an argument that does not fit, and for a scheduler that draws noise in its steps.
    """
    output = Path(output)
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} must be one of {DTYPES}")
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise ValueError(f"output={output} exists already; give a new folder, or an empty one")
    default_steps = pipeline.config.num_inference_steps
    numbers = sorted(
        {*(NUMBERS_OF_STEPS if num_inference_steps is None else num_inference_steps), default_steps}
    )
    for number in numbers:
        check_integer("num_inference_steps", number, minimum=1)
    rollout = pipeline.rollout(
        height=height, width=width, batch_size=1, context_schedule=context_schedule, output_type="latent"
    )
    ring, window = _context_size(rollout)
    channels, *size = rollout.context_latents.shape[2:]
    model = pipeline.transformer
    num_tokens = model.tokens_per_frame(*size)[1]
    samplers = {
        str(number): sampler_weights(rollout.scheduler, number, num_tokens, model.config.use_meanflow)
        for number in numbers
    }
    scale = pipeline.vae_scale_factor
    frame_size = size[0] * scale, size[1] * scale
    check_starts(starts, frame_size, model.action_space)
    graphs = graph_modules(pipeline, rollout, torch.float16 if dtype == "float16" else torch.float32)
    output.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(output) as folder:
        folder.mkdir()
        tensors = {}
        with SharedWeights(folder / SHARED) as shared:
            for name, graph in graphs.items():
                is_rollout = name in ("step", "commit")
                proto = _as_onnx(graph, quantized=is_rollout and dtype == "int8")
                if is_rollout:
                    shared.take(proto)
                tensors[name] = _write_graph(proto, folder / f"{name}.onnx")
                tensors[name]["weights"] = SHARED if is_rollout else None
        for path in sorted(folder.iterdir()) if packed else ():
            data = gzip.compress(path.read_bytes(), mtime=0)  # the same bytes for the same model
            (folder / f"{path.name}{PACKED}").write_bytes(data)
        written_starts = write_starts(pipeline, starts, folder)
        space = model.action_space
        config = {
            "version": VERSION,
            "dtype": dtype,
            "latent_shape": [channels, *size],
            "frame_size": list(frame_size),
            "ring_frames": ring,
            "window_frames": window,
            "rope_frequencies": _rope_frequencies(model.config.axes_dims_rope[0], model.pos_embed.theta),
            "actions": None
            if space is None
            else {
                "kind": "vector" if space.is_vector else "groups" if space.is_grouped else "integer",
                "sizes": [space.action_dim] if space.is_vector else list(space.sizes),
                "names": pipeline.config.action_names,
            },
            "num_classes": model.config.num_classes,
            "flex_rope_slope": float(rollout.flex_rope_slope),
            "num_inference_steps": default_steps,
            "samplers": samplers,
            "graphs": tensors,
            "starts": written_starts,
            "files": {path.name: _checksum(path) for path in sorted(folder.iterdir())},
        }
        (folder / "rollout.json").write_text(json.dumps(config, indent=1) + "\n")
    return output


class GraphModule(NamedTuple):
    """A graph before its export: a module, an example of its inputs by name, and the names of its outputs."""

    module: nn.Module
    inputs: dict[str, Any]
    outputs: list[str]


def graph_modules(
    pipeline: FARVideoPipeline, rollout: Rollout, dtype: torch.dtype = torch.float32
) -> dict[str, GraphModule]:
    """The graphs of an export by name: "step", "commit", "encode" and "decode".

    Args:
        pipeline: stays as it is; the modules have copies of its weights on the CPU.
        rollout: of this pipeline, for one video: its frames' size and its context are those of the graphs.
        dtype: of weights, keys and values.

    Raises:
        ValueError: for a context that an export cannot have.
    """
    ring, window = _context_size(rollout)
    channels, *size = rollout.context_latents.shape[2:]
    model = _copied(pipeline.transformer, dtype)
    model.set_attn_processor(PlainAttnProcessor())
    vae = _copied(pipeline.vae, dtype)
    slots = max(1, ring)
    step, commit = (graph(model, slots, window, *size) for graph in (StepGraph, CommitGraph))
    latents = torch.zeros(1, channels, *size)
    pixels = torch.zeros(1, 3, *(side * pipeline.vae_scale_factor for side in size))
    ring_names = ["ring_keys", "ring_values"]
    window_names = ["window_keys", "window_values"] if window else []
    return {
        "step": GraphModule(step, example_inputs(step, slots), ["velocity"]),
        "commit": GraphModule(
            commit, example_inputs(commit, slots), [f"new_{name}" for name in ring_names] + window_names
        ),
        "encode": GraphModule(EncodeGraph(vae), {"pixels": pixels}, ["latents"]),
        "decode": GraphModule(DecodeGraph(vae), {"latents": latents}, ["pixels"]),
    }


def _context_size(rollout: Rollout) -> tuple[int, int]:
    """Frames of the ring and of the window; the latter is 0 for a base model."""
    schedule, window = rollout.context_schedule, rollout.transformer.short_window
    if schedule.num_sink_frames or schedule.refresh_interval != 1:
        raise ValueError(f"context_schedule={schedule} must have no sink frames and refresh_interval=1")
    name, bound = (
        ("max_short_frames", schedule.max_short_frames)
        if window is None
        else ("max_long_frames", schedule.max_long_frames)
    )
    if bound is None:
        raise ValueError(
            f"context_schedule has no bound: give {name}, as graphs of fixed size take, for a checkpoint "
            "without num_training_frames"
        )
    if window is None:
        return int(bound) - 1, 0
    short = min(window, int(schedule.max_short_frames or window))
    if short < 2:
        raise ValueError(f"a window of {short} short-term frames: an export of a Long model takes 2 or more")
    return int(bound), short - 1


def _copied(model: Any, dtype: torch.dtype) -> Any:
    # By PyTorch's own `to`: that of diffusers warns of modules to keep in float32, of which there are none.
    return nn.Module.to(copy.deepcopy(model), "cpu", dtype).eval()


def _rope_frequencies(axis: int, theta: int) -> list[float]:
    return [float(theta) ** (-2 * index / axis) for index in range(axis // 2)]


def sampler_weights(
    scheduler: SchedulerMixin, number: int, num_tokens: int, any_step: bool
) -> dict[str, Any]:
    """Levels of the steps, and how the latents come of the noise and the velocities.

    A solver without noise of its own adds multiples of what it has been given: after k steps the latents are
    `weights[k - 1][0] * noise + weights[k - 1][1] * velocity 1 + ... + weights[k - 1][k] * velocity k`. What
    they are shows when it is given unit vectors.

    Args:
        scheduler: stays as it is.
        number: of denoising steps; some solvers take more forwards.
        num_tokens, any_step: as in `set_timesteps`.

    Returns:
        `timesteps` and `ends` `[K]`, and the `weights`, K lists of 2 to K + 1 numbers.

    Raises:
        ValueError: for a scheduler that draws noise in its steps.
    """
    scheduler = copy.deepcopy(scheduler)
    set_timesteps(scheduler, number, torch.device("cpu"), num_tokens, any_step)
    levels = scheduler.timesteps.float()
    units = torch.eye(len(levels) + 1)[:, None, :, None, None]  # [noise and velocities, 1, same, 1, 1]
    latents, weights = units[0], []
    name = type(scheduler).__name__
    if "LCM" in name or scheduler.config.get("stochastic_sampling"):
        raise ValueError(f"scheduler={name} draws noise in its steps; an export takes one that does not")
    for index, level in enumerate(scheduler.timesteps):
        latents = scheduler.step(units[index + 1], level, latents, return_dict=False)[0]
        weights.append(latents.flatten()[: index + 2].tolist())
    if not torch.isfinite(latents).all():
        raise ValueError(f"scheduler={name} cannot take num_inference_steps={number}")
    return {"timesteps": levels.tolist(), "ends": [*levels[1:].tolist(), 0.0], "weights": weights}


_LOGGERS = ("torch.onnx", "onnxscript", "onnx_ir", "torch.export", "onnxruntime")


@contextmanager
def _quiet() -> Any:
    """Without the exporter's reports."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _checksum(path: Path) -> dict[str, Any]:
    """By which a player knows a file that came incomplete, and an older one of the same name."""
    data = path.read_bytes()
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _as_onnx(graph: GraphModule, quantized: bool) -> Any:
    """A graph as an `onnx.ModelProto`."""
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            graph.module.eval(),
            tuple(graph.inputs.values()),
            input_names=list(graph.inputs),
            output_names=graph.outputs,
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
            # The optimizer takes the 1e-15 that keeps the autoencoder's attention from 0 / 0 for zero.
            optimize=False,
        )
        assert program is not None
        _fold(program.model)
    proto = program.model_proto
    if quantized:
        with _quiet():
            proto = _quantize(proto)
    return proto


def _write_graph(proto: Any, path: Path) -> dict[str, Any]:
    """Write a graph; its inputs and outputs by name, with dtype and shape."""
    import onnx

    onnx.save(proto, path)

    def describe(values: Any) -> list[dict[str, Any]]:
        return [
            {
                "name": value.name,
                "dtype": str(onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)),
                "shape": [dim.dim_value for dim in value.type.tensor_type.shape.dim],
            }
            for value in values
        ]

    return {
        "file": path.name,
        "inputs": describe(proto.graph.input),
        "outputs": describe(proto.graph.output),
    }


def _fold(model: Any) -> None:
    """Compute what depends on no input, and drop what nothing reads.

    Weights then lie as matrix products read them; otherwise most of them could not be quantized.
    """
    import onnxscript.optimizer
    from onnx_ir.passes import common

    onnxscript.optimizer.inline(model)
    limits = {"input_size_limit": FOLDED_SIZE, "output_size_limit": FOLDED_SIZE}
    onnxscript.optimizer.fold_constants(model, onnx_shape_inference=True, **limits)
    for step in (
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(size_limit=FOLDED_SIZE),
        common.CommonSubexpressionEliminationPass(),
        common.NameFixPass(),
        common.ClearMetadataAndDocStringPass(),  # traces of the exporter: a megabyte per graph
    ):
        step(model)


def _quantize(proto: Any) -> Any:
    """The graph with the constant matrices of its products in 8 bits."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(proto, bits=8, block_size=INT8_BLOCK, is_symmetric=True)
    quantizer.process()
    return quantizer.model.model
