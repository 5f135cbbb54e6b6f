"""Exports a pipeline's folder in the form that loads without this package, with `trust_remote_code=True`.

    python pipelines/build.py --checkpoint checkpoints/far-doom-maze-64    # to outputs/, which git ignores

diffusers takes code from single files: `pipeline.py` beside model_index.json and `transformer_far.py` beside
the transformer's weights. Each is made of the modules of src/diffusers_far that it needs, in order; published
files and model cards are not among them. Upload such a folder to a branch of its own (`remote-code`): where
code lies beside weights, diffusers wants trust even if the package is installed.
"""

import argparse
import ast
import json
import os
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "diffusers_far"
NOTE = "Made from the package diffusers-far by its pipelines/build.py; change it there."


def imported_modules(tree: ast.Module) -> list[str]:
    """Modules of the package that a module imports, at its top level."""
    return [
        node.module for node in tree.body if isinstance(node, ast.ImportFrom) and node.level and node.module
    ]


def modules_in_order(name: str) -> list[str]:
    """The module and all that it needs, each after what it needs itself."""
    order: list[str] = []

    def visit(module: str) -> None:
        if module in order:
            return
        for needed in imported_modules(ast.parse((SOURCE / f"{module}.py").read_text())):
            visit(needed)
        order.append(module)

    visit(name)
    return order


def flatten(name: str) -> str:
    """The source of one file that holds a module and all that it needs."""
    plain: set[str] = set()
    imports: dict[str, set[str]] = {}
    bodies, defined = [], {}
    for module in modules_in_order(name):
        text = (SOURCE / f"{module}.py").read_text()
        tree, lines = ast.parse(text), text.splitlines()
        for node in tree.body:
            names = [node.name] if isinstance(node, ast.ClassDef | ast.FunctionDef) else []
            names += [target.id for target in getattr(node, "targets", []) if isinstance(target, ast.Name)]
            for taken in names:
                if taken in defined:
                    raise ValueError(f"{taken} is defined in {defined[taken]}.py and in {module}.py")
                defined[taken] = module
            if isinstance(node, ast.Import):
                plain.add(ast.unparse(node))
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imports.setdefault(node.module, set()).update(ast.unparse(alias) for alias in node.names)
        gone = [tree.body[0], *(node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom))]
        for node in gone:
            lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
        title = ast.get_docstring(tree).splitlines()[0]
        bodies.append(f"# {module}.py: {title}\n\n" + "\n".join(lines).strip())
    code = "\n\n\n".join(bodies)
    head = [
        *sorted(plain),
        *(f"from {key} import {', '.join(sorted(imports[key]))}" for key in sorted(imports)),
    ]
    return f'"""{NOTE}"""\n\n' + "\n".join(head) + "\n\n\n" + code + "\n"


def export(checkpoint: Path, output: Path) -> None:
    """Write a copy of a pipeline's folder that brings its code.

    Args:
        checkpoint: folder of a FARVideoPipeline.
        output: folder to write; it must not be there yet.

    Raises:
        ValueError: where `checkpoint` is no pipeline of ours.
        FileNotFoundError: where it has no model_index.json.
        FileExistsError: where `output` is there already.
    """
    index = json.loads((checkpoint / "model_index.json").read_text())
    if index.get("_class_name") != "FARVideoPipeline":
        raise ValueError(
            f"{checkpoint} is a pipeline of class {index.get('_class_name')}, not FARVideoPipeline"
        )
    if output.exists():
        raise FileExistsError(f"{output} is there already; it takes a new folder")
    partial = output.with_name(output.name + ".partial")
    output.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(checkpoint, partial)
    index["_class_name"] = ["pipeline", "FARVideoPipeline"]
    index["transformer"] = ["transformer_far", "FARTransformer3DModel"]
    (partial / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    (partial / "pipeline.py").write_text(flatten("pipeline_far_video"))
    (partial / "transformer" / "transformer_far.py").write_text(flatten("transformer_far"))
    os.replace(partial, output)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of a pipeline")
    parser.add_argument("--output", type=Path, help="new folder; default: NAME-remote-code in outputs/")
    arguments = parser.parse_args()
    output = arguments.output or ROOT / "outputs" / f"{arguments.checkpoint.resolve().name}-remote-code"
    export(arguments.checkpoint, output)
    print(output)


if __name__ == "__main__":
    main()
