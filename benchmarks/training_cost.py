"""What training a published model costs: tokens, operations, memory, and the days of its whole run.

    python benchmarks/training_cost.py far-b-long-dmlab [--batch-size 4] [--num-gpus 8] [--tflops 989]

Tokens and operations are counted on a model without weights, for clips of the lengths that training draws;
the masked half of the attention counts, as it is computed like the rest. Memory of activations is what
autograd keeps for the backward pass of the longest clip, measured on two blocks in float32; bfloat16 keeps
about half of it. Days follow from the share of its arithmetic that a GPU reaches: an assumption, so three.
"""

import argparse
import statistics
import sys
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout: this file is run as a script

from diffusers_far import FARTransformer3DModel, preset
from diffusers_far.presets import PRESETS
from diffusers_far.training.options import FAROptions, ModelOptions, parse
from diffusers_far.training.train_folder import measure_cost

NUM_LENGTHS = 9  # from the shortest clip to the longest
SHARES = (0.1, 0.2, 0.4)  # of a GPU's arithmetic
CLIPS = 32  # of a step, all GPUs together
RECIPES = Path("training/recipes/published")


def count(model: FARTransformer3DModel, num_frames: int, grid: int) -> tuple[int, int]:
    """Tokens, and operations of a forward and backward pass, of one clip."""
    window = min(num_frames, model.short_window or num_frames)
    long_tokens, short_tokens = model.tokens_per_frame(grid, grid)
    with FlopCounterMode(display=False) as counter:
        shape = (1, num_frames, model.config.in_channels, grid, grid)
        frames, timestep = torch.zeros(shape, device="meta"), torch.zeros(1, num_frames, device="meta")
        model(frames, timestep).sample.square().mean().backward()
    return (num_frames - window) * long_tokens + window * short_tokens, counter.get_total_flops()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", choices=PRESETS)
    parser.add_argument("--batch-size", type=int, default=4, help="clips of a GPU")
    parser.add_argument("--num-gpus", type=int, default=8)
    parser.add_argument("--tflops", type=float, default=989.0, help="of a GPU in bfloat16; 989: H100 SXM")
    options = parser.parse_args()
    published = preset(options.model)
    recipe = [str(RECIPES / f"{options.model}.yaml")]
    steps = parse(recipe, (ModelOptions, FAROptions), None)[1].max_train_steps
    grid = published.resolution // published.compression
    with torch.device("meta"):
        model = FARTransformer3DModel(**published.transformer)
    parameters = sum(weight.numel() for weight in model.parameters())
    shortest = model.short_window or published.num_frames
    apart = (published.num_frames - shortest) / (NUM_LENGTHS - 1)
    lengths = sorted({round(shortest + index * apart) for index in range(NUM_LENGTHS)})
    counts = {length: count(model, length, grid) for length in lengths}
    # Lengths are drawn evenly; those between two that are counted cost what lies between.
    operations = [flops for _, flops in counts.values()]
    mean = statistics.mean(
        (a + b) / 2 for a, b in zip(operations, operations[1:] or operations, strict=False)
    )
    channels_of = ("in_channels", "out_channels")
    sizes = {name: value for name, value in published.transformer.items() if name not in channels_of}
    channels, frames = published.transformer["in_channels"], published.num_frames
    kept, checkpointed = (
        measure_cost(sizes, channels, (grid, grid), frames, gradient_checkpointing=option).memory
        for option in (False, True)
    )

    print(f"{options.model}: {parameters / 1e6:.0f} million parameters\n")
    print("| frames of a clip | tokens | operations of a step, per clip |\n|---|---|---|")
    for length, (tokens, flops) in counts.items():
        print(f"| {length} | {tokens:,} | {flops / 1e12:.2f} TFLOP |")
    print(f"| mean | | {mean / 1e12:.2f} TFLOP |")
    batch, gpus = options.batch_size, options.num_gpus
    print("\n| memory of a GPU | bytes |\n|---|---|")
    print(f"| weights, averages, gradients, two moments, float32 | {20 * parameters / 1e9:.1f} GB |")
    print(f"| the same, shared out over {gpus} | {20 * parameters / 1e9 / gpus:.1f} GB |")
    for name, memory in (("activations", kept), ("with gradient checkpointing", checkpointed)):
        print(f"| {name}, {batch} clips of {frames} frames, float32 | {batch * memory / 1e9:.1f} GB |")
    whole = mean * CLIPS * steps
    print(f"\n{steps:,} steps of {CLIPS} clips: {whole:.2g} operations.\n")
    print(f"| reached of {options.tflops:g} TFLOP/s | days on {gpus} GPUs | hours |\n|---|---|---|")
    for share in SHARES:
        days = whole / (share * options.tflops * 1e12 * gpus) / 86400
        print(f"| {share:.0%} | {days:.2f} | {24 * days:.1f} |")


if __name__ == "__main__":
    main()
