"""Observations as a capture makes them, and what two passes in double precision find in them."""

import torch

from actctx.stats import Observation


def observed(values, *, first=0, axes=None, tokens=None, real=None):
    """One forward of `batch pos ...` values, whose sequences are counted from `first`."""
    axes = axes or ("batch", "pos", "d_model", "_", "_")[: values.dim()]
    batch, pos = values.shape[:2]
    sequence = torch.arange(first, first + batch)[:, None].expand(batch, pos)
    position = torch.arange(pos).expand(batch, pos)
    return Observation(
        values=values,
        axes=axes,
        sequence=sequence,
        position=position,
        tokens=tokens,
        real=real,
        first_sequence=first,
    )


def seen(statistic, values, **options):
    """What a statistic makes of values, in one forward."""
    statistic = statistic.empty()
    statistic.update(observed(values, **options))
    return statistic


def split(values, sizes):
    """Divide a batch into forwards, each with the number of its first sequence."""
    firsts = [sum(sizes[:place]) for place in range(len(sizes))]
    return [*zip(values.split(sizes), firsts, strict=True)]


def two_pass(values):
    """The mean and the covariance of rows, in double precision and two passes."""
    rows = values.double().reshape(-1, values.shape[-1])
    mean = rows.mean(0)
    centred = rows - mean
    return mean, centred.T @ centred / (len(rows) - 1)


def assert_close(found, expected, tolerance=1e-6):
    """Compare by the largest difference, relative to each number."""
    torch.testing.assert_close(found.double(), expected.double(), rtol=tolerance, atol=0)
