"""The cost of type checks."""

from collections.abc import Callable
from functools import partial
from timeit import repeat

import torch
from jaxtyping import Float
from torch import Tensor

from actctx import Schema, capture, site
from actctx._capture.axis_layout import Numbers, plainly_told
from benchmarks.ways.models import Setup, build, make_tokens

MICROSECONDS = 1e6
NUMBER = 200


class Checked(Schema):
    """A field of each common rank."""

    resid: Float[Tensor, "batch pos d_model"] = site("blocks.0.hook_resid_post")
    queries: Float[Tensor, "batch pos head d_head"] = site("blocks.0.attn.hook_q")
    pattern: Float[Tensor, "batch head query key"] = site("blocks.0.attn.hook_pattern")


def measure_checks(setup: Setup, *, rounds: int) -> dict[str, float]:
    """Time finding the axes of a site by name and sizes, and checking a field.

    Returns:
        The fewest microseconds of the rounds: for the most expensive `site` of the model, per
        new shape; for a `field`, per block.

    """

    def least(statement: Callable[[], object]) -> float:
        return min(repeat(statement, number=NUMBER, repeat=rounds)) / NUMBER * MICROSECONDS

    model, tokens = build(setup), make_tokens(setup)
    capturing = capture(model, "**")
    with capturing as acts, torch.no_grad():
        model(tokens)
    sites = {each.key: each for each in capturing._sites}
    numbers = Numbers(len(tokens), frozenset({tokens.shape[1]}))
    dearest = max(
        least(partial(plainly_told, sites[key], acts[key].shape, numbers)) for key in acts
    )
    with capture(model, Checked, stop=True) as checked:
        model(tokens)
    return {"site": dearest, "field": least(checked.check) / len(Checked._fields)}
