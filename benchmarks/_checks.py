"""What the checks of types cost."""

from collections.abc import Callable
from functools import partial
from timeit import repeat

import torch
from jaxtyping import Float
from torch import Tensor

from actctx import Schema, capture, site
from benchmarks._models import Setup, build, make_tokens

MICROSECONDS = 1e6


class Checked(Schema):
    """A field of each rank that is usual."""

    resid: Float[Tensor, "batch pos d_model"] = site("blocks.0.hook_resid_post")
    queries: Float[Tensor, "batch pos head d_head"] = site("blocks.0.attn.hook_q")
    pattern: Float[Tensor, "batch head query key"] = site("blocks.0.attn.hook_pattern")


def measure_checks(setup: Setup) -> tuple[float, float]:
    """Time the check of a site against the config, and of a field against its annotation.

    Returns:
        Microseconds: of the dearest site of the model, each firing; of a field, each block.

    """
    model, tokens = build(setup), make_tokens(setup)
    capturing = capture(model, "**")
    with capturing as acts, torch.no_grad():
        model(tokens)
    sites = {each.key: each for each in capturing._sites}
    dearest = max(_time(partial(sites[key].check_sizes, acts[key].shape)) for key in acts)
    with capture(model, Checked, stop=True) as checked:
        model(tokens)
    return dearest, _time(checked.check) / len(Checked._fields)


def _time(statement: Callable[[], object]) -> float:
    number = 200
    return min(repeat(statement, number=number, repeat=5)) / number * MICROSECONDS
