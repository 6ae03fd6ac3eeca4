"""How users call actctx, checked by the type checker and never run."""

from collections.abc import Iterator
from typing import assert_type

import torch
from torch import Tensor, nn

from actctx import Activations, Capture, Site, capture, captures, hook_names, load

model = nn.Linear(1, 1)

assert_type(capture(model, "weight"), Capture[Activations])
assert_type(hook_names(model, "blocks.*"), list[str])
assert_type(load("acts.safetensors", device="cpu"), Activations)

with capture(
    model,
    {"resid": Site("blocks.0.hook_resid_post", dtype=torch.float16), "mlp": model},
    slice={"pos": -1, "head": [0, 3]},
    device="cpu",
    stop=True,
    join=None,
) as acts:
    assert_type(acts, Activations)
    model(torch.zeros(1))

assert_type(acts.tensor, Tensor)
assert_type(acts.stack("hook_resid_post"), Tensor)
assert_type(acts.to("cpu"), Activations)
assert_type(acts.axes("resid"), tuple[str, ...])
assert_type(acts.nbytes, int)

capture(model, ["a", Site("b"), lambda name: name.endswith("c"), model], slice=slice(1, 3))
capture(model, lambda name: "resid" in name, slice=torch.tensor([0, 1]))


@captures("blocks.0.hook_resid_post", slice=-1)
def logits(model: nn.Module, tokens: Tensor, *, scale: float = 1.0) -> int:
    """Receive nothing."""
    return 3


assert_type(logits(model, torch.zeros(1), scale=2.0), tuple[int, Activations])


@captures("blocks.0.hook_resid_post")
def received(acts: Activations, model: nn.Module, tokens: Tensor) -> Tensor:
    """Receive the buffer."""
    return acts.tensor


assert_type(received(model, torch.zeros(1)), Tensor)


class Study:
    """Holds the model."""

    model = model

    @captures("blocks.0.hook_resid_post", model=lambda self, *_: self.model)
    def run(self, tokens: Tensor) -> int:
        """Receive nothing."""
        return 3

    @captures("blocks.0.hook_resid_post", model=lambda self, *_: self.model)
    def norms(self, acts: Activations, tokens: Tensor, *, scale: float = 1.0) -> Tensor:
        """Receive the buffer behind `self`."""
        return acts.tensor * scale

    @captures("blocks.0.hook_resid_post", model=lambda self, *_: self.model)
    async def later(self, acts: Activations, tokens: Tensor) -> int:
        """Receive the buffer behind `self`, later."""
        return len(acts)

    @captures("blocks.0.hook_resid_post", model=lambda self, *_: self.model)
    def rows(self, acts: Activations, tokens: Tensor) -> Iterator[Tensor]:
        """Receive the buffer behind `self`, and yield."""
        yield acts.tensor

    @classmethod
    @captures("blocks.0.hook_resid_post", model=model)
    def of_class(cls, acts: Activations, tokens: Tensor) -> Tensor:
        """Receive the buffer behind the class."""
        return acts.tensor

    @staticmethod
    @captures("blocks.0.hook_resid_post", model=model)
    def of_none(acts: Activations, tokens: Tensor) -> Tensor:
        """Receive the buffer, of a static method."""
        return acts.tensor


assert_type(Study().run(torch.zeros(1)), tuple[int, Activations])
assert_type(Study().norms(torch.zeros(1), scale=2.0), Tensor)
assert_type(Study.norms(Study(), torch.zeros(1)), Tensor)
assert_type(Study.of_class(torch.zeros(1)), Tensor)
assert_type(Study().of_class(torch.zeros(1)), Tensor)
assert_type(Study().of_none(torch.zeros(1)), Tensor)
for rows in Study().rows(torch.zeros(1)):
    assert_type(rows, Tensor)


async def awaited_method() -> None:
    """Await a decorated method."""
    assert_type(await Study().later(torch.zeros(1)), int)


@captures("blocks.0.hook_resid_post")
def behind(model: nn.Module, acts: Activations, tokens: Tensor) -> Tensor:
    """Receive the buffer behind the model."""
    return acts.tensor


assert_type(behind(model, torch.zeros(1)), Tensor)


@captures("blocks.0.hook_resid_post")
async def later(model: nn.Module, tokens: Tensor) -> int:
    """Receive nothing, later."""
    return 3


async def awaited() -> None:
    """Await a decorated coroutine."""
    assert_type(await later(model, torch.zeros(1)), tuple[int, Activations])
