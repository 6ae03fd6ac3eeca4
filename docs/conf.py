"""The site: `sphinx-build -W -n -c docs . build/site`, from the root of the repository.

Sphinx starts at the root, so that pages may link to the results of the benchmarks.
"""

import re
from typing import Any

from sphinx.application import Sphinx

import actctx
from actctx._capture.decorated import ModelOf
from actctx._capture.decorator import _Decorator
from actctx._capture.opening import B
from actctx._model.sites import Names
from actctx._select.slices import Slice
from actctx._store.indexing import Index

project = "actctx"
copyright = "actctx contributors"  # noqa: A001  Sphinx' own word
release = version = actctx.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
root_doc = "docs/index"
include_patterns = ["docs/**", "benchmarks/README.md"]
exclude_patterns = [".venv", "build", "dist", "**/.ipynb_checkpoints"]
default_role = "py:obj"  # what stands in `backticks` in a docstring is a link where it can be one

# Nothing is asked of the network: only the package's own names are looked up. Type variables, and
# what several statistics have in common, are on no page.
nitpick_ignore_regex = [
    ("py:.*", r"(?!actctx).*"),
    ("py:class", r"actctx\._stats\.(accumulator\.(Like|Accumulator)|statistic\.(Kind|Joint))"),
]

# Pages of Markdown are run by the tests, and notebooks where they are made.
nb_execution_mode = "off"
myst_heading_anchors = 3

autodoc_typehints_format = "short"
python_maximum_signature_line_length = 76
python_display_short_literal_types = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

html_theme = "furo"
pygments_dark_style = "github-dark"
html_title = f"actctx {version}"
html_extra_path = ["_root"]
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
copybutton_exclude = ".linenos, .gp, .go"

LINK = re.compile(r"^- \[([^]]*)\]\(([\w./-]+)\.(?:md|ipynb)\)", re.MULTILINE)
SHORT = {
    "Names | type[Schema]": Names | type[actctx.Schema],
    "Names": Names,
    "Slice": Slice,
    "Index": Index,
    "Module | Callable | None": ModelOf | None,
    "Activations | Schema": B,
    "Callable": _Decorator[Any],
}


def add_contents(_app: Sphinx, page: str, source: list[str]) -> None:
    """Make the sidebar of the links on the first page, which GitHub shows as they are."""
    if page != root_doc:
        return
    for section in source[0].split("\n## ")[1:]:
        caption = section.partition("\n")[0]
        pages = [f"{text} <{target}>".replace("`", "") for text, target in LINK.findall(section)]
        toctree = ["```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```"]
        source[0] += "\n\n" + "\n".join(toctree)


def shorten_annotations(_app: Sphinx, function: Any, _is_bound: bool) -> None:  # noqa: FBT001
    """Show what is long, or private, in a word."""
    annotations = getattr(function, "__annotations__", {})
    for parameter, hint in annotations.items():
        annotations[parameter] = shortened(hint)
    if hasattr(function, "__signature__"):
        shown = function.__signature__
        parameters = [
            each.replace(annotation=shortened(each.annotation))
            for each in shown.parameters.values()
        ]
        returned = shortened(shown.return_annotation)
        function.__signature__ = shown.replace(parameters=parameters, return_annotation=returned)


def shortened(hint: Any) -> Any:
    """Return a type whose name is the word for an annotation, if there is one."""
    name = next((name for name, long in SHORT.items() if hint == long), None)
    return hint if name is None else type(name, (), {"__module__": "builtins"})


def setup(app: Sphinx) -> None:
    """Connect to Sphinx."""
    app.connect("source-read", add_contents)
    app.connect("autodoc-before-process-signature", shorten_annotations)
