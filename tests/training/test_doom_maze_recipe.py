"""training/recipes/doom_maze.sh: every step in its place with options that its script takes, and going on."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from diffusers_far.training.encode_latents import EncodeOptions
from diffusers_far.training.make_pipeline import PipelineOptions
from diffusers_far.training.options import AutoencoderOptions, FAROptions, ModelOptions, parse

# Stands in for python: notes its words, and makes the folder that the real one would leave.
PYTHON = """#!/usr/bin/env bash
printf '%q ' "$@" >> commands; echo >> commands
[ "$(wc -l < commands)" != "${FAIL_AT:-none}" ] || exit 7
mkdir -p doom-maze-64{,-revisit} latents-doom-maze-64{,-revisit}/{train,validation} \\
  runs/checkpoints/far-doom-maze-64{,-any-step} runs/far_doom_maze{,_any_step,_memory} \\
  runs/autoencoder_doom_maze{,_decoder}
touch latents-doom-maze-64{,-revisit}/{train,validation}/{00000,00150,00249,00250}.safetensors
"""


@pytest.fixture
def checkout(repository: Path, tmp_path: Path) -> Path:
    """A folder that has the recipes and nothing else."""
    (tmp_path / "training").mkdir()
    (tmp_path / "training/recipes").symlink_to(repository / "training/recipes")
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    return tmp_path


def run(checkout: Path, *words: str, **environment: str) -> int:
    environment = os.environ | {"PYTHON": str(checkout / "python")} | environment
    command = ["training/recipes/doom_maze.sh", *words]
    return subprocess.run(command, cwd=checkout, env=environment).returncode


def commands(checkout: Path) -> list[list[str]]:
    return [shlex.split(line) for line in (checkout / "commands").read_text().splitlines()]


@pytest.mark.parametrize("form", [(), ("--gpu",)])
def test_every_step_has_options_that_its_script_takes(
    form: tuple[str, ...], checkout: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(checkout, *form) == 0
    monkeypatch.chdir(repository)
    kinds = {
        "training.train_autoencoder": (AutoencoderOptions,),
        "training.train_far": (ModelOptions, FAROptions),
        "training.make_pipeline": (PipelineOptions,),
    }
    record, *steps = commands(checkout)
    assert record[:2] == ["data/doom_maze.py", "doom-maze-64"]
    revisits = steps.pop(4)
    assert revisits[:4] == ["data/doom_maze.py", "doom-maze-64-revisit", "--walk", "revisit"]
    parsed = []
    for words in steps:
        module, *options = words[len(words) - words[::-1].index("-m") :]
        if module == "training.encode_latents":
            vae = "checkpoints/far-doom-maze-64/vae"  # it must be there
            options[options.index("--autoencoder") + 1] = vae
            parsed.append(parse(options, (EncodeOptions,), None, positional="data")[1])
        else:
            parsed.append(parse(options, kinds[module], None)[-1])
    first, second, encoded, far, again, memory, pipeline, any_step, any_step_pipeline = parsed
    assert second.init_from == f"{first.output_dir}/autoencoder" and first.data == second.data == record[1]
    assert encoded.output == far.latents
    assert again.output == f"{encoded.output}-revisit" and memory.latents == f"{encoded.output}-memory"
    assert memory.pretrained == f"{far.output_dir}/ema" and any_step.latents == memory.latents
    assert pipeline.transformer == any_step.pretrained == f"{memory.output_dir}/ema"
    sizes = [options.batch_size for options in (first, second, far, memory, any_step)]
    assert sizes == ([128, 64, 192, 192, 64] if form else [16, 16, 16, 8, 16])
    joined = sorted((checkout / memory.latents).rglob("*.safetensors"))
    assert [str(path.relative_to(checkout / memory.latents)) for path in joined] == [
        *(f"train/explore/{name}.safetensors" for name in ("00000", "00150", "00249")),
        *(f"train/revisit/{name}.safetensors" for name in ("00000", "00150", "00249", "00250")),
        *(f"validation/{name}.safetensors" for name in ("00000", "00150", "00249", "00250")),
    ]
    assert any_step_pipeline.transformer == f"{any_step.output_dir}/ema"
    assert pipeline.autoencoder == any_step_pipeline.autoencoder == f"{second.output_dir}/autoencoder"
    assert pipeline.num_training_frames == memory.num_frames
    assert any_step_pipeline.num_training_frames == any_step.num_frames


def test_it_goes_on_where_it_was(checkout: Path) -> None:
    assert run(checkout, FAIL_AT="5") == 7
    assert len(commands(checkout)) == 5
    assert run(checkout) == 0
    done = commands(checkout)
    assert done[5] == done[4] and len(done) == 12
    assert run(checkout) == 0 and len(commands(checkout)) == 12
