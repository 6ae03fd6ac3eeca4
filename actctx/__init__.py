"""Capture chosen activations of a transformer model, and nothing else."""

from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from actctx._capture.capture import Capture, capture
    from actctx._capture.decorator import captures
    from actctx._capture.forward import Stopped
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
        PlanError,
        SelectionError,
        SeveralFiringsError,
        StoppedError,
        TypedError,
    )
    from actctx._model.places import hook_names
    from actctx._model.sites import Site
    from actctx._results.activations import Activations, load
    from actctx._results.plan import Plan, PlannedSite
    from actctx._results.schema import Schema, site
else:
    # The modules of the names that are not errors. They import torch, so each is imported when
    # one of its names is first used.
    _MODULES = {
        "Activations": "_results.activations",
        "Capture": "_capture.capture",
        "Plan": "_results.plan",
        "PlannedSite": "_results.plan",
        "Schema": "_results.schema",
        "Site": "_model.sites",
        "Stopped": "_capture.forward",
        "capture": "_capture.capture",
        "captures": "_capture.decorator",
        "hook_names": "_model.places",
        "load": "_results.activations",
        "site": "_results.schema",
    }

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        module = import_module(f"{__name__}.{_MODULES.get(name, '_errors')}")
        found = globals()[name] = getattr(module, name)
        return found

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


def load_ipython_extension(shell: Any) -> None:
    """Add the cell magic `%%capture_activations` to IPython, for `%load_ext actctx`."""
    from actctx import notebook

    notebook.load_ipython_extension(shell)
