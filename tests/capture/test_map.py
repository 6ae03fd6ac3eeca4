"""What `map=` computes of activations, kept in their place."""

import pytest
import torch
from models import BATCH, POS, Mlp, tiny_transformer, tokens

from actctx import AxisError, OptionError, Site, capture
from actctx.stats import Frequency

RESID = "blocks.1.hook_resid_post"
MASK = torch.tensor([[i < n for i in range(POS)] for n in (4, 7, 2)]).long()
ENCODER = torch.randn(32, 5, generator=torch.Generator().manual_seed(0))


def encode(resid):
    """Encode as a sparse autoencoder does."""
    return (resid @ ENCODER).relu()


def norms(resid):
    """Drop the last axis."""
    return resid.norm(dim=-1)


@pytest.mark.parametrize(
    "options", [{}, {"slice": {"pos": 1}}, {"mask": "attention"}, {"mask": MASK}, {"stop": True}]
)
def test_its_result_is_kept_of_what_was_selected(gpt2, ids, options):
    with (
        capture(gpt2, RESID, **options) as kept,
        capture(gpt2, RESID, map=encode, **options) as acts,
    ):
        for _ in range(2):
            gpt2(ids, attention_mask=MASK)
    torch.testing.assert_close(acts.tensor, encode(kept.tensor))
    assert acts.axes(RESID) == (*kept.axes(RESID)[:-1], "feature")


def test_the_last_axis_has_the_name_that_was_given(gpt2, ids):
    with capture(gpt2, RESID, map=encode, map_axis="latent") as acts:
        gpt2(ids)
    assert acts.axes(RESID) == ("batch", "pos", "latent")
    assert acts.spec(RESID).__name__ == "Float32[Tensor, 'batch pos latent']"


def test_the_last_axis_may_be_dropped(gpt2, ids):
    with capture(gpt2, RESID) as kept, capture(gpt2, RESID, map=norms, map_axis=None) as acts:
        gpt2(ids)
        gpt2(ids)
    assert torch.equal(acts.tensor, norms(kept.tensor))
    assert acts.axes(RESID) == ("batch", "pos")


def test_each_site_may_have_its_own(gpt2, ids):
    names = {
        "kept": RESID,
        "norm": Site(RESID, map=norms, map_axis=None),
        "half": Site(RESID, map=lambda resid: resid[..., :16], map_axis="half"),
    }
    with capture(gpt2, names) as acts:
        gpt2(ids)
    assert acts.axes("half") == ("batch", "pos", "half")
    assert torch.equal(acts.norm, norms(acts.kept))
    assert torch.equal(acts.half, acts.kept[..., :16])


def test_the_function_of_a_site_comes_with_its_own_axis(gpt2, ids):
    with capture(gpt2, Site(RESID, map=encode), map=norms, map_axis=None) as acts:
        gpt2(ids)
    assert acts.axes(RESID) == ("batch", "pos", "feature")


def test_it_runs_before_the_cast(gpt2, ids):
    given = []

    def seen(resid):
        given.append(resid.dtype)
        return resid

    with capture(gpt2, RESID, map=seen, dtype=torch.float16) as acts:
        gpt2(ids)
    assert given == [torch.float32]
    assert acts.tensor.dtype == torch.float16


def test_what_is_kept_is_owned_whatever_it_returns(gpt2, ids):
    held = torch.zeros(BATCH, POS, 4)
    for function in (lambda resid: resid, lambda resid: resid[..., :4], lambda _resid: held):
        with capture(gpt2, RESID, map=function) as acts:
            gpt2(ids)
        kept = acts.tensor
        assert kept.is_contiguous()
        assert kept.untyped_storage().nbytes() == kept.nbytes
        held.fill_(3.0)
        assert not torch.equal(kept, torch.full_like(kept, 3.0))
        held.zero_()


def test_gradients_flow_through_it_where_they_are_asked_for(gpt2, ids):
    weight = torch.nn.Parameter(ENCODER.clone())
    with capture(gpt2, RESID, map=lambda resid: resid @ weight, grad=True) as acts:
        gpt2(ids)
    acts.tensor.sum().backward()
    assert weight.grad is not None
    gpt2.zero_grad()
    with capture(gpt2, RESID, map=lambda resid: resid @ weight) as acts:
        gpt2(ids)
    assert not acts.tensor.requires_grad


def test_it_builds_no_graph_inside_of_a_capture_that_keeps_one(gpt2, ids):
    weight, modes = torch.nn.Parameter(ENCODER.clone()), []

    def probe(resid):
        modes.append(torch.is_grad_enabled())
        return resid @ weight

    with capture(gpt2, RESID, grad=True), capture(gpt2, RESID, map=probe) as acts:
        gpt2(ids)
    assert modes == [False]
    assert not acts.tensor.requires_grad


def test_a_module_of_the_model_may_be_called_in_it():
    model, ids = Mlp(), tokens()
    with capture(model, Site("block", map=model.block)) as acts:
        model(ids)
    with capture(model, "block") as kept:
        model(ids)
    assert torch.equal(acts.tensor, model.block(kept.tensor).detach())
    assert acts.forwards == 1


def test_it_works_in_inference_mode(gpt2, ids):
    with torch.inference_mode(), capture(gpt2, RESID, map=encode) as acts:
        gpt2(ids)
    assert not acts.tensor.is_inference()


def test_features_are_reduced(gpt2, ids):
    asked = Site(RESID, map=encode)
    with capture(gpt2, asked) as kept, capture(gpt2, asked, reduce=Frequency()) as acts:
        gpt2(ids)
    share = (kept.tensor.flatten(0, 1) > 0).double().mean(0)
    torch.testing.assert_close(acts[RESID].share.double(), share, rtol=1e-6, atol=0)
    assert acts[RESID].axes == ("feature",)


SAID = {
    "rows": (
        lambda resid: resid[:1],
        " and returned one of the shape (1, 7, 32), but the axes before the last have to stay as "
        "they are, (3, 7); give a function of the last axis alone",
    ),
    "nothing": (
        lambda resid: (resid,),
        " and returned a tuple; give a function that returns one tensor",
    ),
    "raises": (
        lambda resid: resid @ torch.ones(3, 3),
        " and raised RuntimeError: mat1 and mat2 shapes cannot be multiplied (21x32 and 3x3); give "
        "a function of one tensor",
    ),
    "changes": (
        lambda resid: resid.relu_(),
        " and changed it in place, which would change the model's own activation; give a function "
        "that makes a new tensor",
    ),
    "drops": (
        norms,
        " and returned one of the shape (3, 7); where it drops the last axis, give map_axis=None",
    ),
}


@pytest.mark.parametrize("case", SAID)
def test_a_function_that_does_something_else_is_refused_with_what_it_gave(gpt2, ids, case):
    function, said = SAID[case]
    with capture(gpt2, RESID, map=function), pytest.raises(OptionError) as caught:
        gpt2(ids)
    given = f"map= of {RESID!r} was given a tensor of the shape (3, 7, 32)"
    assert str(caught.value) == given + said


def test_an_axis_that_was_to_be_dropped_and_was_not_is_refused(gpt2, ids):
    with capture(gpt2, RESID, map=encode, map_axis=None), pytest.raises(OptionError) as caught:
        gpt2(ids)
    assert str(caught.value) == (
        f"map= of {RESID!r} was given a tensor of the shape (3, 7, 32) and returned one of the "
        "shape (3, 7, 5), but map_axis=None says that it drops the last axis; name the axis, as in "
        "map_axis='feature'"
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"map": 3},
            f"map=3 of {RESID!r} is not a function; give one that takes what was selected and "
            "returns a tensor, such as sae.encode",
        ),
        (
            {"map": encode, "map_axis": "a b"},
            f"map_axis='a b' of {RESID!r} is not the name of one axis; give one, such as "
            "'feature', or None where map= drops the last axis",
        ),
        (
            {"map_axis": None},
            "map_axis=None is for what map= returns, but there is no map=; give it, too, or leave "
            "map_axis out",
        ),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_options_are_refused_before_any_forward(gpt2, options, said):
    with pytest.raises(OptionError) as caught:
        capture(gpt2, RESID, **options)
    assert str(caught.value) == said


def test_forwards_are_not_joined_along_an_axis_that_it_drops(gpt2):
    with pytest.raises(AxisError, match="cannot be joined along 'pos'"):
        capture(gpt2, RESID, slice={"d_model": 0}, map=norms, map_axis=None, join="pos")


def test_the_encoder_of_saelens_is_such_a_function(ids):
    sae_lens = pytest.importorskip("sae_lens")
    model = tiny_transformer()
    torch.manual_seed(0)
    config = sae_lens.StandardSAEConfig(d_in=32, d_sae=64, device="cpu", dtype="float32")
    sae = sae_lens.StandardSAE(config)
    with capture(model, RESID) as kept, capture(model, RESID, map=sae.encode) as acts:
        model(ids)
    torch.testing.assert_close(acts.tensor, sae.encode(kept.tensor).detach())
    assert not acts.tensor.requires_grad
