"""Statistics of activations, which `reduce=` computes in place of keeping tensors."""

from actctx._stats.contexts import Contexts
from actctx._stats.counts import Counts
from actctx._stats.covariance import Covariance, Eigen
from actctx._stats.frequency import Frequency
from actctx._stats.histogram import Histogram
from actctx._stats.kinds import load
from actctx._stats.linear_cka import LinearCKA
from actctx._stats.moments import Moments
from actctx._stats.sample import Sample
from actctx._stats.statistic import JointStatistic, Observation, Statistic
from actctx._stats.topk import TopK

__all__ = [
    "Contexts",
    "Counts",
    "Covariance",
    "Eigen",
    "Frequency",
    "Histogram",
    "JointStatistic",
    "LinearCKA",
    "Moments",
    "Observation",
    "Sample",
    "Statistic",
    "TopK",
    "load",
]

for _kind in (
    Contexts,
    Counts,
    Covariance,
    Eigen,
    Frequency,
    Histogram,
    LinearCKA,
    Moments,
    Sample,
    TopK,
):
    _kind.__module__ = __name__  # where users find them
del _kind
