"""Rules that the whole repository keeps: who imports whom, what an import costs, names."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import diffusers_far
from tests.python_process import run_python

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "src" / "diffusers_far"

# Folders of scripts: they import the package, not each other.
FOLDERS = ("benchmarks", "conversion", "data", "evaluation", "pipelines", "training")
FOLDER_MAY_IMPORT = {("evaluation", "data")}

VAGUE_NAMES = {"utils", "util", "helpers", "helper", "misc", "common", "tools"}
PUBLIC_NAMES = ("FARTransformer3DModel", "FARVideoPipeline", "FARCache", "ContextSchedule", "Rollout")


def python_files(*folders: Path) -> list[Path]:
    return sorted(
        path
        for folder in folders
        for path in folder.rglob("*.py")
        if not any(
            part.startswith(".") or part in ("build", "venv") for part in path.relative_to(REPOSITORY).parts
        )
    )


def folder_violations(path: Path, source: str) -> list[str]:
    """What a script, `path` below the repository, imports from the other folders."""
    folder = path.parts[0]
    # A folder may have a subfolder of the same name as another folder, such as training/data.
    own = {parent.name for parent in (REPOSITORY / folder).rglob("*") if parent.is_dir()} | {folder}
    violations = []
    for node in ast.walk(ast.parse(source)):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            modules = [node.module]
        for module in modules:
            imported = module.partition(".")[0]
            if imported in FOLDERS and imported not in own and (folder, imported) not in FOLDER_MAY_IMPORT:
                violations.append(f"line {node.lineno}: {folder} imports {module}")
    return violations


@pytest.mark.parametrize(
    ("module", "line", "broken"),
    [
        ("rope", "", []),
        ("kv_cache", "def f():\n    from .transformer_far import FARTransformer3DModel", ["layers"]),
        ("rollout", "if TYPE_CHECKING:\n    from .pipeline_far_video import FARVideoPipeline", ["layers"]),
        ("transformer_far", "from .single_file import read_checkpoint", ["layers"]),
        ("pipeline_far_video", "from . import hub", ["layers", "core"]),
        ("pipeline_far_video", "from huggingface_hub import HfApi", ["core"]),
        ("inputs", "def f():\n    import av", ["video"]),
        ("presets", "from conversion.convert_far import main", ["scripts"]),
        ("novelty", "", ["layers"]),
    ],
)
def test_imports_go_downward(module: str, line: str, broken: list[str], tmp_path: Path) -> None:
    """The contracts of pyproject.toml hold, and one breaks where a copy's module imports what it must not."""
    shutil.copytree(PACKAGE, tmp_path / "diffusers_far", ignore=shutil.ignore_patterns("__pycache__"))
    with open(tmp_path / "diffusers_far" / f"{module}.py", "a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")
    settings = REPOSITORY / "pyproject.toml"
    lint = "from importlinter.cli import import_linter; import_linter()"
    run = subprocess.run(
        [sys.executable, "-c", lint, "lint", "--no-cache", "--no-logo", str(settings)],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    names = re.findall(r"^(.+) BROKEN\b", run.stdout, flags=re.M)
    contracts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["importlinter"][
        "contracts"
    ]
    assert [contract["id"] for contract in contracts if contract["name"] in names] == broken, run.stdout
    assert run.returncode == (1 if broken else 0), run.stdout + run.stderr


@pytest.mark.parametrize(
    "path",
    python_files(*(REPOSITORY / folder for folder in FOLDERS)),
    ids=lambda path: path.relative_to(REPOSITORY).as_posix(),
)
def test_folders_do_not_import_each_other(path: Path) -> None:
    assert folder_violations(path.relative_to(REPOSITORY), path.read_text(encoding="utf-8")) == []


def test_the_folder_rule_finds_violations() -> None:
    script = Path("conversion/speed.py")
    assert folder_violations(script, "from diffusers_far import FARVideoPipeline") == []
    assert folder_violations(Path("evaluation/report.py"), "import data.doom_maze") == []
    assert len(folder_violations(script, "def f():\n    from evaluation.world_model import predict")) == 1
    assert len(folder_violations(Path("evaluation/report.py"), "import training.train_far")) == 1


def test_files_are_named_for_what_they_hold() -> None:
    vague = [
        path.relative_to(REPOSITORY).as_posix()
        for path in python_files(REPOSITORY)
        if path.stem in VAGUE_NAMES or VAGUE_NAMES & set(path.relative_to(REPOSITORY).parts[:-1])
    ]
    assert vague == []


def test_public_names_are_there() -> None:
    for name in PUBLIC_NAMES:
        assert name in diffusers_far.__all__
        assert getattr(diffusers_far, name).__name__ == name
        assert name in dir(diffusers_far)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = diffusers_far.no_such_name  # type: ignore[attr-defined]


def test_the_version_is_that_of_the_metadata() -> None:
    metadata = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(r'^version = "(.*)"$', metadata, flags=re.M).group(1) == diffusers_far.__version__
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == diffusers_far.__version__


def printed_by(code: str) -> str:
    """What a process prints that has imported neither diffusers nor us. Processor time is its own alone."""
    run = run_python(["-c", code], imported="torch")
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_importing_the_package_costs_nothing() -> None:
    code = (
        "import sys, time; before = time.process_time(); import diffusers_far; "
        "print(time.process_time() - before, 'torch' in sys.modules)"
    )
    seconds, imports_torch = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert float(seconds) < 0.5
    assert imports_torch == "False"


def test_the_app_writes_nothing_into_the_package(tmp_path: Path) -> None:
    """As gradio does beside classes of components, in stubs that outlive changes of the module."""
    pytest.importorskip("gradio")
    shutil.copytree(
        PACKAGE, tmp_path / "diffusers_far", ignore=shutil.ignore_patterns("*.pyi", "__pycache__")
    )
    before = sorted(tmp_path.rglob("*"))
    code = "import sys; sys.dont_write_bytecode = True; "
    code += "import diffusers_far.browser.app as app; print(app.__file__)"
    done = run_python(["-c", code], cwd=tmp_path, imported="torch")
    assert done.stdout.strip().startswith(str(tmp_path))
    assert sorted(tmp_path.rglob("*")) == before


def test_the_pipeline_imports_no_optional_package() -> None:
    optional = {
        "av",
        "datasets",
        "gradio",
        "matplotlib",
        "scipy",
        "tensorboard",
        "torchmetrics",
        "vizdoom",
        "yaml",
    }
    code = (
        "import sys; from diffusers import DiffusionPipeline; before = set(sys.modules); "
        "from diffusers_far import FARVideoPipeline; print(*sys.modules.keys() - before)"
    )
    imported = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert optional.isdisjoint(imported.split())


def test_the_pipeline_adds_little_to_the_import_time_of_diffusers() -> None:
    seconds = printed_by(
        "import time; "
        "from diffusers import AutoencoderDC, DiffusionPipeline, FlowMatchEulerDiscreteScheduler; "
        "before = time.process_time(); from diffusers_far import FARVideoPipeline; "
        "print(time.process_time() - before)"
    )
    assert float(seconds) < 2.5
