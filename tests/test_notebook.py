"""The cell magic, in a real Jupyter kernel."""

import re
from pathlib import Path
from textwrap import dedent

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from actctx.notebook import capture_activations

SETUP = """
%load_ext actctx
import torch
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
x = torch.randn(3, 4)
def hooks():
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
"""
MODELS = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from models import bridge, tokens
"""


@pytest.fixture(scope="module")
def kernel():
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell()])
    client = NotebookClient(notebook, timeout=120)
    with client.setup_kernel():
        yield client


@pytest.fixture(autouse=True)
def _fresh(kernel):
    run(kernel, SETUP)


def run(kernel, source):
    """Run a cell, and return what it shows as plain text."""
    cell = nbformat.v4.new_code_cell(source)
    kernel.execute_cell(cell, 0, store_history=False)
    shown = [each.get("text") or each["data"]["text/plain"] for each in cell.outputs]
    return "".join(shown).strip()


def test_a_cell_is_captured_under_the_name_that_was_given(kernel):
    magic = '%%capture_activations model "0" --as hidden\n'
    assert run(kernel, magic + "y = model(x)\ny.shape") == "torch.Size([3, 2])"
    assert run(kernel, "torch.equal(hidden.tensor, model[0](x)), y.requires_grad") == (
        "(True, False)"
    )
    assert run(kernel, "hooks(), 'forward' in model.__dict__") == "(0, False)"


def test_options_are_those_of_capture(kernel):
    magic = "%%capture_activations model 0 '2' --slice batch=-1 --dtype float16 --join none\n"
    with pytest.raises(CellExecutionError, match=r"the axes of the module '0' are not known"):
        run(kernel, magic + "model(x)")
    magic = "%%capture_activations model 0 '2' --dtype float16 --join none\n"
    run(kernel, magic + "model(x); model(x);")
    assert run(kernel, "[len(acts[n]) for n in acts], acts['2'][0].dtype") == (
        "([2, 2], torch.float16)"
    )


def test_statistics_and_functions_are_expressions_of_the_notebook(kernel):
    run(kernel, "from actctx.stats import Moments")
    magic = "%%capture_activations model 0 --reduce 'Moments()' --map 'lambda x: x[:, :1]'\n"
    run(kernel, magic + "model(x); model(x);")
    assert run(kernel, "acts['0'].count, acts['0'].mean.shape") == "(6, torch.Size([1]))"
    magic = "%%capture_activations model 0 --map torch.linalg.vecdot_of\n"
    with pytest.raises(CellExecutionError, match=r"--map 'torch.linalg.vecdot_of' cannot be"):
        run(kernel, magic + "model(x)")


def test_the_forward_is_stopped_early(kernel):
    shown = run(kernel, "%%capture_activations model 0 --stop\nmodel(x)")
    assert shown.startswith("<Stopped: Sequential.forward ended after '0'")


def test_the_buffer_is_there_from_the_start_of_the_cell(kernel):
    magic = "%%capture_activations model 0\n"
    assert run(kernel, magic + "model(x)\nmodel(x)\nacts.tensor.shape") == "torch.Size([6, 4])"


def test_other_magics_work_in_the_cell(kernel):
    run(kernel, "%%capture_activations model 0\n%time y = model(x)")
    assert run(kernel, "len(acts)") == "1"


def test_a_cell_that_raises_shows_its_error_and_leaves_no_hooks(kernel):
    source = "%%capture_activations model 0\nmodel(x)\n1 / 0"
    with pytest.raises(CellExecutionError, match="ZeroDivisionError") as caught:
        run(kernel, source)
    said = re.sub(r"\x1b\[[\d;]*m", "", str(caught.value).replace(source, ""))
    assert "-> 2 1 / 0" in said
    assert run(kernel, "hooks(), acts.tensor.shape") == "(0, torch.Size([3, 4]))"


def test_an_interrupted_cell_leaves_no_hooks(kernel):
    cell = "%%capture_activations model 0\nmodel(x)\nimport _thread\n_thread.interrupt_main()\n"
    with pytest.raises(CellExecutionError, match="KeyboardInterrupt"):
        run(kernel, cell + "while True: pass")
    assert run(kernel, "hooks(), len(acts)") == "(0, 1)"


def test_words_may_be_in_quotes(kernel):
    magic = '%%capture_activations "model" "0" --dtype "float16" --join "none" --as "kept"\n'
    run(kernel, magic + "model(x)")
    assert run(kernel, "kept['0'][0].dtype") == "torch.float16"


def test_an_import_from_the_future_of_an_earlier_cell_holds(kernel):
    run(kernel, "from __future__ import annotations")
    run(kernel, "%%capture_activations model 0\ndef f(x: nowhere): model(x)\nf(x)")
    assert run(kernel, "f.__annotations__") == "{'x': 'nowhere'}"


def test_a_name_that_is_not_there_is_refused_before_the_cell_runs(kernel):
    with pytest.raises(CellExecutionError, match="no module matches 'nope'"):
        run(kernel, "%%capture_activations model nope\nran = True")
    assert run(kernel, "'ran' in globals()") == "False"


@pytest.mark.parametrize("name", ["1st", "class"])
def test_a_variable_that_is_none_is_refused(kernel, name):
    with pytest.raises(CellExecutionError, match=f"--as '{name}' is not a valid variable name"):
        run(kernel, f"%%capture_activations model 0 --as {name}\nmodel(x)")


def test_the_model_keeps_its_name(kernel):
    for expression in ("model[0:2]", "list(model.children())[0]", '"[0, model][1]"'):
        with pytest.raises(CellExecutionError, match="--as 'model' would overwrite the "):
            run(kernel, f"%%capture_activations {expression} 0 --as model\nmodel(x)")
    assert run(kernel, "type(model).__name__") == "'Sequential'"


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("modle", "NameError: name 'modle' is not defined"),
        ("mod/", "SyntaxError: "),
        ("model.innr", "AttributeError: 'Sequential' object has no attribute 'innr'"),
        ('vars()["no"]', "KeyError: 'no'"),
        ("model[7]", "IndexError: index 7 is out of range"),
    ],
)
def test_a_model_that_is_not_there_is_refused(kernel, word, reason):
    said = re.escape(f"must be the model, but '{word}' is not one: {reason}")
    with pytest.raises(CellExecutionError, match=said):
        run(kernel, f"%%capture_activations {word} 0\nmodel(x)")


def test_a_model_may_be_an_expression_in_quotes(kernel):
    run(kernel, """%%capture_activations "dict(a=model)['a']" 0\nmodel(x)""")
    assert run(kernel, "acts.tensor.shape") == "torch.Size([3, 4])"


@pytest.mark.parametrize(
    ("option", "gives"),
    [
        ("--grad", "(True, torch.Size([3, 4]))"),
        ("--capacity 9", "(False, torch.Size([3, 4]))"),
        ("--capacity 2", None),
    ],
)
def test_gradients_and_room_are_asked_for(kernel, option, gives):
    cell = f"%%capture_activations model 0 {option}\nmodel(x)"
    if gives is None:
        with pytest.raises(CellExecutionError) as caught:
            run(kernel, cell)
        assert caught.value.ename == "CapacityError"
        return
    run(kernel, cell)
    assert run(kernel, "acts.tensor.requires_grad, acts.tensor.shape") == gives


def test_padding_is_left_out_and_what_is_kept_is_moved(kernel):
    run(kernel, MODELS)
    run(kernel, "model, tokens = bridge(), tokens(2, 3)")
    run(kernel, "mask = torch.tensor([[1, 1, 1], [1, 0, 0]])")
    magic = "%%capture_activations model blocks.0.hook_resid_post --mask attention --device meta\n"
    run(kernel, magic + "model(tokens, attention_mask=mask)")
    assert run(kernel, "acts.tensor.shape, acts.tensor.device.type") == (
        "(torch.Size([4, 32]), 'meta')"
    )


def test_a_picture_of_attention_is_shown_once(kernel):
    """Where a figure of pyplot is what the last line comes to, notebooks show it twice."""
    pytest.importorskip("matplotlib")
    cell = nbformat.v4.new_code_cell("""
%matplotlib inline
from torch import nn
from actctx import Site, capture
from actctx.plot import plot_pattern
even = nn.Sequential(nn.Softmax(-1))
with capture(even, Site("0", axes="batch head query key")) as acts:
    even(torch.zeros(1, 2, 3, 3))
plot_pattern(acts, "0")
""")
    kernel.execute_cell(cell, 0, store_history=False)
    assert sum("image/png" in output.get("data", {}) for output in cell.outputs) == 1


def test_a_semicolon_silences_the_cell(kernel):
    assert run(kernel, "%%capture_activations model 0\nmodel(x);") == ""


def test_the_magic_explains_itself(kernel):
    shown = run(kernel, "print(get_ipython().find_cell_magic('capture_activations').__doc__)")
    assert "--slice" in shown
    assert "The device to move the activations to; by default the model's." in " ".join(
        shown.split()
    )
    assert "Allocate N rows at the first forward." in " ".join(shown.split())


EXAMPLE = dedent(capture_activations.__doc__.partition("Example:\n")[2]).split("\n\n")[0]
PAGE = Path(__file__).parent.parent / "docs" / "notebooks.md"
CELLS = re.findall(r"^```text\n(%.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def test_the_cells_that_the_page_shows_are_found():
    assert [cell.split()[0] for cell in CELLS] == ["%load_ext", "%%capture_activations"]


@pytest.mark.parametrize("cells", [[EXAMPLE], CELLS], ids=["docstring", "page"])
def test_the_examples_of_the_magic_run(kernel, cells):
    run(kernel, MODELS)
    run(kernel, "model, tokens = bridge(), tokens(4)")
    for cell in cells:
        run(kernel, cell)
    assert run(kernel, "[*resid]") == "['blocks.0.hook_resid_post', 'blocks.1.hook_resid_post']"
    assert run(kernel, "resid['blocks.1.hook_resid_post'].shape[:-1]") == "torch.Size([4])"


EXTRACTION = """
from actctx import Site
from actctx.extract import extract
words = nn.Sequential(nn.Embedding(9, 4))
extract(words, [torch.ones(2, 5, dtype=int)] * 3, Site("0", axes="batch pos d"), "{out}")
"""


def test_an_extraction_shows_how_far_it_has_come(kernel, tmp_path):
    pytest.importorskip("lance")
    cell = nbformat.v4.new_code_cell(EXTRACTION.format(out=tmp_path / "acts"))
    kernel.execute_cell(cell, 0, store_history=False)
    bar, *_ = [output["data"] for output in cell.outputs if "data" in output]
    assert "application/vnd.jupyter.widget-view+json" in bar


def test_without_widgets_it_shows_so_in_characters(kernel, tmp_path):
    pytest.importorskip("lance")
    run(
        kernel,
        "import actctx._store.progress\nactctx._store.progress.find_spec = lambda name: None",
    )
    shown = run(kernel, EXTRACTION.format(out=tmp_path / "acts"))
    assert "30/30 [00:0" in shown
    assert "IProgress" not in shown
