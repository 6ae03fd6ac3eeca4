"""A safetensors file, which is there whole or not at all."""

import json
from collections.abc import Mapping
from importlib.metadata import version
from os import PathLike
from pathlib import Path

import torch
from jaxtyping import Shaped
from torch import Tensor

from actctx._axes import Axes


def describe(axes: Mapping[str, Axes], model: str) -> dict[str, str]:
    """Make the metadata that a file needs to be understood."""
    return {
        "axes": json.dumps({key: " ".join(each) for key, each in axes.items()}),
        "model": model,
        "actctx": version("actctx"),
        "torch": torch.__version__,
    }


def write_safetensors(
    tensors: Mapping[str, Shaped[Tensor, "..."]],
    path: str | PathLike[str],
    metadata: Mapping[str, str],
) -> None:
    """Write tensors; an existing file is replaced once all is written."""
    from safetensors.torch import save_file

    partial = Path(f"{path}.partial")
    try:
        save_file(dict(tensors), partial, metadata=dict(metadata))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
