"""Statistics of activations, which `reduce=` computes in place of keeping tensors."""

from actctx._stats.covariance import Covariance
from actctx._stats.kinds import load
from actctx._stats.moments import Moments
from actctx._stats.statistic import Observation, Statistic

__all__ = ["Covariance", "Moments", "Observation", "Statistic", "load"]

for _kind in (Covariance, Moments):
    _kind.__module__ = __name__  # where users find them
del _kind
