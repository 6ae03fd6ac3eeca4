"""The notebooks of the docs run from their first cell to their last, and show what they ran."""

import ast
import re
from html import unescape
from pathlib import Path

import nbformat
import pytest
import torch
from models import GENERATION, bridge, tokens
from nbclient import NotebookClient
from shown import alike

from actctx import capture
from actctx.plot import colour_tokens

pytestmark = pytest.mark.thorough

FOLDER = Path(__file__).parents[2] / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
# What the others print depends on the machine, as times do, or on texts that come with Python.
STEADY = ["find-directions", "fine-tune-and-see-what-moved"]
SPAN = re.compile(r'<span title="([^"]+)" style="[^"]*">([^<]*)</span>')
TAG = re.compile(r"<[^>]+>")
HEADER = re.compile(r"<th[^>]*>([^<]*)</th>")


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


def html(path):
    outputs = [output for cell in code(read(path)) for output in cell.outputs]
    return [output.data["text/html"] for output in outputs if "text/html" in output.get("data", {})]


def coloured_today(html):
    """Coloured tokens as they are made now, with the tokens and values of those that are stored."""
    values, words = zip(*SPAN.findall(html), strict=True)
    return colour_tokens([*map(unescape, words)], torch.tensor([*map(float, values)]))._repr_html_()


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
    assert not alike("0.015", "0.000")
    assert not alike("3 of 32", "2 of 32")


def test_buffers_and_coloured_tokens_are_shown():
    assert [path.stem for path in NOTEBOOKS if html(path)] == [
        "find-directions",
        "train-a-sparse-autoencoder",
        "which-tokens-excite-which-neurons",
    ]


@pytest.mark.parametrize("path", [*filter(html, NOTEBOOKS)], ids=lambda path: path.stem)
def test_the_html_of_a_notebook_is_as_it_is_made_today(path):
    model = bridge()
    with capture(model, "blocks.0.hook_resid_post") as acts:
        model(tokens())
    tags, headers = set(TAG.findall(acts._repr_html_())), HEADER.findall(acts._repr_html_())
    for stored in html(path):
        if "<span" in stored:
            assert alike(stored, coloured_today(stored))
        else:
            assert set(TAG.findall(stored)) == tags
            assert HEADER.findall(stored) == headers


def test_html_of_other_colours_is_not_as_it_is_made_today():
    stored = colour_tokens(["<s>", "cat"], torch.tensor([1.0, -0.5]))._repr_html_()
    assert alike(stored, coloured_today(stored))
    assert not alike(stored.replace("0.50)", "1.00)"), coloured_today(stored))


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
