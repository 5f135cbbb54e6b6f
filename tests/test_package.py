"""Rules that the whole repository keeps: who imports whom, what an import costs, file sizes and names."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import diffusers_far

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "src" / "diffusers_far"

# A module imports only from lower floors...
FLOORS = {
    "frame_layout": 0,
    "kv_cache": 0,
    "matmul_attention": 0,
    "rope": 0,
    "flow_matching": 0,
    "presets": 0,
    "key_map": 0,
    "single_file": 0,
    "pipeline_inputs": 0,
    "hub": 0,
    "registration": 0,
    "attention": 1,
    "transformer_far": 2,
    "context_schedule": 2,
    "rollout": 3,
    "pipeline_far_video": 3,
    "__init__": 4,
    "demo": 4,
    "convert_published": 4,
    "cli": 6,
    "space": 5,  # a folder: nothing imports it
}
# ... and from its own in these cases, one way. In the other direction only types, or inside a function.
SAME_FLOOR = {
    ("pipeline_far_video", "rollout"),
    ("single_file", "key_map"),
    ("single_file", "presets"),
    ("demo", "__init__"),
    ("space", "space"),
}

# Folders of scripts: they import the package, not each other.
FOLDERS = ("benchmarks", "conversion", "data", "evaluation", "pipelines", "training")
FOLDER_MAY_IMPORT = {("training", "evaluation")}

MAX_LINES = 450
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "misc", "common", "tools"}
PUBLIC_NAMES = ("FARTransformer3DModel", "FARVideoPipeline", "FARCache", "ContextSchedule", "Rollout")


class Import(NamedTuple):
    module: str  # dotted, absolute
    deferred: bool  # inside a function or under `if TYPE_CHECKING`
    line: int


def imports(source: str, package: str = "") -> Iterator[Import]:
    """All imports of a file that lies directly in `package`, which may be dotted."""

    def visit(node: ast.AST, deferred: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, deferred, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            above = package.rsplit(".", node.level - 1)[0] if node.level else ""
            base = ".".join(filter(None, [above, node.module]))
            for alias in node.names:
                yield Import(f"{base}.{alias.name}", deferred, node.lineno)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.body:
                yield from visit(child, True)
            for child in node.orelse:
                yield from visit(child, deferred)
        else:
            inner = deferred or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for child in ast.iter_child_nodes(node):
                yield from visit(child, inner)

    yield from visit(ast.parse(source), False)


def python_files(*folders: Path) -> list[Path]:
    return sorted(
        path
        for folder in folders
        for path in folder.rglob("*.py")
        if not any(
            part.startswith(".") or part in ("build", "venv") for part in path.relative_to(REPOSITORY).parts
        )
    )


def floor_violations(module: str, source: str) -> list[str]:
    """What a module of the package, or of its folder `space`, imports against the floors."""
    violations = []
    for found in imports(source, package="diffusers_far.space" if module == "space" else "diffusers_far"):
        if found.module.partition(".")[0] != "diffusers_far":
            if found.module.partition(".")[0] in FOLDERS:
                violations.append(f"line {found.line}: the package imports {found.module}")
            continue
        parts = found.module.split(".")
        imported = parts[1] if len(parts) > 1 and parts[1] in FLOORS else "__init__"
        below = FLOORS[imported] < FLOORS[module]
        beside = FLOORS[imported] == FLOORS[module] and (found.deferred or (module, imported) in SAME_FLOOR)
        if not below and not beside:
            violations.append(
                f"line {found.line}: {module} (floor {FLOORS[module]}) imports {imported} "
                f"(floor {FLOORS[imported]})"
            )
    return violations


def folder_violations(path: Path, source: str) -> list[str]:
    """What a script, `path` below the repository, imports from the other folders."""
    folder = path.parts[0]
    # A folder may have a subfolder of the same name as another folder, such as training/data.
    own = {parent.name for parent in (REPOSITORY / folder).rglob("*") if parent.is_dir()} | {folder}
    violations = []
    for found in imports(source, package=".".join(path.parts[:-1])):
        imported = found.module.partition(".")[0]
        if imported in FOLDERS and imported not in own and (folder, imported) not in FOLDER_MAY_IMPORT:
            violations.append(f"line {found.line}: {folder} imports {found.module}")
    return violations


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_a_module_imports_from_lower_floors_only(path: Path) -> None:
    module = path.parent.name if path.parent.name == "space" else path.stem
    if module != "space":
        assert path.parent == PACKAGE, "the package is flat"
    assert module in FLOORS, f"give {module} a floor in FLOORS"
    assert floor_violations(module, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("kv_cache", "from .transformer_far import FARTransformer3DModel"),
        ("kv_cache", "def f():\n    from diffusers_far.rollout import Rollout"),
        ("rollout", "from .pipeline_far_video import FARVideoPipeline"),
        ("rollout", "from . import pipeline_far_video"),
        ("rollout", "import diffusers_far.pipeline_far_video"),
        ("transformer_far", "from diffusers_far import FARCache"),
        ("presets", "from conversion.convert_far import main"),
        ("demo", "from .space.players import Game"),
    ],
)
def test_the_floor_rule_finds_violations(module: str, source: str) -> None:
    assert len(floor_violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("pipeline_far_video", "from .rollout import Rollout\nfrom .presets import preset"),
        ("rollout", "if TYPE_CHECKING:\n    from .pipeline_far_video import FARVideoPipeline"),
        ("rollout", "def f():\n    from .pipeline_far_video import FARVideoPipeline"),
        ("presets", "import torch\nfrom diffusers import ModelMixin"),
        ("space", "from ..rollout import Rollout\nfrom .players import Game"),
    ],
)
def test_the_floor_rule_allows_what_it_should(module: str, source: str) -> None:
    assert floor_violations(module, source) == []


@pytest.mark.parametrize(
    "path",
    python_files(*(REPOSITORY / folder for folder in FOLDERS)),
    ids=lambda path: path.relative_to(REPOSITORY).as_posix(),
)
def test_folders_do_not_import_each_other(path: Path) -> None:
    assert folder_violations(path.relative_to(REPOSITORY), path.read_text(encoding="utf-8")) == []


def test_the_folder_rule_finds_violations() -> None:
    script = Path("benchmarks/speed.py")
    assert folder_violations(script, "from diffusers_far import FARVideoPipeline") == []
    assert folder_violations(Path("training/train_far.py"), "import evaluation.metrics") == []
    assert len(folder_violations(script, "def f():\n    from evaluation.metrics import psnr")) == 1
    assert len(folder_violations(Path("evaluation/report.py"), "import training.train_far")) == 1


def test_no_file_is_too_long() -> None:
    too_long = {
        path.relative_to(REPOSITORY).as_posix(): lines
        for path in python_files(REPOSITORY)
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > MAX_LINES
    }
    assert too_long == {}, f"more than {MAX_LINES} lines"


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


def run_python(code: str) -> str:
    """What a fresh interpreter prints. It measures processor time: other programs do not count."""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_importing_the_package_costs_nothing() -> None:
    seconds, imports_torch = run_python(
        "import sys, time; before = time.process_time(); import diffusers_far; "
        "print(time.process_time() - before, 'torch' in sys.modules)"
    ).split()
    assert float(seconds) < 0.5
    assert imports_torch == "False"


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
    imported = run_python(
        "import sys; from diffusers import DiffusionPipeline; before = set(sys.modules); "
        "from diffusers_far import FARVideoPipeline; print(*sys.modules.keys() - before)"
    )
    assert optional.isdisjoint(imported.split())


def test_the_pipeline_adds_little_to_the_import_time_of_diffusers() -> None:
    seconds = run_python(
        "import time; "
        "from diffusers import AutoencoderDC, DiffusionPipeline, FlowMatchEulerDiscreteScheduler; "
        "before = time.process_time(); from diffusers_far import FARVideoPipeline; "
        "print(time.process_time() - before)"
    )
    assert float(seconds) < 2.5
