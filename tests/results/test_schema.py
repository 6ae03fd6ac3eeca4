"""Typed results: what a `Schema` captures, and how its fields are checked."""

import copy
import pickle
from typing import ClassVar

import pytest
import torch
from fields import Resid, one
from jaxtyping import BFloat16, Float, Float16, Int, Shaped
from models import Mlp, bridge, hooks_of, plainly_hooked, tokens
from torch import Tensor

from actctx import (
    Activations,
    JoinError,
    NeverFiredError,
    NotCapturedError,
    Schema,
    SeveralFiringsError,
    Stopped,
    TypedError,
    capture,
    site,
)
from actctx._results.annotations import Claim, hold


class Acts(Resid):
    layers: Float[Tensor, "layer batch pos d_model"] = site("blocks.*.hook_resid_post")
    patterns: dict[str, Float[Tensor, "batch head query key"]] = site("blocks.*.attn.hook_pattern")


NAMES = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
PATTERNS = ["blocks.0.attn.hook_pattern", "blocks.1.attn.hook_pattern"]


@pytest.fixture
def plain(gpt2, ids):
    with capture(gpt2, [*NAMES, *PATTERNS]) as acts:
        gpt2(ids)
    return acts


def test_its_fields_are_the_captured_tensors(gpt2, ids, plain):
    with capture(gpt2, Acts) as acts:
        gpt2(ids)
    assert isinstance(acts, Acts)
    assert torch.equal(acts.resid, plain[NAMES[0]][:, -1])
    assert torch.equal(acts.layers, plain.stack("hook_resid_post"))
    assert list(acts.patterns) == PATTERNS
    assert all(torch.equal(acts.patterns[name], plain[name]) for name in PATTERNS)


def test_it_is_read_inside_the_block_as_forwards_come(gpt2, ids, plain):
    with capture(gpt2, Acts, stop=True) as acts:
        assert isinstance(gpt2(ids), Stopped)
        assert torch.equal(acts.layers, plain.stack("hook_resid_post"))
        first = acts.layers
        gpt2(ids)
        assert torch.equal(acts.layers, torch.cat([first, first], dim=1))
    assert acts.resid.shape == (6, 32)


def test_a_stack_of_layers_is_not_held_twice(gpt2, ids):
    with capture(gpt2, Acts) as acts:
        gpt2(ids)
    stacked = acts.layers
    assert acts.layers is stacked
    layer = acts.activations["layers.blocks.1.hook_resid_post"]
    assert layer.data_ptr() == stacked[1].data_ptr()
    acts.activations.clear()
    assert stacked.shape == (2, 3, 7, 32)


@pytest.mark.parametrize("options", [{"capacity": 6}, {"grad": True}])
def test_layers_are_stacked_with_a_capacity_and_in_the_graph(gpt2, ids, options):
    with capture(gpt2, Acts, **options) as acts:
        gpt2(ids)
        assert acts.layers.shape == (2, 3, 7, 32)
        gpt2(ids)
    assert acts.layers.shape == (2, 6, 7, 32)
    assert acts.layers.requires_grad == options.get("grad", False)


def test_its_buffer_is_behind_it(gpt2, ids):
    with capture(gpt2, Acts) as acts:
        gpt2(ids)
    assert isinstance(acts.activations, Activations)
    assert acts.activations.axes("resid") == ("batch", "d_model")
    assert repr(acts).startswith("Acts of Activations: 5 sites, ")
    assert acts._repr_html_().startswith("<div>Acts</div><div ")
    assert ">Activations: 5 sites, " in acts._repr_html_()
    type(acts).__name__ = "<Acts>"
    assert acts._repr_html_().startswith("<div>&lt;Acts&gt;</div>")


def test_it_is_copied_and_pickled(gpt2, ids):
    with capture(gpt2, Acts) as acts:
        gpt2(ids)
    for other in (copy.deepcopy(acts), pickle.loads(pickle.dumps(acts))):  # noqa: S301  its own
        assert torch.equal(other.layers, acts.layers)
        assert torch.equal(other.resid, acts.resid)


def test_it_works_with_open_and_close(gpt2, ids):
    opened = capture(gpt2, Acts)
    acts = opened.open()
    gpt2(ids)
    opened.close()
    assert acts.resid.shape == (3, 32)


def test_a_mask_turns_positions_into_tokens(llama, ids):
    class Real(Schema):
        all: Float[Tensor, "token d_model"] = site("model.norm", axes="batch pos d_model")
        last: Float[Tensor, "batch d_model"] = site(
            "model.norm", axes="batch pos d_model", slice=-1
        )

    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with capture(llama, Real, mask="attention") as acts:
        llama(ids, attention_mask=mask)
    assert acts.all.shape == (17, 32)
    assert acts.last.shape == (3, 32)


def test_a_plain_hugging_face_model_has_the_sizes_of_its_config(llama, ids):
    wrong = one(Float[Tensor, "batch pos d_mlp"], "model.norm", axes="batch pos d_mlp")
    with pytest.raises(TypedError), capture(llama, wrong):
        llama(ids)
    right = one(Float[Tensor, "batch pos d_model"], "model.norm")
    with capture(llama, right) as acts:
        llama(ids)
    assert acts.x.shape == (3, 7, 32)


def test_grouped_queries_have_fewer_keys(ids):
    class Grouped(Schema):
        q: Float[Tensor, "batch pos head d_head"] = site("blocks.0.attn.hook_q")
        k: Float[Tensor, "batch pos kv_head d_head"] = site("blocks.0.attn.hook_k")

    model = bridge("LlamaForCausalLM")
    with capture(model, Grouped) as acts:
        model(ids)
    assert (acts.q.shape[2], acts.k.shape[2]) == (4, 2)


@pytest.mark.parametrize(
    "axes",
    [
        *("... d_model", "*batch d_model", "b p d", "batch pos 32", "batch pos size=32", "_ _ _"),
        *("batch pos 4*d_head", "batch #pos d_model", "batch pos head*d_head"),
    ],
)
def test_annotations_mean_what_jaxtyping_defines(gpt2, ids, axes):
    with capture(gpt2, one(Float[Tensor, axes])) as acts:
        gpt2(ids)
    assert acts.x.shape == (3, 7, 32)


def test_an_annotation_calculates_with_an_axis_of_a_later_field(gpt2, ids):
    class Twice(Schema):
        pattern: Float[Tensor, "batch pos*2-7 query key"] = site("blocks.0.attn.hook_pattern")
        resid: Float[Tensor, "batch pos d_model"] = site("blocks.0.hook_resid_post")

    with pytest.raises(TypedError, match="existing value of pos\\*2-7=7"), capture(gpt2, Twice):
        gpt2(ids)


def test_dtype_words_are_held_to(gpt2, ids):
    for word, dtype in ((Float16, torch.float16), (BFloat16, torch.bfloat16)):
        with capture(gpt2, one(word[Tensor, "..."], dtype=dtype)) as acts:
            gpt2(ids)
        assert acts.x.dtype == dtype
    with capture(gpt2, one(Int[Tensor, "batch pos"], "embed.hook_in"), dtype=torch.float16) as acts:
        gpt2(ids)
    assert acts.x.dtype == torch.int64
    with capture(gpt2, one(Shaped[Tensor, "..."])) as acts:
        gpt2(ids)


def test_a_field_is_not_set(gpt2, ids):
    with capture(gpt2, Resid) as acts:
        gpt2(ids)
    with pytest.raises(AttributeError) as caught:
        acts.resid = ids
    assert str(caught.value) == "Resid.resid is a captured value, and cannot be set"


def test_a_class_variable_is_no_field(gpt2, ids):
    class Noted(Resid):
        note: ClassVar[str] = "last position"

    with capture(gpt2, Noted) as acts:
        gpt2(ids)
    assert acts.note == "last position"
    assert acts.resid.shape == (3, 32)


def test_a_family_leaves_out_what_never_fires(gpt2, ids):
    hint = dict[str, Float[Tensor, "batch pos d_model"]]
    with capture(gpt2, one(hint, "blocks.0.hook_mlp_*")) as acts:
        gpt2(ids)
    assert [*acts.x] == ["blocks.0.hook_mlp_out"]
    assert acts.activations.missing == ("x.blocks.0.hook_mlp_in",)


def test_a_family_of_which_all_is_switched_off_is_refused(gpt2):
    hint = dict[str, Float[Tensor, "batch pos head d_model"]]
    with pytest.raises(NeverFiredError, match="use_attn_result is off: call"):
        capture(gpt2, one(hint, "blocks.*.attn.hook_result")).__enter__()


def test_what_was_not_captured_yet_says_so(gpt2):
    with capture(gpt2, Acts) as acts:
        for name in ("resid", "layers"):
            with pytest.raises(NotCapturedError, match="no forward of TransformerBridge has run"):
                getattr(acts, name)


def test_the_errors_of_a_capture_stay_what_they_are(ids):
    model = Mlp(twice=True)
    model.spare = torch.nn.Linear(1, 1)
    with pytest.raises(NeverFiredError), capture(model, one(Shaped[Tensor, "..."], "spare")):
        model(ids)
    with (
        pytest.raises(SeveralFiringsError),
        capture(model, one(Shaped[Tensor, "..."], "block")) as acts,
    ):
        model(ids)
    with pytest.raises(SeveralFiringsError):
        _ = acts.x
    with pytest.raises(JoinError), capture(model, one(Shaped[Tensor, "..."], "embed")):
        model(ids)
        model(ids[:, 1:])
    with pytest.raises(ZeroDivisionError), capture(model, one(Int[Tensor, "..."], "embed")):
        model(ids)
        _ = 1 / 0


def test_a_wrong_field_is_told_when_it_is_read_and_leaves_no_hooks(gpt2, ids):
    before = hooks_of(gpt2)
    with pytest.raises(TypedError), capture(gpt2, one(Int[Tensor, "..."])) as acts:
        gpt2(ids)
        _ = acts.x
        pytest.fail("it was read")
    assert hooks_of(gpt2) == before


def test_what_can_never_hold_is_told_before_any_forward(gpt2):
    before = hooks_of(gpt2)
    with pytest.raises(TypedError):
        capture(gpt2, one(Float[Tensor, "batch d_model"]))
    assert hooks_of(gpt2) == before


@pytest.mark.parametrize("off", ["option", "environment"])
def test_checks_can_be_switched_off(gpt2, ids, monkeypatch, off):
    if off == "environment":
        monkeypatch.setenv("ACTCTX_CHECK", "0")
    wrong = one(Int[Tensor, "batch d_mlp"])
    with capture(gpt2, wrong, check=off != "option") as acts:
        gpt2(ids)
        assert acts.x.shape == (3, 7, 32)
    assert acts.x.shape == (3, 7, 32)


def test_sizes_are_those_of_the_model_not_of_a_config_that_disagrees(ids):
    class Resid(Schema):
        resid: Float[Tensor, "batch pos d_model"] = site("blocks.0.hook_resid_post")

    model = bridge()
    model.cfg.d_model = model.original_model.config.n_embd = 48
    with capture(model, Resid) as acts:
        model(ids)
    assert acts.resid.shape == (3, 7, 32)
    spec = acts.activations.spec("resid").__name__
    assert spec == "Float32[Tensor, 'batch pos d_model=32']"


def test_fields_that_give_one_name_to_axes_of_two_sizes_are_refused(ids):
    class Both(Schema):
        z: Float[Tensor, "batch pos head d"] = site("blocks.0.attn.hook_z")
        resid: Float[Tensor, "batch pos d"] = site("blocks.0.hook_resid_post")

    model = bridge()
    with pytest.raises(TypedError, match=r"d is 32 here, but 8 in Both\.z"), capture(model, Both):
        model(ids)


def test_sizes_of_a_large_model_are_held_to():
    sizes = {"d_model": 4096, "d_mlp": 14336, "d_vocab": 128256, "head": 32, "layer": 80}
    with pytest.raises(TypedError, match="d_model is 8 here, but 4096"):
        hold([Claim("it", torch.zeros(8), Float[Tensor, " d_model"])], sizes)


def test_fields_come_from_all_bases(gpt2, ids):
    class Left(Schema):
        left: Float[Tensor, "batch pos d_model"] = site("blocks.0.hook_resid_pre")

    class Right(Schema):
        right: Float[Tensor, "batch pos d_model"] = site("blocks.0.hook_resid_mid")

    class Both(Left, Right):
        own: Float[Tensor, "batch d_model"] = site("blocks.0.hook_resid_pre", slice=-1)

    class Less(Both):
        left: ClassVar = None

    with capture(gpt2, Both) as acts:
        gpt2(ids)
    assert torch.equal(acts.left[:, -1], acts.own)
    assert acts.right.shape == (3, 7, 32)
    with capture(gpt2, Less) as less:
        gpt2(ids)
    assert set(less.activations) == {"right", "own"}


def test_one_site_stands_in_several_schemas(gpt2, ids):
    shared = site("blocks.0.hook_resid_post")
    first = type("First", (Schema,), {"__annotations__": {"x": Int[Tensor, "..."]}, "x": shared})
    type("Second", (Schema,), {"__annotations__": {"y": Float[Tensor, "..."]}, "y": shared})
    with pytest.raises(TypedError, match=r"First\.x"), capture(gpt2, first):
        gpt2(ids)


def test_a_pattern_may_be_annotated_by_positions(gpt2, ids):
    with capture(gpt2, one(Float[Tensor, "batch head pos pos"], PATTERNS[0])) as acts:
        gpt2(ids)
    assert acts.x.shape == (3, 4, 7, 7)


def test_a_stack_stays_on_its_device_and_is_of_one_dtype():
    class Layers(Schema):
        x: Shaped[Tensor, "n batch pos d"] = site("block.*")

    model = Mlp().to("meta")
    with capture(model, Layers) as acts:
        model(tokens().to("meta"))
    assert acts.x.device.type == "meta"
    model = Mlp()
    model.block[1] = torch.nn.Module()
    model.block[1].forward = lambda hidden: hidden.half()
    model.head.half()
    with (
        pytest.raises(JoinError, match=r"float32 on meta, with 'block\.1', torch"),
        capture(model, Layers),
    ):
        model(tokens())


def test_a_stack_with_a_layer_missing_is_refused(ids):
    model = Mlp()
    model.spare = torch.nn.ModuleList([torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)])
    model.forward = lambda ids: model.spare[1](model.embed(ids))
    with (
        pytest.raises(NotCapturedError) as caught,
        capture(model, one(Float[Tensor, "n b p d"], "spare.*")),
    ):
        model(ids)
    assert str(caught.value) == (
        "One.x stacks layers, but 'spare.0' has not fired; narrow the pattern, or annotate the "
        'field as dict[str, Float[Tensor, "b p d"]]'
    )


def test_a_pickle_holds_a_stack_once_and_no_model(gpt2, ids):
    with capture(gpt2, Acts) as acts:
        gpt2(ids)
    before = len(pickle.dumps(acts))
    assert acts.layers.shape == (2, 3, 7, 32)
    assert len(pickle.dumps(acts)) < before + 1000


HEAD = torch.nn.Linear(8, 4)


class OfModule(Schema):
    logits: Float[Tensor, "batch pos 4"] = site(HEAD)


def test_a_pickle_of_a_schema_that_names_a_module_holds_no_module(ids):
    model = Mlp()
    model.head = HEAD
    with capture(model, OfModule) as acts:
        model(ids[:1, :1])
    assert b"Linear" not in pickle.dumps(acts)


def test_an_opened_schema_lives_as_long_as_its_buffer(gpt2, ids):
    buffer = capture(gpt2, Resid).open().activations
    gpt2(ids)
    assert len(buffer) == 1
    del buffer


def test_an_unknown_field_is_told_what_there_is(gpt2, ids):
    with capture(gpt2, Resid) as acts:
        gpt2(ids)
    with pytest.raises(AttributeError) as caught:
        acts.axes("resid")
    assert str(caught.value) == (
        "Resid has no field 'axes'; its fields are 'resid', and the underlying buffer is "
        "acts.activations"
    )


def test_a_slice_along_an_axis_that_the_config_contradicts_is_of_that_axis(ids):
    model = bridge()
    model.cfg.d_mlp = 48
    name = "blocks.0.mlp.hook_post"
    post = plainly_hooked(model, ids)["blocks.0.mlp.out.hook_in"][0]
    with capture(model, "blocks.*.mlp.hook_post", slice={"d_mlp": 100}) as acts:
        model(ids)
    assert acts.axes(name) == ("batch", "pos")
    assert torch.equal(acts[name], post[..., 100])
