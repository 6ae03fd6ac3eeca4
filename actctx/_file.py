"""A safetensors file, which is there whole or not at all."""

from collections.abc import Mapping
from os import PathLike
from pathlib import Path

from jaxtyping import Shaped
from torch import Tensor


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
