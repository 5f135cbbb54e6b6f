"""The fast tests with every Python that is claimed, and the oldest and the newest libraries claimed.

    python tests/version_matrix.py                # or make check-versions; all rows, one after the other
    python tests/version_matrix.py 3.11 --oldest  # one of them

Each row is an environment of its own, made by uv (`pip install uv`) from what pyproject.toml claims. "Newest"
is what pip would choose, with the PyTorch release of constraints.txt; "oldest" is the lowest version of each
library that pyproject.toml names (uv's `lowest-direct`). A Python that is not on the machine is skipped, and
the table says so.

It is not a part of the continuous checks: PyTorch may come with CUDA, several GB for each environment.
"""

import argparse
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
SHOWN = ("diffusers", "transformers", "torch", "accelerate", "huggingface-hub", "numpy", "peft")
# What changes with the libraries: model, cache, pipeline, loading, adapters, the published numbers, training.
TESTS = (
    "tests/test_attention.py",
    "tests/test_checked_loading.py",
    "tests/test_context_schedule.py",
    "tests/test_flow_matching.py",
    "tests/test_hook_registry.py",
    "tests/test_inputs.py",
    "tests/test_key_map.py",
    "tests/test_kv_cache.py",
    "tests/test_lora.py",
    "tests/test_pipeline_far_video.py",
    "tests/test_registration.py",
    "tests/test_rollout.py",
    "tests/test_single_file.py",
    "tests/test_transformer_far.py",
    "tests/test_video_files.py",
    "tests/parity",
    "tests/training/test_objectives.py",
)
SLOW = "compile or constant_memory"  # in the names of tests


@dataclass(frozen=True)
class Row:
    python: str
    oldest: bool

    def __str__(self) -> str:
        return f"Python {self.python}, {'oldest' if self.oldest else 'newest'} libraries"


# The oldest libraries have no wheels for the newest Python.
ROWS = (Row("3.11", True), Row("3.11", False), Row("3.12", False), Row("3.13", False))


@dataclass
class Result:
    row: Row
    outcome: str
    versions: dict[str, str]


def uv(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run uv, which is on the PATH or beside this Python."""
    command = [found] if (found := shutil.which("uv")) else [sys.executable, "-m", "uv"]
    return subprocess.run([*command, *arguments], cwd=REPOSITORY, capture_output=True, text=True)


def last_line(run: subprocess.CompletedProcess[str]) -> str:
    lines = [line.strip() for line in (run.stderr + "\n" + run.stdout).splitlines() if line.strip()]
    return lines[-1] if lines else f"exit code {run.returncode}"


def check(row: Row, folder: Path, tests: list[str]) -> Result:
    """Make the environment of a row below `folder`, and run the tests in it."""
    found = uv("python", "find", "--no-python-downloads", "--no-project", row.python)
    if found.returncode != 0:
        reason = f"skipped: no Python {row.python} on this machine (`uv python install {row.python}`)"
        return Result(row, reason, {})
    environment = folder / str(row).replace(" ", "-").replace(",", "")
    made = uv("venv", "--quiet", "--clear", "--python", found.stdout.strip(), environment)
    python = environment / "bin/python"
    pins = ["--resolution", "lowest-direct"] if row.oldest else ["--constraint", "constraints.txt"]
    if made.returncode == 0:
        packages = ["--editable", ".[train,eval]", "pytest>=8", "pytest-timeout>=2.4", "pytest-xdist>=3.6"]
        made = uv("pip", "install", "--quiet", "--python", python, *pins, *packages)
    if made.returncode != 0:
        print(made.stderr, file=sys.stderr)
        return Result(row, f"failed: no environment: {last_line(made)}", {})
    (site_packages,) = environment.glob("lib/python*/site-packages")
    installed = {
        distribution.metadata["Name"].lower().replace("_", "-"): distribution.version
        for distribution in importlib.metadata.distributions(path=[str(site_packages)])
    }
    versions = {name: installed.get(name, "-") for name in SHOWN}
    variables = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")
    }
    start = time.monotonic()
    run = subprocess.run(
        [python, "-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider", "-k", f"not ({SLOW})", *tests],
        cwd=REPOSITORY,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    (folder / f"{environment.name}.log").write_text(run.stdout, encoding="utf-8")
    summary = re.findall(r"^=*\s*(\d+ .*) in [\d.]+s.*$", run.stdout, flags=re.M)
    words = summary[-1] if summary else run.stdout.strip().splitlines()[-1]
    if run.returncode != 0:
        print("\n".join(re.findall(r"^(?:FAILED|ERROR|E ) .*", run.stdout, flags=re.M)[:20]), file=sys.stderr)
        words = f"failed: {words}"
    return Result(row, f"{words}, {time.monotonic() - start:.0f} s", versions)


def table(results: list[Result]) -> str:
    lines = [
        "| Python | libraries | " + " | ".join(SHOWN) + " | result |",
        "|" + "---|" * (len(SHOWN) + 3),
    ]
    for result in results:
        versions = " | ".join(result.versions.get(name, "") for name in SHOWN)
        kind = "oldest" if result.row.oldest else "newest"
        lines.append(f"| {result.row.python} | {kind} | {versions} | {result.outcome} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("python", nargs="*", help="versions of Python; default: all that are claimed")
    parser.add_argument("--oldest", action="store_true", help="only the rows with the oldest libraries")
    parser.add_argument("--tests", nargs="+", default=list(TESTS), help="default: the fast ones")
    parser.add_argument("--folder", type=Path, help="keeps environments and logs; default: a temporary one")
    arguments = parser.parse_args()
    known = sorted({row.python for row in ROWS})
    if unknown := set(arguments.python) - set(known):
        parser.error(f"python={sorted(unknown)} takes some of {known}")
    rows = [
        row
        for row in ROWS
        if row.python in (arguments.python or known) and (row.oldest or not arguments.oldest)
    ]
    if not rows:
        parser.error("no row is left: the oldest libraries are tried on Python 3.11 alone")
    if uv("--version").returncode != 0:
        parser.error("needs uv, which makes the environments: pip install uv")
    results = []
    with tempfile.TemporaryDirectory(prefix="diffusers-far-versions-") as temporary:
        for row in rows:
            print(f"{row} ...", file=sys.stderr, flush=True)
            results.append(check(row, (arguments.folder or Path(temporary)).absolute(), arguments.tests))
            print(f"  {results[-1].outcome}", file=sys.stderr, flush=True)
    print(table(results))
    if any(result.outcome.startswith("failed") for result in results):
        sys.exit(1)
    if not any(result.versions for result in results):
        sys.exit("no row was checked")


if __name__ == "__main__":
    main()
