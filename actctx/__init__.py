"""Capture activations from chosen places of a transformer model, and only those."""

from typing import Any

from actctx._activations import Activations
from actctx._capture import Capture, capture
from actctx._decorator import captures
from actctx._errors import (
    ActctxError,
    AxisError,
    CapacityError,
    CaptureStateError,
    DataError,
    HookNameError,
    HooksRemovedError,
    JoinError,
    LoadError,
    NeverFiredError,
    NotCapturedError,
    OptionError,
    OutputError,
    SelectionError,
    SeveralFiringsError,
    StoppedError,
    TypedError,
)
from actctx._forward import Stopped
from actctx._names import Site
from actctx._places import hook_names
from actctx._schema import Schema, site

__version__ = "0.1.0"

__all__ = [
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


def load_ipython_extension(shell: Any) -> None:
    """Add the cell magic `%%capture_activations` to IPython, for `%load_ext actctx`."""
    from actctx import notebook

    notebook.load_ipython_extension(shell)


# Tracebacks and reprs name what users import.
for _name in __all__:
    globals()[_name].__module__ = __name__
del _name
