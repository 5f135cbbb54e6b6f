"""The notebook runs from its first cell to its last, and is kept without what that puts out."""

from pathlib import Path

import nbformat
from nbclient import NotebookClient

NUM_PICTURES = 5


def test_the_notebook_runs(repository: Path) -> None:
    file = repository / "notebooks" / "quick_start.ipynb"
    notebook = nbformat.read(file, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)  # as it is in git
    # As when it is opened in its folder. A cell that fails raises.
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(file.parent)}}).execute()
    outputs = [output for cell in cells for output in cell.outputs]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == NUM_PICTURES
    shown = "".join(output["text"] for output in outputs if output.get("name") == "stdout")
    assert "frame 3" in shown and "long: ()" in shown
