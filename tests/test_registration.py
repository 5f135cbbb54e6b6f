"""What diffusers knows of the package, whichever module a program imports first."""

import json
from pathlib import Path

import diffusers
import pytest

import diffusers_far
from tests.python_process import run_python
from tests.tiny_models import pipeline

ROUTES = {
    "names": "from diffusers_far import FARVideoPipeline",
    "model": "from diffusers_far.transformer_far import FARTransformer3DModel",
    "pipeline": "import diffusers_far.pipeline_far_video",
    "diffusers": "from diffusers import DiffusionPipeline, FluxPipeline; import diffusers_far.kv_cache",
}


def printed_by(code: str, repository: Path) -> str:
    """What a process prints that has imported neither diffusers nor us."""
    done = run_python(["-c", code], cwd=repository, imported="torch")
    assert done.returncode == 0, done.stderr
    return done.stdout


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    pipeline().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("route", ROUTES)
def test_every_import_does_the_same(route: str, saved: Path, tmp_path: Path, repository: Path) -> None:
    save = (
        f"from tests.tiny_models import pipeline; pipe = pipeline(); pipe.save_pretrained({str(tmp_path)!r})"
    )
    methods = "pipe._upload_folder, pipe.transformer._upload_folder, pipe.transformer.from_single_file"
    printed = printed_by(f"{ROUTES[route]}\n{save}\nprint(*(m.__module__ for m in ({methods})))", repository)
    assert printed.split()[-3:] == ["diffusers_far.hub", "diffusers_far.hub", "diffusers_far.single_file"]
    assert contents(tmp_path) == contents(saved)
    assert json.loads((tmp_path / "model_index.json").read_text())["transformer"][0] == "diffusers_far"


@pytest.mark.parametrize(
    ("imports", "library"),
    [
        ("import diffusers_far, diffusers", "diffusers_far"),
        ("import diffusers, diffusers_far", "diffusers_far.transformer_far"),  # in older checkpoints
    ],
)
def test_the_general_class_loads_after_a_bare_import(
    imports: str, library: str, saved: Path, tmp_path: Path, repository: Path
) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for path in saved.iterdir():
        (folder / path.name).symlink_to(path)
    index = json.loads((saved / "model_index.json").read_text())
    index["transformer"][0] = library
    (folder / "model_index.json").unlink()
    (folder / "model_index.json").write_text(json.dumps(index))
    again = tmp_path / "again"
    code = f"pipe = diffusers.DiffusionPipeline.from_pretrained({str(folder)!r}); print(type(pipe).__name__)"
    printed = printed_by(f"{imports}\n{code}; pipe.save_pretrained({str(again)!r})", repository)
    assert printed.split()[-1] == "FARVideoPipeline"
    assert json.loads((again / "model_index.json").read_text())["transformer"][0] == "diffusers_far"


def test_no_subpackage_is_named_like_one_of_diffusers_pipelines() -> None:
    # diffusers would write its name as the library of a class in it, and look the class up in its own.
    package = Path(diffusers_far.__file__).parent
    assert not [
        path.name
        for path in package.rglob("*")
        if path.is_dir() and hasattr(diffusers.pipelines, path.name) and path.name != "__pycache__"
    ]
