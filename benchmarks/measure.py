"""One case by one side, in a process of its own; `run.py` starts it and reads the last line of its output."""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from cases import Case
from ours import Ours
from published import Published
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode


class ForwardClock:
    """Seconds of every forward of a model."""

    def __init__(self, model: torch.nn.Module, device: torch.device) -> None:
        self.seconds: list[float] = []
        self._device = device
        model.register_forward_pre_hook(lambda *_: self._begin())
        model.register_forward_hook(lambda *_: self._end())

    def _begin(self) -> None:
        self._began = now(self._device)

    def _end(self) -> None:
        self.seconds.append(now(self._device) - self._began)


def now(device: torch.device) -> float:
    """Seconds, once everything that the device was given is done."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()
    return time.perf_counter()


@torch.no_grad()
def measure_frames(side: Ours | Published, device: torch.device) -> tuple[dict[str, float], Tensor]:
    """New frames after the context, the first of which encodes it and is not counted.

    The first forward of a frame also brings the frame before it into the cache, so that its time beyond a
    later forward's is the price of that; a step is the rest of a frame's time by its number.
    """
    case = side.case
    clock = ForwardClock(side.transformer, device)
    total = case.context + case.frames + 2
    side.start(case.noise(case.context, seed=0), case.actions(total))
    noise = case.noise(case.frames + 2, seed=1)
    made, frames, commits = [side.new_frame(noise[:, :1])], [], []
    for index in range(1, case.frames + 1):
        clock.seconds.clear()
        began = now(device)
        made.append(side.new_frame(noise[:, index : index + 1]))
        frames.append(now(device) - began)
        commits.append(clock.seconds[0] - statistics.median(clock.seconds[1:]))
    frame, commit = statistics.median(frames), max(0.0, statistics.median(commits))
    figures = {
        "frame_ms": 1e3 * frame,
        "commit_ms": 1e3 * commit,
        "step_ms": 1e3 * (frame - commit) / case.steps,
    }
    counter = FlopCounterMode(display=False)
    with counter:
        side.new_frame(noise[:, -1:])
    figures["frame_gflop"] = counter.get_total_flops() / 1e9
    if isinstance(side, Ours):
        figures["step_mb"] = side.step_bytes() / 1e6
    return figures, torch.cat(made, dim=1)


@torch.no_grad()
def measure_rollout(side: Ours | Published, device: torch.device) -> tuple[dict[str, float], Tensor]:
    """All frames of a video from nothing."""
    case = side.case
    noise = case.noise(case.frames, seed=1)
    began = now(device)
    side.start(case.noise(0, seed=0), case.actions(case.frames))
    made = [side.new_frame(noise[:, index : index + 1]) for index in range(case.frames)]
    seconds = now(device) - began
    return {"seconds": seconds, "frames_per_second": case.batch * case.frames / seconds}, torch.cat(made, 1)


def measure_training(side: Ours | Published, device: torch.device) -> tuple[dict[str, float], Tensor]:
    """Forward, backward and AdamW on one clip; the tensor is the velocity of the first step."""
    case, model = side.case, side.transformer.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    clip, noise = (case.noise(case.frames, seed=seed).to(device) for seed in (0, 1))
    timestep = torch.linspace(20, 980, case.frames, device=device).expand(case.batch, -1)
    frames = torch.lerp(clip, noise, timestep[..., None, None, None] / 1000)

    def step() -> Tensor:
        velocity = side.velocity(frames, timestep)
        torch.nn.functional.mse_loss(velocity, noise - clip).backward()
        optimizer.step()
        optimizer.zero_grad()
        return velocity.detach()

    first, seconds = step(), []
    for _ in range(3):
        began = now(device)
        step()
        seconds.append(now(device) - began)
    counter = FlopCounterMode(display=False)
    with counter:
        step()
    figures = {"step_ms": 1e3 * statistics.median(seconds), "step_gflop": counter.get_total_flops() / 1e9}
    return figures, first


def resident_mb() -> float:
    """Memory of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", help="JSON of a Case")
    parser.add_argument("--published", type=Path, help="measure the published code of this checkout")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--compile", action="store_true", help="compile the blocks (ours only)")
    parser.add_argument("--output", type=Path, required=True, help="file for what was computed")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    case, device = Case(**json.loads(arguments.case)), arguments.device
    dtype = getattr(torch, arguments.dtype)
    if arguments.published:
        side: Ours | Published = Published(arguments.published, case, device, dtype)
    else:
        side = Ours(case, device, dtype, arguments.compile)
    loaded = resident_mb()
    tasks = {"frame": measure_frames, "rollout": measure_rollout, "training": measure_training}
    figures, made = tasks[case.task](side, device)
    if device.type == "cuda":
        figures["device_peak_mb"] = torch.cuda.max_memory_allocated() / 2**20
    torch.save(made.float().cpu(), arguments.output)
    print(json.dumps({**figures, "loaded_mb": loaded}))


if __name__ == "__main__":
    main()
