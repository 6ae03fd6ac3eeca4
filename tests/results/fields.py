"""Schemas of one field, and what is said of axes that are named alike."""

from jaxtyping import Float
from torch import Tensor

from actctx import (
    Schema,
    site,
)


class Resid(Schema):
    resid: Float[Tensor, "batch d_model"] = site("blocks.0.hook_resid_post", slice={"pos": -1})


def one(hint, name="blocks.0.hook_resid_post", **options):
    """Make a schema of one field, `x`."""
    return type("One", (Schema,), {"__annotations__": {"x": hint}, "x": site(name, **options)})


ANOTHER_NAME = "; if these are different things, rename one of them"
