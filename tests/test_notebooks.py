"""The notebooks of the docs run from their first cell to their last, and show what they ran."""

import ast
import math
import re
from pathlib import Path

import nbformat
import pytest
from models import GENERATION
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
# What the others print depends on the machine, as times do, or on texts that come with Python.
STEADY = ["find-directions", "fine-tune-and-see-what-moved"]
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def read(path):
    return nbformat.read(path, as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell):
    return "".join(output.text for output in cell.outputs if output.get("name") == "stdout")


def nodes(cell, kind):
    return [node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, kind)]


def takes_memory(cell):
    """Whether a cell runs `run_with_cache`, prints what it took, and asserts of that."""
    calls = [ast.unparse(call.func) for call in nodes(cell, ast.Call)]
    return (
        any(call.endswith(".run_with_cache") for call in calls)
        and any("cached" in ast.unparse(found.test) for found in nodes(cell, ast.Assert))
        and re.search(r"run_with_cache:? [\d.]+ MiB", printed(cell)) is not None
    )


def asserts_a_result(cell):
    return bool(nodes(cell, ast.Assert)) and not takes_memory(cell)


def alike(text, other):
    """Whether two texts are the same, but for numbers that are close."""
    numbers = zip(NUMBER.findall(text), NUMBER.findall(other), strict=False)
    return NUMBER.split(text) == NUMBER.split(other) and all(
        math.isclose(float(one), float(two), rel_tol=0.1, abs_tol=0.05) for one, two in numbers
    )


def test_there_is_one_for_each_use():
    assert len(NOTEBOOKS) == 5


@pytest.mark.skipif(GENERATION < 4, reason="they are written for TransformerLens 4")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_prints_what_it_shows(path, tmp_path):
    notebook = read(path)
    shown = [printed(cell) for cell in code(notebook)]
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": tmp_path}}).execute()
    for text, cell in zip(shown, code(notebook), strict=True):
        steady = path.stem in STEADY
        assert not steady or alike(text, printed(cell)), f"shown:\n{text}now:\n{printed(cell)}"


def test_only_close_numbers_are_alike():
    assert alike("0.92 of 32", "0.90 of 32")
    assert not alike("0.92 of 32", "0.74 of 32")
    assert not alike("0.92 of 32", "0.92 in 32")
    assert not alike("0.92", "")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_was_run_in_order_and_shows_a_plot(path):
    cells = code(read(path))
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_asserts_its_result_and_what_memory_it_spares(path):
    cells = code(read(path))
    assert any(map(asserts_a_result, cells))
    assert any(map(takes_memory, cells))


def test_words_about_run_with_cache_do_not_do():
    said = "# model.run_with_cache()\nprint('run_with_cache: 9 MiB')\nassert 'cached'"
    output = nbformat.v4.new_output("stream", name="stdout", text="run_with_cache: 9 MiB")
    assert not takes_memory(nbformat.v4.new_code_cell(said, outputs=[output]))
    ran = "cached = size(model.run_with_cache())\nassert cached > 1"
    assert not takes_memory(nbformat.v4.new_code_cell(ran))
    assert takes_memory(nbformat.v4.new_code_cell(ran, outputs=[output]))
