"""What the package promises of itself: its public names, its imports, its layers."""

import ast
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest

import actctx

PACKAGE = Path(actctx.__file__).parent
# Imports go down this list only: a file uses those above it, and those of its own folder.
ROOMS = (
    ("_errors", "_text", "_files"),
    ("_model",),
    ("_select",),
    ("_stats",),
    ("stats",),
    ("_results",),
    ("_capture",),
    ("notebook", "__init__"),
    ("_store",),
    ("dataset",),
    ("_extract",),
    ("extract",),
    ("_plot",),
    ("plot",),
    ("_cli",),
    ("__main__",),
)
# Files that hold one idea, though it takes more than 400 lines without docstrings.
OF_ONE_IDEA = ("masks",)
FILES = sorted(PACKAGE.rglob("*.py"))
LAZY = (
    "torch",
    "numpy",
    "beartype",
    "jaxtyping",
    "lance",
    "pyarrow",
    "transformer_lens",
    "transformers",
    "safetensors",
    "typer",
    "rich",
    "IPython",
    "matplotlib",
)


def test_the_public_names_are_these():
    assert actctx.__all__ == [
        "ActctxError",
        "Activations",
        "AxisError",
        "CapacityError",
        "Capture",
        "CaptureStateError",
        "DataError",
        "HookNameError",
        "HooksRemovedError",
        "JoinError",
        "LoadError",
        "NeverFiredError",
        "NotCapturedError",
        "OptionError",
        "OutputError",
        "Plan",
        "PlanError",
        "PlannedSite",
        "Schema",
        "SelectionError",
        "SeveralFiringsError",
        "Site",
        "Stopped",
        "StoppedError",
        "TypedError",
        "capture",
        "captures",
        "hook_names",
        "load",
        "site",
    ]


def test_public_names_say_where_they_are_imported_from():
    assert {getattr(actctx, name).__module__ for name in actctx.__all__} == {"actctx"}


def test_every_public_name_is_documented():
    for name in actctx.__all__:
        assert getattr(actctx, name).__doc__, name


def test_every_error_is_below_one_base_and_in_its_picture():
    import actctx._errors

    picture = actctx._errors.__doc__
    errors = {name for name in vars(actctx._errors) if name.endswith("Error")}
    for name in errors:
        assert issubclass(getattr(actctx._errors, name), actctx.ActctxError)
        assert name in picture
        assert name in actctx.__all__


def _run(code, *options):
    command = [sys.executable, *options, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True)


def _imported(statement):
    return set(_run(f"import sys; {statement}; print(*sys.modules)").stdout.split())


def _seconds(statement):
    """The processor's seconds that an import takes, the least of three."""
    code = (
        f"import time; start = time.process_time(); {statement}; print(time.process_time() - start)"
    )
    return min(float(_run(code).stdout) for _ in range(3))


def test_importing_actctx_imports_no_heavy_library():
    assert not _imported("import actctx; dir(actctx); actctx.__version__") & set(LAZY)


def test_a_lazy_import_would_be_noticed():
    assert _imported("import actctx, safetensors") & set(LAZY) == {"safetensors"}
    assert "torch" in _imported("from actctx import capture")


def test_using_actctx_imports_what_it_needs_alone():
    needed = {"torch", "numpy", "jaxtyping"}
    found = _imported("from actctx import *; import actctx.extract, actctx.dataset, actctx.plot")
    assert found & set(LAZY) == needed


def test_importing_actctx_takes_at_most_a_tenth_of_what_torch_takes():
    assert _seconds("import actctx") <= _seconds("import torch") / 10


def test_an_error_alone_needs_no_torch():
    assert "torch" not in _imported("from actctx import OptionError, ActctxError")


def test_a_name_that_is_not_public_is_not_found():
    with pytest.raises(AttributeError, match="module 'actctx' has no attribute 'captur'"):
        actctx.captur  # noqa: B018  it is looked up
    assert not hasattr(actctx, "_MODULE")


def test_the_names_are_listed_before_any_is_used():
    names = _run("import actctx; print(*dir(actctx))").stdout.split()
    assert {*actctx.__all__, "__version__", "load_ipython_extension"} <= set(names)


def test_type_checkers_see_the_names_that_are_imported_when_used():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    seen = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module.startswith("actctx.")
        for alias in node.names
    }
    assert sorted(seen) == actctx.__all__
    for name, module in seen.items():
        assert getattr(sys.modules[module], name) is getattr(actctx, name)


@pytest.mark.parametrize(
    "module", ["_errors", "_results.schema", "_capture.decorator", "extract", "plot"]
)
def test_names_that_came_by_another_way_say_the_same(module):
    """Statistics have a `load` of their own."""
    code = (
        f"import sys, actctx.{module}; names = {actctx.__all__}; "
        "modules = [*sys.modules.values()]; "
        "found = [vars(m)[n].__module__ for k, m in sys.modules.items() for n in names "
        "if k.startswith('actctx.') and 'stats' not in k and n in vars(m) "
        "and vars(m)[n] not in modules]; print(*found)"
    )
    assert set(_run(code).stdout.split()) == {"actctx"}


def test_pickles_are_read_in_a_process_that_has_used_nothing():
    part = (actctx.Site("a", slice={"pos": -1}), actctx.OptionError("no"), actctx.capture)
    code = f"import pickle; print(*pickle.loads({pickle.dumps(part)!r}))"
    assert _run(code).stdout.startswith("Site('a', slice={'pos': -1}) no <function capture")


NNSIGHT = """
import {0}
import {1}
import torch
from jaxtyping import Float
from torch import Tensor
import actctx

model = torch.nn.Linear(3, 3)

class Acts(actctx.Schema):
    out: Float[Tensor, "batch feature"] = actctx.site("")

@actctx.captures(actctx.Site(model), check=True)
def kept(model, inputs):
    return model(inputs)

assert kept(model, torch.ones(2, 3))[1].tensor.shape == (2, 3)

@actctx.captures(Acts)
def checked(model, inputs, mask: Float[Tensor, "batch"] | None = None):
    return model(inputs)

assert checked(model, torch.ones(2, 3))[1].out.shape == (2, 3)
try:
    checked(model, torch.ones(2, 3), mask=3)
except actctx.TypedError as error:
    print(error)
assert object().save.__name__ == "save"
import beartype
"""


@pytest.mark.thorough
@pytest.mark.parametrize("order", [("nnsight", "actctx"), ("actctx", "nnsight")])
def test_nnsight_may_be_imported_first_or_last(order):
    """It adds a method to every object, among which beartype, when imported, finds no hash."""
    pytest.importorskip("nnsight")
    assert _run(NNSIGHT.format(*order)).stdout == (
        "the argument 'mask' of checked is a int, which does not match Float[Tensor, 'batch'] | "
        "None: it has a different type\n"
    )


def _room(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _rooms_used(path):
    """The rooms from which a file imports, also where it does so in a function."""
    named = [node for node in ast.walk(ast.parse(path.read_text())) if _is_import(node)]
    return {
        part.split(".")[1]
        for node in named
        for part in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module]
            if node.module != "actctx"
            else [f"actctx.{alias.name}" for alias in node.names]
        )
        if part.startswith("actctx.")
    }


def _is_import(node):
    return isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and node.module)


def test_every_file_is_in_a_room():
    assert {_room(path) for path in FILES} == {room for floor in ROOMS for room in floor}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_the_list_of_rooms(path):
    room = _room(path)
    floor = next(number for number, floor in enumerate(ROOMS) if room in floor)
    public = {"hook_names", "Site", "capture", "captures"}
    above = {each for floor in ROOMS[: floor + 1] for each in floor} | public
    used = _rooms_used(path)
    if room == "__init__":  # it hands on the public names, and the magic
        used -= {"notebook"}
    assert used <= above


def test_data_sets_and_captures_do_not_know_each_other():
    used = {room: set() for room in ("_store", "_capture")}
    for path in FILES:
        if _room(path) in used:
            used[_room(path)] |= _rooms_used(path)
    assert "_capture" not in used["_store"]
    assert not used["_capture"] & {"_store", "dataset", "_extract", "extract"}


def test_the_map_of_the_code_has_every_room_and_no_file_that_is_not_there():
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text()
    named = set(re.findall(r"`(_?[a-z_/]+(?:\.py|/))`", page))
    rooms = {path.name if path.is_file() else f"{path.name}/" for path in PACKAGE.iterdir()}
    roots = (PACKAGE, PACKAGE.parent)
    assert not [each for each in named if not any((root / each).exists() for root in roots)]
    assert rooms - {"__init__.py", "__pycache__/", "py.typed"} <= named


@pytest.mark.parametrize("folder", sorted({path.parent for path in FILES} - {PACKAGE}))
def test_a_folder_says_what_it_is_for_and_imports_nothing(folder):
    body = ast.parse((folder / "__init__.py").read_text()).body
    assert len(body) == 1
    assert 1 <= len(body[0].value.value.splitlines()) <= 3


@pytest.mark.parametrize(
    "path",
    sorted([*FILES, *(PACKAGE.parent / "benchmarks").rglob("*.py")]),
    ids=lambda path: f"{path.parent.name}/{path.name}",
)
def test_files_and_functions_stay_short(path):
    text = path.read_text()
    tree = ast.parse(text)
    defined = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, defined)]
    told = [node.body[0] for node in nodes if ast.get_docstring(node)]
    of_docstrings = sum(each.end_lineno - each.lineno + 1 for each in told)
    assert text.count("\n") - of_docstrings <= (530 if path.stem in OF_ONE_IDEA else 400)
    for node in nodes:
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            assert not body or body[-1].end_lineno - body[0].lineno < 60, node.name
