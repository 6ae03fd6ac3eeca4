"""Statistics of activations, which `reduce=` computes in place of keeping tensors."""

from actctx._stats.statistic import Observation, Statistic

__all__ = ["Observation", "Statistic"]
