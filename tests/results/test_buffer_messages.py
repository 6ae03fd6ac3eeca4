"""Errors, word for word: of the buffer."""

import pytest
import torch
from models import HAS_T5, Mlp, bridge, tokens
from said import message_of, run

from actctx import Activations, Site, capture

RESID = "blocks.1.hook_resid_post"
pytestmark = pytest.mark.usefixtures("unchecked")


# The buffer.


def test_a_name_that_was_not_captured(gpt2):
    acts = run(gpt2, RESID)
    assert message_of(acts.__getitem__, "blocks.0.hook_out") == (
        "nothing was captured from 'blocks.0.hook_out': the captured names are "
        "'blocks.1.hook_resid_post'"
    )


def test_a_name_before_any_forward(gpt2):
    with capture(gpt2, RESID) as acts:
        assert message_of(acts.__getitem__, RESID) == (
            "nothing was captured from 'blocks.1.hook_resid_post': no forward of "
            "TransformerBridge has run since the block began or the buffer was cleared"
        )


def test_a_name_that_never_fired(gpt2):
    acts = run(gpt2, "blocks.0.attn.**", tokens(), tokens())
    assert message_of(acts.__getitem__, "blocks.0.attn.hook_result") == (
        "nothing was captured from 'blocks.0.attn.hook_result': it never fired in 2 forwards"
    )


def test_an_attribute_that_is_not_there(gpt2):
    acts = run(gpt2, {"resid": RESID})
    with pytest.raises(AttributeError) as caught:
        acts.residual  # noqa: B018
    assert str(caught.value) == (
        "Activations has no attribute 'residual'; the captured names are 'resid'"
    )


def test_one_tensor_of_several(gpt2):
    acts = run(gpt2, "*hook_resid_post")
    assert message_of(lambda: acts.tensor) == (
        "acts.tensor needs exactly one site, but 2 were captured: 'blocks.0.hook_resid_post', "
        "'blocks.1.hook_resid_post'; read acts[name]"
    )


def test_one_tensor_of_none(gpt2):
    with capture(gpt2, RESID) as acts:
        assert message_of(lambda: acts.tensor) == (
            "there is no tensor to read: no forward of TransformerBridge has run since the block "
            "began or the buffer was cleared"
        )


def test_a_stack_of_lists(gpt2):
    acts = run(gpt2, RESID, join=None)
    assert message_of(acts.stack, "hook_resid_post") == (
        "acts.stack(name) needs joined forwards, but join=None keeps lists; stack the tensors of "
        "the lists yourself"
    )


def test_one_tensor_of_lists(gpt2):
    acts = run(gpt2, RESID, join=None)
    assert message_of(lambda: acts.tensor) == (
        "acts.tensor needs joined forwards, but join=None keeps a list; read acts[name]"
    )


def test_several_firings():
    acts = run(Mlp(twice=True), "block")
    assert message_of(acts.__getitem__, "block") == (
        "'block' fired 2 times in one forward, so it is not one tensor; acts.firings('block') "
        "returns all of them, and Site('block', firing=-1) keeps the last"
    )


def test_a_site_that_is_captured_twice_is_read_by_its_aliases(gpt2):
    with capture(gpt2, {"first": Site(RESID, slice=0), "last": Site(RESID, slice=-1)}) as acts:
        gpt2(tokens())
    assert message_of(acts.__getitem__, RESID) == (
        f"nothing was captured from {RESID!r}: it is captured several times, so read one of "
        "'first', 'last'"
    )


def test_shapes_that_do_not_join(gpt2):
    acts = run(gpt2, RESID, tokens(2, 5), tokens(2, 4))
    assert message_of(acts.__getitem__, RESID) == (
        "'blocks.1.hook_resid_post' was captured with the shapes (2, 5, 32) and (2, 4, 32), "
        "which do not join along 'batch'; give the forwards one length (by padding, or with a "
        "slice), join the steps of a generation along 'pos', or capture with join=None for a list"
    )


def test_dtypes_that_do_not_join(mlp, ids):
    with capture(mlp, "block") as acts:
        mlp(ids)
        mlp.double()(ids)
    assert message_of(acts.__getitem__, "block") == (
        "'block' was captured as torch.float32 on cpu and as torch.float64 on cpu; give capture "
        "a dtype= and a device="
    )


def test_an_axis_to_join_along_that_is_gone(gpt2):
    acts = run(gpt2, RESID, tokens(), tokens(), slice={"batch": 0})
    assert message_of(acts.__getitem__, RESID) == (
        "'blocks.1.hook_resid_post' was captured in several forwards, but has no axis 'batch' "
        "along which to join them; its axes are 'pos d_model'; keep the axis with a slice of "
        "length one, or capture with join=None for a list"
    )


def test_a_stack_of_nothing(gpt2):
    acts = run(gpt2, RESID)
    assert message_of(acts.stack, "hook_resid_pre") == (
        "no captured site is 'hook_resid_pre' within a layer; closest: 'hook_resid_post'; the "
        "captured names are 'blocks.1.hook_resid_post'; give a name within a layer, as in "
        "stack('attn.hook_z'), or a pattern of whole names, as in stack('model.layers.*')"
    )
    assert message_of(acts.stack, RESID) == (
        "'blocks.1.hook_resid_post' is one site, but stacking needs layers; give a name within a "
        "layer, such as 'hook_resid_post'"
    )


@pytest.mark.skipif(not HAS_T5, reason="this TransformerLens cannot run T5")
def test_a_stack_of_two_stacks():
    acts = run(bridge("T5ForConditionalGeneration"), "*hook_resid_post")
    assert message_of(acts.stack, "hook_resid_post") == (
        "'hook_resid_post' means more than one site of a layer: "
        "'encoder_blocks.0.hook_resid_post' and 'decoder_blocks.0.hook_resid_post'; give a "
        "pattern of whole names, such as 'encoder_blocks.*.hook_resid_post'"
    )


def test_a_stack_of_two_shapes(gpt2):
    acts = run(gpt2, ["blocks.0.hook_resid_post", Site(RESID, slice=-1)])
    assert message_of(acts.stack, "hook_resid_post") == (
        "cannot stack 'blocks.0.hook_resid_post' of the shape (3, 7, 32) with "
        "'blocks.1.hook_resid_post' of the shape (3, 32); stack layers of one shape, or read "
        "them one by one"
    )


def test_saving_nothing(tmp_path):
    assert message_of(Activations().save, tmp_path / "x") == (
        "nothing was captured, so there is nothing to save"
    )


def test_saving_lists(gpt2, tmp_path):
    acts = run(gpt2, RESID, join=None)
    assert message_of(acts.save, tmp_path / "x") == (
        "acts.save(path) writes one tensor per site, but join=None keeps a list of them; capture "
        "with join='batch', or save the tensors of the lists yourself"
    )


def test_a_stack_of_nothing_is_refused(gpt2):
    with capture(gpt2, RESID) as acts:
        pass
    assert message_of(acts.stack, "hook_resid_post") == (
        "there is nothing to stack: no forward of TransformerBridge has run since the block began "
        "or the buffer was cleared"
    )


def test_two_buffers_compared_with_an_operator(gpt2):
    first, second = run(gpt2, RESID), run(gpt2, RESID)
    for other in (second, dict(second)):
        assert message_of(lambda other=other: first == other) == (
            "buffers cannot be compared with ==, since a tensor does not have a single truth "
            "value; compare their tensors, with torch.testing.assert_close(acts, other, rtol=0, "
            "atol=0), or one with torch.equal(acts[name], other[name])"
        )
        torch.testing.assert_close(first, other, rtol=0, atol=0)
    assert first == first  # noqa: PLR0124
    assert first is not None
    assert first != "acts"


def test_a_buffer_whose_forwards_left_nothing(gpt2):
    acts = run(gpt2, "blocks.0.attn.qkv.hook_[i]*")
    assert message_of(lambda: acts.tensor) == (
        "there is no tensor to read: none of the sites fired in 1 forward of TransformerBridge"
    )
    assert message_of(acts.__getitem__, "blocks.0.attn.qkv.hook_in") == (
        "nothing was captured from 'blocks.0.attn.qkv.hook_in': it never fired in 1 forward"
    )
    assert message_of(acts.stack, "hook_in") == (
        "there is nothing to stack: none of the sites fired in 1 forward of TransformerBridge"
    )
    acts.clear()
    assert "no forward of TransformerBridge has run since" in message_of(lambda: acts.tensor)


def test_a_pattern_of_what_is_switched_off(gpt2):
    assert message_of(capture(gpt2, ["hook_result", "hook_z"]).__enter__) == (
        "'hook_result' would never fire, since it matches only 'blocks.0.attn.hook_result', "
        "'blocks.1.attn.hook_result': use_attn_result is off: call model.set_use_attn_result(True) "
        "first"
    )
    off = capture(gpt2, lambda name: name.endswith("hook_mlp_in"))
    assert message_of(off.__enter__).startswith("the request would never fire, since it matches ")


def test_a_name_of_several_captured_sites(gpt2):
    acts = run(gpt2, "hook_z")
    for name in ("hook_z", "attn.hook_z", "blocks.*.attn.hook_z", "blocks.[0-1].**"):
        assert message_of(acts.__getitem__, name) == (
            f"nothing was captured from {name!r}: it matches 2 of the captured sites, so read one "
            f"of 'blocks.0.attn.hook_z', 'blocks.1.attn.hook_z', or acts.stack({name!r}) for its "
            "layers"
        )
