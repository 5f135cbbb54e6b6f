"""training/options.py: recipe and command line, and values that are refused."""

import importlib
import re
from pathlib import Path

import pytest

from diffusers_far.training.options import AutoencoderOptions, FAROptions, ModelOptions, parse
from tests.python_process import run_python
from tests.tiny_latents import run_options


def parse_far(command: list[str]) -> tuple[ModelOptions, FAROptions]:
    return parse(command, (ModelOptions, FAROptions), None)


def test_the_command_line_wins_over_the_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "latents: here\noutput-dir: there\nmax_train_steps: 5\nnum_layers: 2\nlearning_rate: 6e-4\n"
        "axes_dims_rope: [4, 6, 6]\ncompile: true\nmuon_learning_rate:\n"
    )
    sizes, options = parse_far([str(recipe), "--num-layers", "3", "--output_dir", "elsewhere"])
    assert (sizes.num_layers, sizes.axes_dims_rope, options.learning_rate) == (3, [4, 6, 6], 6e-4)
    assert (options.latents, options.output_dir, options.compile) == ("here", "elsewhere", True)
    assert options.muon_learning_rate is None


@pytest.mark.parametrize(
    "name", ["far_doom_maze.yaml", "far_doom_maze_memory.yaml", "far_doom_maze_any_step.yaml"]
)
def test_the_shipped_recipes_of_far_are_valid(repository: Path, name: str) -> None:
    _, options = parse_far([str(repository / "training/recipes" / name)])
    assert (options.objective == "flow_map") == ("any_step" in name)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--batch_size", "0"], "batch_size=0 must be an integer of at least 1"),
        (["--condition-dropout", "1.5"], r"condition_dropout=1.5 must be a number in \[0, 1\)"),
        (["--revisit_probability", "-0.1"], r"revisit_probability=-0.1 must be a number in \[0, 1\]"),
        (["--ema_power", "nan"], "ema_power=nan must be a number greater than 0"),
        (["--learning_rate", "inf"], "learning_rate=inf must be a number greater than 0"),
        (["--muon_learning_rate", "0"], "muon_learning_rate=0.0 must be a number greater than 0"),
        (["--validation_steps", "-1"], "validation_steps=-1 must be an integer of at least 0"),
        (
            ["--objective", "flow_map"],
            "pretrained=None: objective=flow_map takes the folder of a trained model",
        ),
        (
            ["--objective", "flow_map", "--pretrained", "x", "--noisy_window_probability", "0.1"],
            "noisy_window_probability=0.1: objective=flow_map takes 0",
        ),
    ],
)
def test_values_that_an_option_does_not_take_are_named(more: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_far(run_options(Path("latents"), Path("output"), *more))


def test_a_run_has_a_length() -> None:
    with pytest.raises(ValueError, match="max_train_steps=None and max_minutes=None: give the length"):
        parse_far(["--latents", "a", "--output_dir", "b"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mixed_precision", "int8"], "argument --mixed_precision.*invalid choice: 'int8'"),
        (["--batch_size", "many"], "argument --batch_size.*'many'"),
        (["--learning_rat", "1"], "unrecognized arguments: --learning_rat 1"),
    ],
)
def test_words_that_are_no_option_are_named_in_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_far(run_options(Path("latents"), Path("output"), *words))
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and re.search(message, said)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 0.1\n", "sets 'learning_rat', which is no option"),
        ("- 1\n", "is a list; it takes lines of option: value"),
        ("a: [1\n", "cannot be read"),
    ],
)
def test_bad_recipes_are_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ValueError, match=rf"recipe\.yaml {message}"):
        parse_far([str(tmp_path / "recipe.yaml")])
    with pytest.raises(ValueError, match=r"missing\.yaml cannot be read"):
        parse_far([str(tmp_path / "missing.yaml")])


def test_the_sizes_that_are_given_for_a_pretrained_model() -> None:
    assert ModelOptions().given() == {}
    given = ModelOptions(num_layers=6, num_actions=0, num_classes=3).given()
    assert given == {"num_layers": 6, "num_actions": None, "num_classes": 3}


def test_warmup_of_an_autoencoder_in_steps() -> None:
    options = AutoencoderOptions(data="d", output_dir="o", max_train_steps=200, warmup_steps=10)
    assert options.warmup_ratio == 0.05
    with pytest.raises(ValueError, match="warmup_steps=10 takes max_train_steps"):
        AutoencoderOptions(data="d", output_dir="o", max_train_steps=None, max_minutes=1.0, warmup_steps=10)


@pytest.mark.parametrize("module", ["train_far", "train_autoencoder", "encode_latents", "make_pipeline"])
def test_help_has_a_line_for_every_option(repository: Path, module: str) -> None:
    said = run_python(["-m", f"training.{module}", "--help"], repository)
    assert said.returncode == 0, said.stderr
    options = [line.strip() for line in said.stdout.splitlines() if line.startswith("  --")]
    assert len(options) > 4
    lines = said.stdout.splitlines()
    for number, line in enumerate(lines):
        if line.startswith("  --"):
            help_is_beside = len(line.split("  ")) > 2
            assert help_is_beside or lines[number + 1].startswith(" " * 20), line
    about = importlib.import_module(f"diffusers_far.training.{module}").__doc__
    assert about is not None and set(about.strip().splitlines()) <= set(lines)
    assert "default: None" not in said.stdout


def test_a_mistake_is_one_line(repository: Path, tmp_path: Path) -> None:
    words = run_options(tmp_path / "nowhere", tmp_path / "run")
    said = run_python(["-m", "training.train_far", *words], repository)
    assert said.returncode == 1
    assert said.stderr.splitlines()[-1].startswith("ValueError: latents: ") and "Traceback" not in said.stderr
    assert not (tmp_path / "run").exists()
