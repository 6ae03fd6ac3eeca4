"""Sites that yield several tensors, or fire several times."""

from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from models import Mlp, tokens
from torch import Tensor, nn

from actctx import NeverFiredError, OptionError, OutputError, Site, Stopped, capture


@dataclass
class Record:
    loss: None
    hidden: Tensor


class Named(NamedTuple):
    first: Tensor
    second: Tensor


class Structured(nn.Module):
    """Yields what it is told to, made of its input and ten times its input."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, x, *, scale=10):
        y = x * scale
        return {
            "tuple": lambda: (x, y),
            "list": lambda: [x, y],
            "dict": lambda: {"first": x, "second": y},
            "named": lambda: Named(x, y),
            "record": lambda: Record(None, y),
            "nested": lambda: ((x, y), y),
        }[self.kind]()


def _run(kind, *args, **site):
    model = nn.Sequential()
    model.inner = Structured(kind)
    with capture(model, Site("inner", **site)) as acts:
        model.inner(*args or (torch.ones(2, 3),))
    return acts.tensor


@pytest.mark.parametrize(
    ("kind", "output", "expected"),
    [
        ("tuple", None, 1),
        ("tuple", 1, 10),
        ("tuple", -1, 10),
        ("list", 1, 10),
        ("dict", None, 1),
        ("dict", "second", 10),
        ("dict", 1, 10),
        ("named", "second", 10),
        ("named", None, 1),
        ("record", "hidden", 10),
        ("record", 1, 10),
        ("nested", 1, 10),
    ],
)
def test_an_output_is_chosen_by_position_or_name(kind, output, expected):
    assert torch.equal(_run(kind, output=output), torch.full((2, 3), float(expected)))


def test_an_output_of_a_model_is_chosen_by_its_name(llama, ids):
    with capture(llama, {"logits": Site("", output="logits"), "first": Site("")}) as acts:
        output = llama(ids)
    assert torch.equal(acts.logits, output.logits)
    assert torch.equal(acts.first, output.logits)


@pytest.mark.parametrize(
    ("kind", "output", "said"),
    [
        ("tuple", 2, "'inner' yields no tensor at output=2 but tuple(Tensor, Tensor); "),
        (
            "dict",
            "third",
            "'inner' yields no tensor at output='third' but dict(first: Tensor, second: Tensor); ",
        ),
        ("record", None, "'inner' yields no tensor but Record(loss: NoneType, hidden: Tensor); "),
        ("nested", None, "'inner' yields no tensor but tuple(tuple, Tensor); "),
        ("tuple", "x", "'inner' yields no tensor at output='x' but tuple(Tensor, Tensor); "),
    ],
)
def test_an_output_that_is_no_tensor_is_an_error_that_shows_what_there_is(kind, output, said):
    with pytest.raises(OutputError) as caught:
        _run(kind, output=output)
    assert str(caught.value) == said + (
        "choose one with Site(output=...), a position or a name, or capture from one of the "
        "modules inside it"
    )


def test_inputs_are_chosen_by_position_or_parameter():
    model = nn.Sequential()
    model.inner = nn.Bilinear(2, 3, 1)
    left, right = torch.randn(4, 2), torch.randn(4, 3)
    sites = {
        "first": Site("inner", io="in"),
        "second": Site("inner", io="in", output=1),
        "named": Site("inner", io="in", output="input2"),
    }
    for args, kwargs in [((left, right), {}), ((left,), {"input2": right})]:
        with capture(model, sites) as acts:
            model.inner(*args, **kwargs)
        assert torch.equal(acts.first, left)
        assert torch.equal(acts.second, right)
        assert torch.equal(acts.named, right)


def test_keyword_inputs_are_captured(llama, ids):
    name = "model.layers.0.self_attn"
    with capture(llama, {"in": Site(name, io="in", output="hidden_states")}) as acts:
        llama(ids)
    with capture(llama, "model.layers.0.input_layernorm") as expected:
        llama(ids)
    assert torch.equal(acts["in"], expected.tensor)


# Firings.


@pytest.fixture
def looped():
    return Mlp(twice=True)


@pytest.mark.parametrize(("firing", "index"), [(0, 0), (1, 1), (-1, 1), (-2, 0)])
def test_a_firing_is_chosen(looped, ids, firing, index):
    with capture(looped, "block") as everything:
        looped(ids)
        looped(ids)
    with capture(looped, Site("block", firing=firing)) as acts:
        looped(ids)
        looped(ids)
    assert torch.equal(acts.tensor, everything.firings("block")[index])


def test_a_forward_stops_at_the_firing_that_is_asked_for(looped, ids):
    for firing in (0, 1):
        ran = []
        handle = looped.block.register_forward_hook(lambda *args, ran=ran: ran.append(args))
        with capture(looped, Site("block", firing=firing), stop=True) as acts:
            assert isinstance(looped(ids), Stopped)
        handle.remove()
        assert len(ran) == firing + 1
        assert acts.tensor.shape == (3, 7, 8)


def test_a_firing_that_does_not_come_is_an_error(looped, ids):
    with pytest.raises(NeverFiredError) as caught, capture(looped, Site("block", firing=2)):
        looped(ids)
    assert str(caught.value) == (
        "'block' never fired in 1 forward: it did not fire often enough for firing=2; see "
        "acts.firings(name)"
    )
    with pytest.raises(NeverFiredError), capture(looped, Site("block", firing=-3)):
        looped(ids)


def test_a_last_firing_and_an_early_stop_exclude_each_other(looped):
    with pytest.raises(OptionError) as caught:
        capture(looped, Site("block", firing=-1), stop=True)
    assert str(caught.value) == (
        "'block' asks for firing=-1, which is known only at the end of a forward, so stop=True "
        "cannot stop before it; count firings from the first"
    )


def test_what_a_backward_pass_recomputes_is_not_captured_again(ids):
    from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

    class Recomputing(Mlp):
        def forward(self, ids):
            hidden = self.embed(ids).requires_grad_()
            return checkpoint(self.block, hidden, use_reentrant=False).sum()

    model = Recomputing()
    ran = []
    model.block.register_forward_hook(lambda *args: ran.append(args))
    with capture(model, "block", grad=True) as acts, set_checkpoint_early_stop(enable=False):
        model(ids).backward()
    assert len(ran) == 2
    assert acts.tensor.shape == (3, 7, 8)


# Capacity.


def test_a_capacity_is_filled_in_place(gpt2):
    name = "blocks.1.hook_resid_post"
    with capture(gpt2, name, slice=-1, capacity=10, dtype=torch.float16, stop=True) as acts:
        for batch in (3, 1, 4):
            gpt2(tokens(batch, seed=batch))
        first = acts.tensor
        gpt2(tokens(2, seed=2))
    with capture(gpt2, name, slice=-1, dtype=torch.float16) as expected:
        for batch in (3, 1, 4, 2):
            gpt2(tokens(batch, seed=batch))
    assert torch.equal(acts.tensor, expected.tensor)
    assert torch.equal(first, expected.tensor[:8])
    assert first.data_ptr() == acts.tensor.data_ptr()
    assert acts.tensor.untyped_storage().nbytes() == 10 * 32 * 2


def test_a_capacity_along_pos_is_filled_in_place(gpt2):
    with capture(gpt2, "blocks.1.hook_resid_post", join="pos", capacity=12) as acts:
        gpt2(tokens(2, 5))
        assert acts.tensor.is_contiguous()
        gpt2(tokens(2, 7))
    assert acts.tensor.shape == (2, 12, 32)


def test_a_capacity_that_is_full_is_an_error_and_nothing_is_lost(gpt2, ids):
    from actctx import CapacityError

    name = "blocks.1.hook_resid_post"
    with capture(gpt2, name, capacity=5) as acts:
        gpt2(ids)
        with pytest.raises(CapacityError) as caught:
            gpt2(ids)
        gpt2(ids[:2])
    assert acts.tensor.shape == (5, 7, 32)
    assert str(caught.value) == (
        "'blocks.1.hook_resid_post' has space for capacity=5 along 'batch', of which 3 are used, "
        "but a forward yielded 3 more; give a larger capacity, or read and clear the buffer in "
        "between"
    )


def test_a_forward_that_raised_leaves_its_room_free(gpt2, ids):
    def fail(activation, hook):  # noqa: ARG001
        raise ZeroDivisionError

    name = "blocks.0.hook_resid_post"
    with capture(gpt2, name, capacity=6) as acts:
        gpt2(ids)
        gpt2.hook_dict["ln_final.hook_out"].add_hook(fail)
        with pytest.raises(ZeroDivisionError):
            gpt2(ids + 1)
        gpt2.hook_dict["ln_final.hook_out"].remove_hooks()
        gpt2(ids)
    assert torch.equal(acts.tensor[:3], acts.tensor[3:])


def test_clearing_makes_room_and_keeps_what_was_read(gpt2, ids):
    with capture(gpt2, "blocks.0.hook_resid_post", capacity=3) as acts:
        gpt2(ids)
        first, values = acts.tensor, acts.tensor.clone()
        acts.clear()
        gpt2(ids + 1)
    assert torch.equal(first, values)
    assert not torch.equal(acts.tensor, values)


def test_a_capacity_holds_every_firing_and_the_rows_of_a_mask(looped, ids):
    with capture(looped, "block", capacity=6) as acts:
        looped(ids)
        looped(ids)
    assert [part.shape for part in acts.firings("block")] == [(6, 7, 8)] * 2
    mask = torch.ones(3, 7)
    mask[0, 3:] = 0
    site = Site("block", firing=-1, axes="batch pos d_model")
    with capture(looped, site, capacity=40, mask=mask) as acts:
        looped(ids)
        looped(ids)
    assert acts.tensor.shape == (34, 8)
    assert len(acts.positions("block")) == 34


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"capacity": 0}, "capacity=0 is not a number of rows; give a positive int"),
        (
            {"capacity": True},
            "capacity=True is not a number of rows; give a positive int",
        ),
        (
            {"capacity": 3, "join": None},
            "capacity= fills one tensor in place, which does not work with join=None; leave one of "
            "them out",
        ),
        (
            {"capacity": 3, "grad": True},
            "capacity= fills one tensor in place, which does not work with grad=True; leave one of "
            "them out",
        ),
        (
            {"capacity": 3, "names": Site("block", firing=-2)},
            (
                "'block' asks for firing=-2, which capacity= cannot store; count firings from the "
                "first"
            ),
        ),
    ],
)
def test_a_capacity_that_makes_no_sense_is_refused(looped, options, said):
    names = options.pop("names", "block")
    with pytest.raises(OptionError) as caught:
        capture(looped, names, **options)
    assert str(caught.value) == said


# The model itself.


def test_what_the_model_is_given_and_returns_lies_in_its_forward(mlp, ids):
    sites = {"in": Site("", io="in"), "block": "block", "out": ""}
    with capture(mlp, sites) as acts:
        with pytest.raises(IndexError):
            mlp(ids + 1000)
        output = mlp(ids)
    assert acts.forwards == 1
    assert torch.equal(acts["in"], ids)
    assert torch.equal(acts["out"], output)
    assert acts["block"].shape == (3, 7, 8)


def test_the_output_of_the_model_is_masked_and_stopped_at(llama, ids):
    site = Site("", output="logits", axes="batch pos d_vocab")
    with capture(llama, site, mask="attention", slice=-1, stop=True) as acts:
        assert isinstance(llama(ids, attention_mask=torch.ones_like(ids)), Stopped)
    assert acts.tensor.shape == (3, 50)
