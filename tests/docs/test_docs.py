"""The code that the README and the docs show runs, page by page."""

import ast
import doctest
import inspect
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
from models import GENERATION, Mlp, bridge, tokens
from shown import alike

import actctx
from actctx import capture, dataset, extract, plot, stats
from actctx._capture import capture as capturing
from actctx._capture import decorator
from actctx._model import places, sites
from actctx._results import activations, schema
from actctx._store import loader

pytestmark = pytest.mark.thorough

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINKED = [*PAGES, ROOT / "benchmarks" / "README.md"]
# Pages whose `py` blocks use another library, and the TransformerLens that it is installed beside.
PEERS = {"coming-from-nnsight.md": 4, "coming-from-saelens.md": 3}


def blocks(language):
    """Find blocks of code: the language, the code, and the output behind it, where it is shown."""
    output = r"(?:\n+```text\n(.*?)^```$)?"
    return re.compile(rf"^```({language})\n(.*?)^```${output}", re.MULTILINE | re.DOTALL)


def is_shown(text, printed):
    """Whether it was printed, but for spaces and what `...` stands for."""
    parts = [re.escape(" ".join(part.split())) for part in text.split("...")]
    return re.fullmatch(" ?.* ?".join(parts), " ".join(printed.split())) is not None


def shown_of(source, module):
    """What a notebook would show of the last line of a block."""
    last = ast.unparse(ast.parse(source).body[-1])
    return eval(last, vars(module))._repr_html_()  # noqa: S307  it is our own


def tight(html):
    """HTML without spaces, and without histograms, in which a value may cross to the next bar."""
    return re.sub(r"[\s▁-█]", "", html)


def run_command(command):
    """Run a block of commands with those of this environment, and return what they print."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["/bin/bash", "-euo", "pipefail", "-c", command],
        env={**os.environ, "PATH": path, "COLUMNS": "120"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
@pytest.mark.filterwarnings("ignore")  # of the libraries that a reader uses beside actctx
def test_the_code_of_a_page_runs_and_prints_what_it_shows(page, tmp_path, monkeypatch, capsys):
    commands = page.name == "command-line.md"  # those of other pages install things
    if commands and GENERATION < 4:
        pytest.skip("what is shown is a bridge of TransformerLens 4")
    monkeypatch.chdir(tmp_path)
    text = page.read_text()
    module = types.ModuleType("page")  # where the annotations of classes are looked up
    monkeypatch.setitem(sys.modules, "page", module)
    for block in blocks("python|bash" if commands else "python").finditer(text):
        language, source, shown = block.groups()
        if language == "bash":
            printed = "" if source.startswith("pip install") else run_command(source)
        else:
            line = text[: block.start(2)].count("\n")
            code = compile("\n" * line + source, str(page), "exec")
            exec(code, vars(module))  # noqa: S102  it is our own
            printed = capsys.readouterr().out
            if shown and not printed:  # what a notebook shows of its last line
                printed = repr(eval(ast.unparse(ast.parse(source).body[-1]), vars(module)))  # noqa: S307
        if shown if language == "bash" else printed or "print(" in source:
            assert is_shown(shown or "", printed), printed
        html = re.match(r"\n+(<div.*?</div>)\n\n", text[block.end() :], re.DOTALL)
        if html and GENERATION >= 4:  # a table tells what run_with_cache of a bridge takes
            assert alike(tight(html[1]), tight(shown_of(source, module)))


def test_what_notebooks_show_is_looked_at():
    pages = [page.name for page in PAGES if "```\n\n<div" in page.read_text()]
    assert pages == ["notebooks.md", "plots.md"]


@pytest.mark.parametrize(("page", "generation"), PEERS.items())
def test_the_code_of_a_page_runs_beside_the_library_that_it_is_about(page, generation, tmp_path):
    if generation != GENERATION:
        pytest.skip(f"the library is installed beside TransformerLens {generation}")
    text = (ROOT / "docs" / page).read_text()
    code = "\n".join(block[2] for block in blocks("python|py").finditer(text))
    (tmp_path / "page.py").write_text(code)  # nnsight reads the sources of what it traces
    done = subprocess.run(
        [sys.executable, "page.py"],
        env={**os.environ, "WANDB_MODE": "disabled"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_only_pages_about_other_libraries_have_code_for_them():
    assert {page.name for page in PAGES if "```py\n" in page.read_text()} == {*PEERS}


def test_every_page_of_the_docs_is_linked_from_the_first():
    first = (ROOT / "docs" / "index.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "index.md" or f"({page.name})" in first, page.name


def _is_public(module, name):
    defined_in = getattr(getattr(module, name), "__module__", None)
    return not name.startswith("_") and defined_in == module.__name__


def test_the_reference_has_every_public_name():
    reference = (ROOT / "docs" / "reference.md").read_text()
    documented = set(re.findall(r"^\.\. auto\w+:: ([\w.]+)", reference, re.MULTILINE))
    modules = (
        (dataset, dataset.__all__),
        (extract, ["extract", "Extracted"]),
        (stats, stats.__all__),
    )
    beside = {f"{module.__name__}.{name}" for module, names in modules for name in names}
    drawn = {name for name in documented if name.startswith("actctx.plot.")}
    assert documented - drawn == set(actctx.__all__) | beside
    assert drawn == {f"actctx.plot.{name}" for name in vars(plot) if _is_public(plot, name)}


def test_links_between_pages_lead_somewhere():
    for page in LINKED:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def _published_from(module):
    """List what a module defines but says to be the package's, so that it is not found there."""
    return [
        part for name in actctx.__all__ if module.__file__ in _files(part := getattr(actctx, name))
    ]


def _files(part):
    parts = map(inspect.unwrap, vars(part).values() if isinstance(part, type) else [part])
    return {each.__code__.co_filename for each in parts if inspect.isfunction(each)}


@pytest.mark.parametrize(
    "module",
    [places, sites, capturing, decorator, activations, schema, plot, stats, extract, dataset],
)
def test_the_examples_of_docstrings_run(module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = bridge()
    with capture(model, "blocks.*.hook_resid_post") as acts:  # as the buffer's own example does
        model(tokens(4))
    names = {
        **vars(plot),
        **vars(actctx),
        **vars(module),
        "model": model,
        "acts": acts,
        "tokens": tokens(4),
        "loader": [tokens(4)] * 2,
    }
    names.update(torch=__import__("torch"), mlp=Mlp())
    if module is dataset:
        extract.extract(model, tokens(4), "blocks.1.hook_resid_post", "acts.lance")
        names["data"] = dataset.ActivationDataset("acts.lance")
    if module is stats:
        names["moments"] = stats.Moments()
        rows = stats.Observation(values=names["torch"].eye(4), axes=("token", "d_model"))
        names["moments"].update(rows)
    finder = doctest.DocTestFinder(exclude_empty=True)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    found = finder.find(module, globs=names)
    for part in _published_from(module):
        found += finder.find(part, module=module, globs=names)
    if module is dataset:  # of which it is a name only
        found += finder.find(dataset.Loader, module=loader, globs=names)
    for test in found:
        runner.run(test)
    result = runner.summarize(verbose=False)
    assert result.attempted
    assert result.failed == 0


def test_the_readme_has_its_two_commands():
    text = (ROOT / "README.md").read_text()
    for heading in ("## Try it", "## Test it"):
        section = text.split(f"{heading}\n")[1].split("\n## ")[0]
        assert len(re.findall(r"^```bash\n[^\n]+\n```$", section, re.MULTILINE)) == 1


def test_no_page_is_longer_than_the_line_that_git_shows():
    for page in LINKED:
        lines = [
            line
            for line in page.read_text().splitlines()
            if not line.startswith(("|", "python3", "actctx "))
        ]
        assert max(map(len, lines)) <= 110, page.name
