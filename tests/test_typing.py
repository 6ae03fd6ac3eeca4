"""What type checkers see: they accept how actctx is used, and refuse its misuse line by line."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.thorough

TYPING = Path(__file__).parent / "typing"
CHECKERS = {
    "mypy": ["--output=json", "--strict"],
    "pyright": ["--outputjson", "--pythonpath", sys.executable],
}


@pytest.fixture(scope="module", params=CHECKERS)
def errors(request):
    """The lines of each file in which a type checker finds an error, and what it says."""
    name = request.param
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    files = sorted(map(str, TYPING.glob("*.py")))
    command = [sys.executable, "-m", name, *CHECKERS[name], *files]
    root = TYPING.parent.parent
    run = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
    assert run.stdout, run.stderr
    found = {Path(file).name: {} for file in files}
    for file, line, message in READ[name](run.stdout):
        found[Path(file).name][line] = message
    return found


def _read_mypy(text):
    for each in map(json.loads, text.splitlines()):
        if each["severity"] == "error":
            yield each["file"], each["line"], each["message"]


def _read_pyright(text):
    for each in json.loads(text)["generalDiagnostics"]:
        if each["severity"] == "error":
            yield each["file"], each["range"]["start"]["line"] + 1, each["message"]


READ = {"mypy": _read_mypy, "pyright": _read_pyright}


@pytest.mark.parametrize("file", ["api.py", "schemas.py"])
def test_usage_is_accepted(errors, file):
    assert errors[file] == {}


def test_misuse_is_refused_in_every_line_that_says_so_and_in_no_other(errors):
    lines = (TYPING / "misuse.py").read_text().splitlines()
    marked = {number for number, line in enumerate(lines, 1) if re.search("# refused$", line)}
    assert set(errors["misuse.py"]) == marked
