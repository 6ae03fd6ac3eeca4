"""How users write schemas, checked by the type checkers and never run."""

from collections.abc import Iterator
from typing import assert_type

import torch
from jaxtyping import Float, Float16
from torch import Tensor, nn

from actctx import Activations, Capture, Schema, capture, captures, site

model = nn.Linear(1, 1)
tokens = torch.zeros(1)


class Resid(Schema):
    """One site."""

    resid: Float16[Tensor, "batch d_model"] = site(
        "blocks.6.hook_resid_post", slice={"pos": -1}, dtype=torch.float16
    )


class Acts(Resid):
    """Inherits a site, and has families of layers."""

    layers: Float[Tensor, "layer batch pos d_model"] = site("blocks.*.hook_resid_post")
    apart: dict[str, Float[Tensor, "batch head query key"]] = site("blocks.*.attn.hook_pattern")


assert_type(capture(model, Acts), Capture[Acts])

with capture(model, Acts, slice={"pos": -1}, stop=True, check=False) as acts:
    model(tokens)

assert_type(acts, Acts)
assert_type(acts.resid, Tensor)
assert_type(acts.layers, Tensor)
assert_type(acts.apart, dict[str, Tensor])
assert_type(acts.activations, Activations)
assert_type(capture(model, Acts).open(), Acts)


@captures(Acts, stop=True)
def norms(acts: Acts, model: nn.Module, tokens: Float[Tensor, "batch pos"]) -> Tensor:
    """Receive the schema."""
    model(tokens)
    return acts.resid.sum(dim=-1)


assert_type(norms(model, tokens), Tensor)


@captures(Acts)
def logits(model: nn.Module, tokens: Tensor) -> int:
    """Receive nothing."""
    return 3


assert_type(logits(model, tokens), tuple[int, Acts])


@captures(Acts, model=model)
async def later(tokens: Tensor) -> int:
    """Receive nothing, later."""
    return 3


@captures(Acts)
def steps(acts: Acts, model: nn.Module) -> Iterator[Tensor]:
    """Receive the schema, bit by bit."""
    yield acts.resid


async def awaited() -> None:
    """Await a decorated coroutine."""
    assert_type(await later(tokens), tuple[int, Acts])


assert_type(steps(model), Iterator[Tensor])
