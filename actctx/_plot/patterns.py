"""Attention patterns, checked to be some."""

from jaxtyping import Float
from torch import Tensor

from actctx._errors import AxisError, OptionError
from actctx._plot.sources import Source
from actctx._store.indexing import is_int

_ROUNDING = 1e-3  # of half precision, near 1


def read_pattern(source: Source, name: str, sequence: int) -> Float[Tensor, "head query key"]:
    """Read the attention of one sequence, in single precision on the CPU.

    Raises:
        NotCapturedError: There is no such site.
        AxisError: It is not an attention pattern.
        OptionError: There is no such sequence, or the forwards were not joined.

    """
    if not is_int(sequence):
        raise OptionError(f"sequence={sequence!r} must be an integer")
    axes = source.pattern_axes(name)
    if axes[-2:] != ("query", "key") or axes[0] != "batch":
        raise AxisError(
            f"{name!r} has the axes {' '.join(axes)!r}, but a picture of attention needs 'batch "
            "head query key'; capture attn.hook_pattern without a slice along these"
        )
    pattern = source.pattern(name, sequence).float().cpu()
    if not pattern.numel():
        raise AxisError(
            f"{name!r} has the shape {tuple(pattern.shape)}, so there is nothing to draw; capture "
            "it with another slice"
        )
    low, high = pattern.min().item(), pattern.max().item()
    if low < -_ROUNDING or high > 1 + _ROUNDING:
        raise OptionError(
            f"the values of {name!r} reach from {low:.3g} to {high:.3g}, but those of an attention "
            "pattern are between 0 and 1; capture attn.hook_pattern"
        )
    return pattern if "head" in axes else pattern[None]
