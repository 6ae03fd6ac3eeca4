"""Captures inside of the transforms of `torch.func`, and of what differentiates by its inputs."""

import copy

import pytest
import torch
from torch import nn
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    stack_module_state,
    vjp,
    vmap,
)
from torch.utils._pytree import tree_leaves

from actctx import SelectionError, Site, capture


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.outer(torch.tanh(self.inner(x)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def given():
    return torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))


def hooked(net, *given):
    kept = []
    handle = net.inner.register_forward_hook(lambda *args: kept.append(args[2].detach()))
    for each in given:
        net(each)
    handle.remove()
    return torch.cat(kept)


def test_the_axis_that_vmap_maps_over_comes_first(net, given):
    with capture(net, ["inner", "outer"]) as acts:
        vmap(net, in_dims=1)(given)
    assert torch.equal(acts["inner"], hooked(net, given.movedim(1, 0)))
    assert torch.equal(acts["outer"], net(given.movedim(1, 0)).detach())


def test_the_axis_of_the_outer_vmap_comes_before_that_of_the_inner(net, given):
    with capture(net, "inner") as acts:
        vmap(vmap(net, in_dims=1), in_dims=1)(given[..., None, :])
    assert torch.equal(acts.tensor, hooked(net, given.permute(1, 0, 2)[:, None]))


@pytest.mark.parametrize("capacity", [None, 6])
def test_forwards_under_vmap_are_joined(net, given, capacity):
    with capture(net, "inner", capacity=capacity) as acts:
        for each in (given, -given):
            vmap(net)(each)
    assert torch.equal(acts.tensor, hooked(net, given, -given))


def test_an_ensemble_is_captured_with_its_members_first(given):
    torch.manual_seed(0)
    members = [Net() for _ in range(3)]
    weights, buffers = stack_module_state(members)
    base = copy.deepcopy(members[0]).to("meta")
    with capture(base, "inner") as acts:
        vmap(lambda *state: functional_call(base, state, (given,)))(weights, buffers)
    wanted = torch.stack([hooked(member, given) for member in members])
    torch.testing.assert_close(acts.tensor, wanted)


def _loss(net):
    return lambda weights, x: functional_call(net, weights, (x,)).square().sum()


_WAYS = {
    "grad": grad,
    "one by one": lambda loss: vmap(grad(loss), in_dims=(None, 0)),
    "jacrev": jacrev,
    "jacfwd": jacfwd,
    "hessian": lambda loss: hessian(loss, argnums=1),
    "jvp": lambda loss: lambda w, x: jvp(lambda x: loss(w, x), (x,), (torch.ones_like(x),)),
    "vjp": lambda loss: lambda w, x: vjp(lambda x: loss(w, x), x)[1](torch.tensor(1.0)),
}


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # by torch's own jvp
@pytest.mark.parametrize("way", _WAYS)
def test_derivatives_are_what_they_are_without_a_capture(net, given, way):
    weights, differentiate = dict(net.named_parameters()), _WAYS[way](_loss(net))
    wanted = differentiate(weights, given)
    with capture(net, "inner") as acts:
        found = differentiate(weights, given)
    assert all(map(torch.equal, tree_leaves(found), tree_leaves(wanted)))
    assert any(leaf.any() for leaf in tree_leaves(wanted))
    torch.testing.assert_close(acts.tensor, hooked(net, given))
    assert not acts.tensor.requires_grad


def test_jacobians_of_autograd_are_what_they_are_without_a_capture(net, given):
    wanted = torch.autograd.functional.jacobian(net, given)
    with capture(net, "inner") as acts:
        assert torch.equal(torch.autograd.functional.jacobian(net, given), wanted)
    assert wanted.any()
    assert torch.equal(acts.tensor, hooked(net, given))
    assert not acts.tensor.requires_grad


def test_inputs_that_require_gradients_do_not_switch_them_on(net, given):
    with capture(net, "inner"):
        assert not net(given.requires_grad_()).requires_grad


def test_a_mask_under_vmap_is_refused(net, given):
    site = Site("inner", axes="batch pos d_mlp")
    with (
        pytest.raises(SelectionError, match=r"inside torch\.vmap, where mask= cannot determine"),
        capture(net, site, mask=torch.ones(3, 5)),
    ):
        vmap(net)(given)
