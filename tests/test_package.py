"""What the package promises of itself: its public names, its imports, its layers."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import actctx

PACKAGE = Path(actctx.__file__).parent
# Imports go down this list only.
ROOMS = (
    "_errors",
    "_sketch",
    "_table",
    "_axes",
    "_cast",
    "_outputs",
    "_heads",
    "_patterns",
    "_stand_in",
    "_dry_run",
    "_translated",
    "_globs",
    "_places",
    "_flags",
    "_names",
    "_select",
    "_words",
    "_index",
    "_sides",
    "_rows",
    "_typed",
    "_expected",
    "_column",
    "_file",
    "_stack",
    "_lookup",
    "_spared",
    "_activations",
    "_schema",
    "_grad",
    "_eager",
    "_undo",
    "_forward",
    "_hooks",
    "_lines",
    "_absolute",
    "_caches",
    "_samples",
    "_growth",
    "_watched",
    "_told",
    "_masks",
    "_opening",
    "_capture",
    "_calls",
    "_decorator",
    "notebook",
    "__init__",
    "_loading",
    "_sequences",
    "_layout",
    "_fingerprint",
    "_items",
    "_inputs",
    "_reading",
    "_choosing",
    "_pipe",
    "_target",
    "_writer",
    "_progress",
    "_facts",
    "_extraction",
    "_adding",
    "extract",
    "_shuffle",
    "_condition",
    "_stored",
    "_loader",
    "_interchange",
    "dataset",
    "_layers",
    "_coloured",
    "plot",
    "_corpus",
    "_options",
    "__main__",
)
LAZY = (
    "lance",
    "pyarrow",
    "transformer_lens",
    "transformers",
    "safetensors",
    "typer",
    "rich",
    "numpy.testing",
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


def _imported(statement):
    code = f"import sys; {statement}; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_importing_actctx_imports_no_transformer_library():
    assert not _imported("import actctx") & set(LAZY)


def test_a_lazy_import_would_be_noticed():
    assert _imported("import actctx, safetensors") & set(LAZY) == {"safetensors"}


def test_imports_go_down_the_list_of_rooms():
    assert {path.stem for path in PACKAGE.glob("*.py")} == set(ROOMS)
    for position, room in enumerate(ROOMS):
        tree = ast.parse((PACKAGE / f"{room}.py").read_text())
        used = {
            node.module.removeprefix("actctx.")
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.module.startswith("actctx.")
        }
        assert used <= set(ROOMS[:position]), room


@pytest.mark.parametrize(
    "path",
    sorted([*PACKAGE.glob("*.py"), *PACKAGE.parent.glob("benchmarks/*.py")]),
    ids=lambda path: f"{path.parent.name}/{path.name}",
)
def test_files_and_functions_stay_short(path):
    text = path.read_text()
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            assert not body or body[-1].end_lineno - body[0].lineno < 60, node.name
