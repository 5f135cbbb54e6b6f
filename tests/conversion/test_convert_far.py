"""The command line that converts published checkpoints and takes them back, and faults of its input."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderDC
from safetensors.torch import load_file, save_file
from torch import Tensor

from conversion.convert_far import convert
from diffusers_far import FARVideoPipeline
from diffusers_far.key_map import (
    UNUSED,
    convert_published_state_dict,
    model_name,
)
from diffusers_far.presets import convert_published_config, preset
from tests.python_process import run_python

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "conversion" / "convert_far.py"


def main(arguments: list[str]) -> int:
    """The exit code of the command."""
    with pytest.raises(SystemExit) as exit_:
        convert(arguments)
    return int(exit_.value.code or 0)


def load(file: Path) -> dict[str, Tensor]:
    return torch.load(file, weights_only=True)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert different == []


@pytest.fixture
def files(golden_dir: Path, tmp_path: Path) -> dict[str, Path]:
    """Arguments that convert a Long model with FlexRoPE: files as published, and an output folder."""
    config = json.loads((golden_dir / "long_flexrope.json").read_text())["config"]
    (tmp_path / "FAR.json").write_text(json.dumps(config))
    return {
        "transformer": golden_dir / "long_flexrope.pth",
        "--autoencoder": golden_dir / "dcae.pth",
        "--config": tmp_path / "FAR.json",
        "--autoencoder-config": golden_dir / "dcae_config.json",
        "--output": tmp_path / "converted" / "pipeline",
    }


def arguments(files: dict[str, Path], *more: str) -> list[str]:
    options = [str(part) for name, path in files.items() if name != "transformer" for part in (name, path)]
    return [str(files["transformer"]), *options, *more]


def command(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A real run from another folder."""
    return run_python([str(SCRIPT), *arguments], folder)


def test_the_command_line_writes_a_pipeline_and_takes_it_back(
    files: dict[str, Path], golden_dir: Path, tmp_path: Path
) -> None:
    run = command(*arguments(files), folder=tmp_path)
    assert run.returncode == 0, run.stderr
    output = files["--output"]
    assert [path.name for path in output.parent.iterdir()] == [output.name]

    pipeline = FARVideoPipeline.from_pretrained(output)
    assert pipeline.config.flex_rope_slope == 0.25
    assert pipeline.scheduler.config.num_train_timesteps == 1000
    published = load(golden_dir / "long_flexrope.pth")
    transformer = pipeline.transformer.state_dict()
    assert_equal(transformer, convert_published_state_dict(published, pipeline.transformer.config))
    assert_equal(pipeline.vae.state_dict(), load(golden_dir / "dcae.pth"))

    back = ("--output", "FAR.pth", "--autoencoder", "DCAE.pth")
    run = command("--reverse", str(output), *back, folder=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "zeros for context_proj_out.weight, context_proj_out.bias" in run.stdout
    zeros = {name: torch.zeros_like(published[name]) for name in UNUSED}
    assert_equal(load(tmp_path / "FAR.pth"), published | zeros)
    assert_equal(load(tmp_path / "DCAE.pth"), load(golden_dir / "dcae.pth"))


def test_the_command_line_reports_an_error_in_one_line(files: dict[str, Path], tmp_path: Path) -> None:
    run = command(*arguments(files | {"transformer": tmp_path / "absent.pth"}), folder=tmp_path)
    assert run.returncode == 1
    assert run.stdout == ""
    line = f"Error: {tmp_path / 'absent.pth'}: there is no such file"
    assert run.stderr.strip().splitlines()[-1] == line
    assert "Traceback" not in run.stderr
    assert not files["--output"].parent.exists()


def test_help_shows_how_to_call_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert (
        "diffusers-far convert FAR.pth --autoencoder DCAE.pth --preset far-b-long-dmlab --output DIR" in shown
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--autoencoder DCAE.pth --preset far-b-bair-64 --output DIR", "needs FAR.pth and --autoencoder"),
        ("FAR.pth --autoencoder DCAE.pth --output DIR", "needs either --preset, or both"),
        ("FAR.pth --autoencoder DCAE.pth --config FAR.json --output DIR", "needs either --preset, or both"),
        (
            "FAR.pth --autoencoder DCAE.pth --preset far-b-bair-64 --config FAR.json --output DIR",
            "needs either --preset, or both",
        ),
        ("FAR.pth --autoencoder DCAE.pth --preset far-s --output DIR", "'far-s' is not one of"),
        ("FAR.pth --autoencoder DCAE.pth --preset far-b-bair-64", "Missing option '--output'"),
        ("--reverse DIR --output FAR.pth --dtype float16", "--reverse goes with"),
        ("FAR.pth --reverse DIR --output FAR.pth", "--reverse goes with"),
    ],
)
def test_wrong_arguments_are_refused(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line.split()) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_written_in_the_dtype_asked_for(
    dtype: str, files: dict[str, Path], tmp_path: Path
) -> None:
    assert main(arguments(files, "--dtype", dtype)) == 0
    for component in ("transformer", "vae"):
        stored = load_file(files["--output"] / component / "diffusion_pytorch_model.safetensors")
        found = {tensor.dtype for tensor in stored.values() if tensor.is_floating_point()}
        assert found == {getattr(torch, dtype)}

    back = tmp_path / "FAR.safetensors"
    assert main(["--reverse", str(files["--output"]), "--output", str(back)]) == 0
    assert {tensor.dtype for tensor in load_file(back).values()} == {getattr(torch, dtype)}


def test_weights_keep_the_dtype_of_the_file(files: dict[str, Path], tmp_path: Path) -> None:
    halved = {name: tensor.bfloat16() for name, tensor in load(files["transformer"]).items()}
    save_file(halved, tmp_path / "FAR.safetensors")
    assert main(arguments(files | {"transformer": tmp_path / "FAR.safetensors"})) == 0
    stored = load_file(files["--output"] / "transformer" / "diffusion_pytorch_model.safetensors")
    assert_equal(stored, {model_name(name): tensor for name, tensor in halved.items() if name not in UNUSED})


def test_a_base_model_without_slope(golden_dir: Path, files: dict[str, Path], tmp_path: Path) -> None:
    config = json.loads((golden_dir / "generate_label_cfg.json").read_text())["config"]
    (tmp_path / "FAR.json").write_text(json.dumps(config))
    base = files | {"transformer": golden_dir / "generate_label_cfg.pth"}
    assert main(arguments(base)) == 0
    pipeline = FARVideoPipeline.from_pretrained(files["--output"])
    assert pipeline.config.flex_rope_slope == 0
    assert pipeline.transformer.config.num_classes == 5
    back = tmp_path / "back.pth"
    assert main(["--reverse", str(files["--output"]), "--output", str(back)]) == 0
    assert_equal(load(back), load(base["transformer"]))


def test_a_preset_sets_the_size_of_videos(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Weights of a published size would be large: build the small golden models under a preset's name instead.
    model = preset("far-b-long-dmlab")
    config, _ = convert_published_config(json.loads(files["--config"].read_text()))
    small = json.loads(files["--autoencoder-config"].read_text())
    monkeypatch.setattr(type(model), "transformer", property(lambda self: config))
    monkeypatch.setattr(type(model), "autoencoder", property(lambda self: small))
    output = str(files["--output"])
    line = [str(files["transformer"]), "--autoencoder", str(files["--autoencoder"]), "--output", output]
    assert main([*line, "--preset", model.name]) == 0
    pipeline = FARVideoPipeline.from_pretrained(output)
    assert pipeline.config.sample_size == 64
    assert pipeline.config.flex_rope_slope == 0


# What can be wrong


def test_an_existing_output_is_refused(files: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    output = files["--output"]
    output.mkdir(parents=True)
    (output / "mine.txt").write_text("keep")
    assert main(arguments(files)) == 1
    assert f"{output}: exists already, and is not an empty folder" in capsys.readouterr().err
    assert [path.name for path in output.iterdir()] == ["mine.txt"]

    (output / "mine.txt").unlink()
    assert main(arguments(files)) == 0
    assert (output / "model_index.json").is_file()
    assert main(["--reverse", str(output), "--output", str(output / "model_index.json")]) == 1
    assert "model_index.json: exists already" in capsys.readouterr().err


def without(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


TRANSFORMER_FAULTS = {
    "missing": (
        without("transformer_blocks.1.mlp.net.2.bias"),
        "missing transformer_blocks.1.mlp.net.2.bias [32]",
    ),
    "missing, renamed in ours": (
        without("action_embedder.embedding_table.weight"),
        "missing action_embedder.embedding_table.weight [5, 32]",
    ),
    "unknown": (lambda tensors: tensors | {"extra.weight": torch.zeros(2, 3)}, "unknown extra.weight [2, 3]"),
    "misshapen": (
        lambda tensors: tensors | {"x_embedder.weight": torch.zeros(32, 8)},
        "x_embedder.weight has shape [32, 8], expected [32, 4]",
    ),
    "misshapen though unused": (
        lambda tensors: tensors | {"context_proj_out.bias": torch.zeros(63)},
        "context_proj_out.bias has shape [63], expected [64]",
    ),
    "another model": (lambda tensors: {"weight": torch.zeros(1)}, "missing x_embedder.weight [32, 4]"),
    "twice": (
        lambda tensors: tensors | {"action_embedder.weight": torch.zeros(5, 32)},
        "action_embedder.weight is there twice",
    ),
    "not a tensor": (lambda tensors: tensors | {"x_embedder.bias": 3.0}, "x_embedder.bias is a float"),
    "empty": (lambda tensors: {}, "holds no tensors"),
    "a list": (lambda tensors: list(tensors.values()), "holds a list, not tensors by name"),
    "one tensor": (lambda tensors: tensors["x_embedder.bias"], "holds a Tensor, not tensors by name"),
    "an object": (lambda tensors: Path("code"), "cut short, or not a checkpoint of tensors only"),
}


@pytest.mark.parametrize("fault", TRANSFORMER_FAULTS)
def test_a_faulty_transformer_is_named_and_nothing_is_written(
    fault: str, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, message = TRANSFORMER_FAULTS[fault]
    faulty = tmp_path / "faulty.pth"
    torch.save(change(load(files["transformer"])), faulty)
    assert main(arguments(files | {"transformer": faulty})) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("Error: ")
    assert message in error
    assert str(faulty) in error or fault == "twice"
    assert not files["--output"].parent.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("decoder.conv_in.bias"), "missing decoder.conv_in.bias [16]"),
        (without("decoder.up_blocks.1.1.norm.running_var"), "missing decoder.up_blocks.1.1.norm.running_var"),
        (lambda tensors: tensors | {"loss.weight": torch.zeros(1)}, "unknown loss.weight [1]"),
    ],
)
def test_a_faulty_autoencoder_is_named_and_nothing_is_written(
    change: Callable[[dict[str, Any]], dict[str, Any]],
    message: str,
    files: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    faulty = tmp_path / "faulty.pth"
    torch.save(change(load(files["--autoencoder"])), faulty)
    assert main(arguments(files | {"--autoencoder": faulty})) == 1
    assert f"{faulty} does not fit the configuration: {message}" in capsys.readouterr().err
    assert not files["--output"].parent.exists()


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("cut.pth", cut),
        ("tiny.pth", lambda content: content[:10]),
        ("empty.pth", lambda content: b""),
        ("text.pth", lambda content: b"not a checkpoint\n"),
        ("image.pth", lambda content: b"\x89PNG\r\n\x1a\n" + content[:200]),
        ("other.safetensors", lambda content: content),
        ("empty.safetensors", lambda content: b""),
    ],
)
def test_an_unreadable_file_is_named(
    name: str,
    damage: Callable[[bytes], bytes],
    files: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damaged = tmp_path / name
    damaged.write_bytes(damage(files["transformer"].read_bytes()))
    for option in ("transformer", "--autoencoder"):
        assert main(arguments(files | {option: damaged})) == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.endswith(f"{damaged}: cut short, or not a checkpoint of tensors only")
    assert not files["--output"].parent.exists()


def test_a_cut_safetensors_file_is_named(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = tmp_path / "FAR.safetensors"
    save_file(load(files["transformer"]), damaged)
    damaged.write_bytes(cut(damaged.read_bytes()))
    assert main(arguments(files | {"transformer": damaged})) == 1
    assert f"{damaged}: cut short" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["transformer", "--autoencoder", "--config", "--autoencoder-config"])
def test_an_absent_file_is_named(
    option: str, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for absent in (tmp_path / "absent", tmp_path):  # nothing, and a folder
        assert main(arguments(files | {option: absent})) == 1
        assert f"{absent}: there is no such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "content", "message"),
    [
        ("--config", "{", "not a JSON file"),
        ("--config", "[1]", "holds a list, not a JSON object"),
        ("--config", '{"_class_name": "FARTransformer3DModel"}', "unknown key _class_name"),
        ("--autoencoder-config", "{", "not a JSON file"),
        ("--autoencoder-config", '{"latent_chanels": 4}', "unknown keys latent_chanels"),
        ("--autoencoder-config", '{"_class_name": "AutoencoderKL"}', "it is one of AutoencoderKL"),
        (
            "--autoencoder-config",
            '{"encoder_block_types": "None"}',
            "no AutoencoderDC can be built from the configuration",
        ),
    ],
)
def test_a_wrong_configuration_is_named(
    option: str,
    content: str,
    message: str,
    files: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = tmp_path / "wrong.json"
    config.write_text(content)
    assert main(arguments(files | {option: config})) == 1
    assert message in capsys.readouterr().err
    assert not files["--output"].parent.exists()


def test_a_failed_write_leaves_nothing(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def save_half(self: AutoencoderDC, folder: str | os.PathLike[str], **kwargs: Any) -> None:
        Path(folder).mkdir(parents=True)
        (Path(folder) / "half").write_text("half")
        raise OSError("No space left on device")

    monkeypatch.setattr(AutoencoderDC, "save_pretrained", save_half)
    assert main(arguments(files)) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert list(files["--output"].parent.iterdir()) == []


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: (folder / "transformer" / "config.json").unlink(), "there is no such file"),
        (
            lambda folder: (folder / "vae" / "config.json").write_text("{}"),
            "vae is a None, expected AutoencoderDC",
        ),
        (
            lambda folder: (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"x"),
            "cut short, or not a checkpoint of tensors only",
        ),
    ],
)
def test_a_broken_pipeline_folder_is_named_and_nothing_is_written(
    break_it: Callable[[Path], Any],
    message: str,
    files: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(arguments(files)) == 0
    break_it(files["--output"])
    back = (
        "--output",
        str(tmp_path / "back" / "FAR.pth"),
        "--autoencoder",
        str(tmp_path / "back" / "DCAE.pth"),
    )
    assert main(["--reverse", str(files["--output"]), *back]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "back").exists()
