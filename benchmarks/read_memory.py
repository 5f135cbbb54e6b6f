"""Memory that reading a long video for training takes.

    python -m benchmarks.read_memory --minutes 60 --height 1080 --width 1920 --fps 10 --resolution 64

Writes an H.264 file of that length (some seconds of moving textures with noise, whose packets are repeated),
and reads it as training does, in a process of its own. Prints the frames that were kept, frames read per
second, and the peak of its resident memory, at the end and after importing the reader.
"""

import argparse
import subprocess
import sys
import tempfile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

RATE, SECONDS = 30, 10  # of the part that is repeated

READ = """
import re, sys, time
from pathlib import Path
from diffusers_far.training.episodes import Episode, RecordedVideo
from diffusers_far.training.options import FrameOptions

def peak():  # of this process since it began; ru_maxrss would include its parent's
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

imported, started, number = peak(), time.monotonic(), 0
for _ in Episode("video", RecordedVideo(Path(sys.argv[1]))).frames(
    FrameOptions(resolution=sys.argv[2], fps=float(sys.argv[3]))
):
    number += 1
print(number, time.monotonic() - started, imported, peak())
"""


def frame(number: int, height: int, width: int, generator: np.random.Generator) -> np.ndarray:
    """Waves that move, with noise: `[H, W, 3]` uint8."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin((x * a + y * b) / 40 + number / 10) for a, b in ((1, 0), (0.4, 1), (1, -1))]
    noise = generator.normal(0, 4, (height, width, 1))
    return (128 + 90 * np.stack(waves, axis=-1) + noise).clip(0, 255).astype(np.uint8)


def write(file: Path, minutes: float, height: int, width: int) -> None:
    generator, packets = np.random.default_rng(0), []
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"preset": "veryfast", "g": "60"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for number in range(RATE * SECONDS):
            picture = av.VideoFrame.from_ndarray(frame(number, height, width, generator), format="rgb24")
            packets += stream.encode(picture)
        packets += stream.encode()
        length = Fraction(SECONDS)
        for part in range(round(minutes * 60 / SECONDS)):
            for packet in packets:
                copy = av.Packet(bytes(packet))
                copy.stream, copy.time_base, copy.is_keyframe = stream, packet.time_base, packet.is_keyframe
                shift = int(part * length / packet.time_base)
                copy.pts, copy.dts = packet.pts + shift, packet.dts + shift
                copy.duration = packet.duration
                container.mux(copy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--height", type=int, default=1080)
    parser.add_argument("--width", type=int, default=1920)
    parser.add_argument("--fps", type=float, default=10)
    parser.add_argument("--resolution", default="64")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "long.mp4"
        write(file, options.minutes, options.height, options.width)
        num_frames, size = round(options.minutes * 60 * RATE), file.stat().st_size / 1e6
        shape = f"{options.width} x {options.height}"
        print(f"{options.minutes:g} minutes of {shape}, {num_frames} frames, {size:.0f} MB")
        command = [sys.executable, "-c", READ, str(file), options.resolution, str(options.fps)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        kept, seconds, imported, peak = map(float, done.stdout.split())
    print(
        f"{kept:.0f} frames kept, {num_frames / seconds:.0f} read per second, {seconds:.0f} s; "
        f"peak {peak:.0f} MB, of which {imported:.0f} MB after importing"
    )


if __name__ == "__main__":
    main()
