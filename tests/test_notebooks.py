"""The notebooks of the docs run from their first cell to their last, and show what they ran."""

from pathlib import Path

import nbformat
import pytest
from models import GENERATION
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def read(path):
    return nbformat.read(path, as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_there_is_one_for_each_use():
    assert len(NOTEBOOKS) == 5


@pytest.mark.skipif(GENERATION < 4, reason="they are written for TransformerLens 4")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path):
    client = NotebookClient(read(path), timeout=600, resources={"metadata": {"path": tmp_path}})
    client.execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_was_run_in_order_and_asserts_its_result(path):
    cells = code(read(path))
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    sources = "\n".join(cell.source for cell in cells)
    assert "assert " in sources
    assert "run_with_cache" in path.read_text()
