"""What type checkers must refuse, in every line that says so; never run."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from actctx import Activations, Schema, Site, capture, captures, site

model = nn.Linear(1, 1)
tokens = torch.zeros(1)


class Acts(Schema):
    """One site, and a family of layers."""

    resid: Float[Tensor, "batch d_model"] = site("blocks.6.hook_resid_post", slice={"pos": -1})
    apart: dict[str, Float[Tensor, "batch pos"]] = site("blocks.*.hook_resid_post")
    odd: Float[Tensor, "batch"] = site("blocks.0.hook_resid_post", dtype="float16")  # refused
    none: Float[Tensor, "batch"] = site()  # refused


with capture(model, Acts) as acts:
    model(tokens)
acts.risid  # refused
acts["resid"]  # refused
acts.tensor  # refused
acts.resid.foo()  # refused
acts.resid.sum(dim=0).lower()  # refused
acts.apart.norm()  # refused
acts.apart[0]  # refused
number: int = acts.resid  # refused
other: Activations = acts  # refused
capture(model, Acts, stop="yes")  # refused
capture(model, Acts, stopped=True)  # refused
capture(Acts, model)  # refused
capture(model, 3)  # refused
capture(model, "a", slice=1.5)  # refused
capture(model).open()  # refused
Site("a", io="inside")  # refused
captures(Acts, check="no")  # refused


@captures(Acts)
def norms(acts: Acts, model: nn.Module, tokens: Tensor) -> Tensor:
    """Receive the schema."""
    return acts.resid


class Study:
    """Holds what is studied."""

    @captures("blocks.0.hook_resid_post", model=model)
    def norms(self, acts: Activations, tokens: Tensor) -> Tensor:
        """Receive the buffer behind `self`."""
        return acts.tensor

    @captures(Acts, model=model)
    def typed(self, acts: Acts, tokens: Tensor) -> Tensor:
        """Receive the schema behind `self`."""
        return acts.resid


Study().norms(acts.activations, tokens)  # refused
Study().norms()  # refused
Study().norms(3)  # refused
Study().norms(tokens).lower()  # refused
Study().typed(acts, tokens)  # refused
Study().typed(tokens).lower()  # refused
norms(acts, model, tokens)  # refused
norms(model)  # refused
norms(model, 3)  # refused
norms(model, tokens).lower()  # refused


@captures("blocks.0.hook_resid_post")
def logits(model: nn.Module, tokens: Tensor, *, scale: float = 1.0) -> int:
    """Receive nothing."""
    return 3


logits(model)  # refused
logits(model, tokens, scale="2")  # refused
logits(model, tokens).bit_length()  # refused
