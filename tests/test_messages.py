"""Every error, word for word: what was asked, what was found and what to do."""

import numpy as np
import pytest
import torch
from models import HAS_T5, Mlp, bridge, huggingface, tokens
from torch import nn

from actctx import ActctxError, Activations, Site, capture, captures

RESID = "blocks.1.hook_resid_post"
ATTN = "blocks.0.attn.hook_z"

pytestmark = pytest.mark.usefixtures("unchecked")


def _said(function, *args, **kwargs):
    """Return what the error of a call says."""
    with pytest.raises(ActctxError) as caught:
        function(*args, **kwargs)
    return str(caught.value)


def _run(model, names, *forwards, read=None, **options):
    with capture(model, names, **options) as acts:
        for forward in forwards or (tokens(),):
            model(forward)
    return acts if read is None else read(acts)


# Names.


def test_an_unknown_name(gpt2):
    assert _said(capture, gpt2, "blocks.1.hook_reisd_post") == (
        "no hook point matches 'blocks.1.hook_reisd_post'; closest: 'blocks.1.hook_resid_post', "
        "'blocks.0.hook_resid_post', 'blocks.1.hook_resid_pre' (see actctx.hook_names(model))"
    )


def test_unknown_names(gpt2):
    assert _said(capture, gpt2, ["blocks.0.hook_otu", RESID, "ln_finale.hook_in"]) == (
        "no hook point matches 'blocks.0.hook_otu', 'ln_finale.hook_in'; closest: "
        "'blocks.0.hook_out', 'ln_final.hook_in' (see actctx.hook_names(model))"
    )


def test_an_unknown_module(mlp):
    assert _said(capture, mlp, "heda") == (
        "no module matches 'heda'; closest: 'head' (see actctx.hook_names(model))"
    )


def test_a_hook_name_that_another_architecture_has():
    assert _said(capture, bridge("GPTNeoXForCausalLM"), "blocks.0.hook_resid_mid") == (
        "no hook point matches 'blocks.0.hook_resid_mid'; closest: 'blocks.0.hook_resid_pre', "
        "'blocks.0.hook_resid_post', 'blocks.1.hook_resid_pre'; TransformerLens has names with "
        "this ending, but this architecture may not (see actctx.hook_names(model))"
    )
    plain = _said(capture, huggingface("GPTNeoXForCausalLM"), "blocks.0.hook_resid_mid")
    assert "but this architecture may not, or only in a TransformerBridge (see" in plain


def test_a_hook_name_without_its_beginning(gpt2, llama):
    for model, kind in ((gpt2, "hook point"), (llama, "module")):
        assert _said(capture, model, "resid_post") == (
            f"no {kind} matches 'resid_post'; hook names of TransformerLens begin with hook_: "
            "'hook_resid_post' (see actctx.hook_names(model))"
        )


def test_a_misspelt_last_part_of_hook_names(gpt2):
    assert "closest: 'hook_pattern'" in _said(capture, gpt2, "hook_patern")


def test_braces_in_a_pattern(gpt2):
    assert "braces mean nothing in a pattern: give a list of names, or '[0-3]' (see" in _said(
        capture, gpt2, "blocks.{0,1}.hook_resid_post"
    )


def test_a_firing_that_is_no_number():
    assert _said(Site, "a", firing="last") == (
        "Site(firing='last') is not the number of a firing; give an int, such as 0 for the first "
        "of each forward or -1 for the last"
    )


def test_a_model_of_a_decorated_call_that_is_none():
    decorated = captures("block", model="model")(lambda: None)
    assert _said(decorated) == (
        "@captures(..., model='model') is not a model; give one, or a function that finds it among "
        "the arguments of a call, as in model=lambda self, *args, **kwargs: self.model"
    )


def test_a_hook_name_on_a_model_without_hook_points(mlp):
    assert _said(capture, mlp, "blocks.0.hook_resid_post") == (
        "no module matches 'blocks.0.hook_resid_post'; this model has no hook points, its names "
        "are those of named_modules(), such as 'head' (see actctx.hook_names(model))"
    )


def test_a_pattern_that_matches_nothing(gpt2):
    assert _said(capture, gpt2, "*.hook_zzz") == (
        "no hook point matches '*.hook_zzz'; in a pattern '*' stays within two dots and '**' "
        "spans them (see actctx.hook_names(model))"
    )


def test_names_that_ask_for_nothing(gpt2):
    assert _said(capture, gpt2, []) == (
        "no hook point was requested: the names are empty, or the predicate accepts none (see "
        "actctx.hook_names(model))"
    )


def test_what_names_nothing(gpt2):
    assert _said(capture, gpt2, 3) == (
        "cannot capture from 3: give a hook name, a glob, a module, a Site, a predicate, a list "
        "of these, or a mapping of aliases to them"
    )


def test_a_module_of_another_model(gpt2):
    assert _said(capture, gpt2, nn.Linear(1, 1)) == (
        "the Linear that was given is not a module of this model; give a module that "
        "model.named_modules() lists, or its name"
    )


def test_an_alias_of_several_places_that_is_read_as_one(gpt2):
    acts = _run(gpt2, {"resid": "*hook_resid_post"})
    several = "'resid.blocks.0.hook_resid_post', 'resid.blocks.1.hook_resid_post'"
    assert _said(acts.__getitem__, "resid") == (
        "nothing was captured from 'resid': it matches 2 of the captured sites, so read one of "
        f"{several}, or acts.stack('resid') for its layers"
    )
    with pytest.raises(AttributeError) as caught:
        acts.resid  # noqa: B018
    assert str(caught.value) == (
        f"'resid' matches several sites, so read acts.stack('resid') or one of {several}"
    )


@pytest.mark.parametrize("alias", ["tensor", "items", "save", "to"])
def test_an_alias_that_the_buffer_has_already(gpt2, alias):
    assert _said(capture, gpt2, {alias: RESID}) == (
        f"the alias {alias!r} is already an attribute of the buffer, so acts.{alias} could not "
        "read the site; give another alias"
    )


def test_a_module_that_is_named_like_an_attribute_of_the_buffer_is_captured():
    model = nn.Sequential()
    model.add_module("values", nn.Linear(2, 2))
    with capture(model, "values") as acts:
        model(torch.zeros(1, 2))
    assert acts["values"].shape == (1, 2)


def test_one_place_with_two_sets_of_options(gpt2):
    glob = "blocks.*.hook_resid_post"
    assert _said(capture, gpt2, [Site(glob, slice=0), Site(RESID, slice=1)]) == (
        "'blocks.1.hook_resid_post' is requested twice with different options; name each with a "
        "mapping, such as {'first': Site('blocks.*.hook_resid_post', ...), 'second': "
        "Site('blocks.1.hook_resid_post', ...)}"
    )


def test_what_is_no_model():
    assert _said(capture, "gpt2", RESID) == (
        "cannot capture from a str; give a torch module, such as a TransformerBridge, a "
        "HookedTransformer or a Hugging Face model"
    )


# Options.


def test_an_io_that_is_neither():
    assert _said(Site, RESID, io="inn") == (
        "Site(io='inn') is neither 'in' nor 'out'; give io='out' for what the module returns, or "
        "io='in' for what it is given"
    )


def test_axes_that_name_one_twice():
    assert _said(Site, RESID, axes="pos pos") == (
        "Site(axes='pos pos') names an axis twice; give each axis its own name, in order, as in "
        "axes='batch pos d_model'"
    )


def test_a_dtype_that_is_none(gpt2):
    assert _said(capture, gpt2, RESID, dtype="float16") == (
        "dtype='float16' is not one of torch's floating-point dtypes; give one, such as "
        "torch.float16"
    )


def test_a_device_that_is_none(gpt2):
    assert _said(capture, gpt2, RESID, device="gpu7") == (
        "device='gpu7' cannot hold activations: Invalid device string: 'gpu7'"
    )


def test_a_join_that_is_no_axis(gpt2):
    assert _said(capture, gpt2, RESID, join=1) == (
        "join=1 is not an axis; give 'batch', 'pos' or None for a list"
    )


def test_a_join_along_an_axis_that_the_slice_drops(gpt2):
    assert _said(capture, gpt2, RESID, join="pos", slice=-1) == (
        "the forwards of 'blocks.1.hook_resid_post' cannot be joined along 'pos': its axes, "
        "after the slice, are 'batch d_model'; join along one of them, or keep a list "
        "with join=None"
    )


def test_a_join_along_an_axis_that_is_not_known(linear):
    assert _said(capture, linear, "0", join="pos") == (
        "the axes of '0' are not known, so its forwards cannot be joined along 'pos'; name "
        "them, as in Site(..., axes='batch pos d_model')"
    )


# Slices.


def test_an_axis_that_a_site_does_not_have(gpt2):
    assert _said(capture, gpt2, RESID, slice={"head": 0}) == (
        "'blocks.1.hook_resid_post' has no axis 'head'; its axes are 'batch pos d_model'; select "
        "along one of these, or by position with a tuple"
    )


def test_an_axis_of_a_module(linear):
    assert _said(capture, linear, "0", slice=-1) == (
        "the axes of the module '0' are not known, so there is no 'pos' to select from; name "
        "them, as in Site(..., axes='batch pos d_model'), or select by position with a tuple, as "
        "in slice=np.s_[:, -1]"
    )


def test_a_head_outside_the_config(gpt2):
    assert _said(capture, gpt2, ATTN, slice={"head": [0, 4]}) == (
        "'blocks.0.attn.hook_z' has the size 4 along 'head', so there is no position 4; choose "
        "from -4 to 3"
    )


def test_a_position_outside_the_forward(gpt2):
    assert _said(_run, gpt2, RESID, slice=7) == (
        "'blocks.1.hook_resid_post' has the size 7 along 'pos', so there is no position 7; "
        "choose from -7 to 6"
    )


def test_a_mask_of_another_length(gpt2):
    assert _said(_run, gpt2, RESID, slice=[True, False]) == (
        "'blocks.1.hook_resid_post' has the size 7 along 'pos', but the mask that selects from "
        "it has the length 2; give one entry for each position"
    )


def test_a_tuple_that_is_too_long(gpt2):
    assert _said(capture, gpt2, RESID, slice=np.s_[0, 0, 0, 0]) == (
        "the slice of 'blocks.1.hook_resid_post' has 4 entries, but its axes are "
        "'batch pos d_model'; give as many entries as there are axes, or fewer"
    )


def test_a_tuple_that_is_too_long_for_the_forward(mlp):
    assert _said(_run, mlp, "block", slice=np.s_[:, :, :, 0]) == (
        "'block' fired with the shape (3, 7, 8), which has no axis 3; give the slice as many "
        "entries as there are axes, or fewer"
    )


def test_a_tuple_with_two_ellipses(gpt2):
    assert _said(capture, gpt2, RESID, slice=(..., 0, ...)) == (
        "the slice of 'blocks.1.hook_resid_post' has more than one '...'; give one"
    )


def test_one_axis_selected_twice(gpt2):
    pattern = "blocks.0.attn.hook_pattern"
    assert _said(capture, gpt2, pattern, slice={"pos": 0, "query": 1}) == (
        "the slice of 'blocks.0.attn.hook_pattern' selects twice from one axis; give one index "
        "for it"
    )


def test_what_does_not_select(gpt2):
    assert _said(capture, gpt2, RESID, slice={"pos": "last"}) == (
        "the slice of 'blocks.1.hook_resid_post' cannot select with 'last'; give an int, a "
        "slice, a range, a list of ints, a one-dimensional index tensor or a bool mask of the "
        "whole axis"
    )


def test_a_site_that_fires_with_other_axes_than_were_named(mlp):
    assert _said(_run, mlp, Site("block", axes="batch pos head d_head")) == (
        "'block' fired with the shape (3, 7, 8), but Site(axes='batch pos head d_head') names 4 "
        "axes; name all axes that it has"
    )


def test_a_hook_point_that_fires_with_other_axes_than_are_known():
    model = bridge("OPTForCausalLM")
    name = "blocks.0.ln2.hook_normalized"
    with capture(model, name, slice=-1):
        said = _said(model.blocks[0].ln2, torch.randn(21, 32))  # of how many sequences is not known
    assert said == (
        "'blocks.0.ln2.hook_normalized' has no axis 'pos'; its axes are 'token d_model'; select "
        "along one of these, or by position with a tuple"
    )


# The life of a capture.


def test_entering_twice(gpt2):
    opened = capture(gpt2, RESID)
    with opened:
        assert _said(opened.__enter__) == (
            "this capture is already open; leave its block first, or create another capture"
        )


def test_reading_from_a_capture_instead_of_its_buffer(gpt2):
    assert _said(capture(gpt2, RESID).__getitem__, RESID) == (
        "a capture has no item 'blocks.1.hook_resid_post'; captured tensors are in the buffer: "
        "`with capture(...) as acts`"
    )
    with pytest.raises(AttributeError) as caught:
        capture(gpt2, RESID).tensor  # noqa: B018
    assert str(caught.value) == (
        "a capture has no 'tensor'; captured tensors are in the buffer: `with capture(...) as acts`"
    )


def test_leaving_what_is_not_open(gpt2):
    assert _said(capture(gpt2, RESID).__exit__, None, None, None) == (
        "this capture is not open; enter it with a `with` statement, or open() it"
    )


def test_removed_hooks(gpt2, ids):
    with capture(gpt2, RESID):
        gpt2.reset_hooks()
        assert _said(gpt2, ids) == (
            "the hook on 'blocks.1.hook_resid_post' was removed inside the block, as "
            "model.reset_hooks() does, so this forward would not be captured; leave the hooks "
            "alone until the block ends, or open a new capture after removing them"
        )


def test_a_hook_point_that_is_switched_off(gpt2):
    assert _said(capture(gpt2, "blocks.0.attn.hook_result").__enter__) == (
        "'blocks.0.attn.hook_result' would never fire: use_attn_result is off: call "
        "model.set_use_attn_result(True) first"
    )


def test_a_hook_point_that_was_not_reached(gpt2):
    assert _said(_run, gpt2, "blocks.0.attn.qkv.hook_in") == (
        "'blocks.0.attn.qkv.hook_in' never fired in 1 forward: the forwards did not reach this "
        "hook point; see actctx.hook_names(model)"
    )


def test_a_module_that_was_not_called(mlp):
    mlp.spare = nn.Linear(1, 1)
    assert _said(_run, mlp, {"x": "spare", "y": "block"}, tokens(), tokens()) == (
        "'x' ('spare') never fired in 2 forwards: the forwards did not call this module, or only "
        "its .forward, which skips hooks"
    )


def test_a_list_of_modules(llama):
    assert _said(_run, llama, "model.layers") == (
        "'model.layers' never fired in 1 forward: a ModuleList is never called itself; capture the "
        "modules inside it: 'model.layers.*'"
    )


def test_a_site_that_yields_no_tensor(ids):
    class Nothing(nn.Module):
        def forward(self, x):
            return {"hidden": None, "x": x}

    model = nn.Sequential(Nothing())
    assert _said(_run, model, "0", ids) == (
        "'0' yields no tensor but dict(hidden: NoneType, x: Tensor); choose one with "
        "Site(output=...), a position or a name, or capture from one of the modules inside it"
    )


def test_a_stopped_output(mlp, ids):
    with capture(mlp, "block", stop=True):
        output = mlp(ids)
    assert _said(lambda: output.logits) == (
        "this forward of Mlp was stopped after 'block', the last requested site, so it has no "
        "output; to use the output, or to call generate(), run_with_cache() or a parent module, "
        "capture with stop=False"
    )


# The buffer.


def test_a_name_that_was_not_captured(gpt2):
    acts = _run(gpt2, RESID)
    assert _said(acts.__getitem__, "blocks.0.hook_out") == (
        "nothing was captured from 'blocks.0.hook_out': the captured names are "
        "'blocks.1.hook_resid_post'"
    )


def test_a_name_before_any_forward(gpt2):
    with capture(gpt2, RESID) as acts:
        assert _said(acts.__getitem__, RESID) == (
            "nothing was captured from 'blocks.1.hook_resid_post': no forward of "
            "TransformerBridge has run since the block began or the buffer was cleared"
        )


def test_a_name_that_never_fired(gpt2):
    acts = _run(gpt2, "blocks.0.attn.**", tokens(), tokens())
    assert _said(acts.__getitem__, "blocks.0.attn.hook_result") == (
        "nothing was captured from 'blocks.0.attn.hook_result': it never fired in 2 forwards"
    )


def test_an_attribute_that_is_not_there(gpt2):
    acts = _run(gpt2, {"resid": RESID})
    with pytest.raises(AttributeError) as caught:
        acts.residual  # noqa: B018
    assert str(caught.value) == (
        "Activations has no attribute 'residual'; the captured names are 'resid'"
    )


def test_one_tensor_of_several(gpt2):
    acts = _run(gpt2, "*hook_resid_post")
    assert _said(lambda: acts.tensor) == (
        "acts.tensor needs exactly one site, but 2 were captured: 'blocks.0.hook_resid_post', "
        "'blocks.1.hook_resid_post'; read acts[name]"
    )


def test_one_tensor_of_none(gpt2):
    with capture(gpt2, RESID) as acts:
        assert _said(lambda: acts.tensor) == (
            "there is no tensor to read: no forward of TransformerBridge has run since the block "
            "began or the buffer was cleared"
        )


def test_a_stack_of_lists(gpt2):
    acts = _run(gpt2, RESID, join=None)
    assert _said(acts.stack, "hook_resid_post") == (
        "acts.stack(name) needs joined forwards, but join=None keeps lists; stack the tensors of "
        "the lists yourself"
    )


def test_one_tensor_of_lists(gpt2):
    acts = _run(gpt2, RESID, join=None)
    assert _said(lambda: acts.tensor) == (
        "acts.tensor needs joined forwards, but join=None keeps a list; read acts[name]"
    )


def test_several_firings():
    acts = _run(Mlp(twice=True), "block")
    assert _said(acts.__getitem__, "block") == (
        "'block' fired 2 times in one forward, so it is not one tensor; acts.firings('block') "
        "returns all of them, and Site('block', firing=-1) keeps the last"
    )


def test_a_site_that_is_captured_twice_is_read_by_its_aliases(gpt2):
    with capture(gpt2, {"first": Site(RESID, slice=0), "last": Site(RESID, slice=-1)}) as acts:
        gpt2(tokens())
    assert _said(acts.__getitem__, RESID) == (
        f"nothing was captured from {RESID!r}: it is captured several times, so read one of "
        "'first', 'last'"
    )


def test_shapes_that_do_not_join(gpt2):
    acts = _run(gpt2, RESID, tokens(2, 5), tokens(2, 4))
    assert _said(acts.__getitem__, RESID) == (
        "'blocks.1.hook_resid_post' was captured with the shapes (2, 5, 32) and (2, 4, 32), "
        "which do not join along 'batch'; give the forwards one length (by padding, or with a "
        "slice), join the steps of a generation along 'pos', or capture with join=None for a list"
    )


def test_dtypes_that_do_not_join(mlp, ids):
    with capture(mlp, "block") as acts:
        mlp(ids)
        mlp.double()(ids)
    assert _said(acts.__getitem__, "block") == (
        "'block' was captured as torch.float32 on cpu and as torch.float64 on cpu; give capture "
        "a dtype= and a device="
    )


def test_an_axis_to_join_along_that_is_gone(gpt2):
    acts = _run(gpt2, RESID, tokens(), tokens(), slice={"batch": 0})
    assert _said(acts.__getitem__, RESID) == (
        "'blocks.1.hook_resid_post' was captured in several forwards, but has no axis 'batch' "
        "along which to join them; its axes are 'pos d_model'; keep the axis with a slice of "
        "length one, or capture with join=None for a list"
    )


def test_a_stack_of_nothing(gpt2):
    acts = _run(gpt2, RESID)
    assert _said(acts.stack, "hook_resid_pre") == (
        "no captured site is 'hook_resid_pre' within a layer; closest: 'hook_resid_post'; the "
        "captured names are 'blocks.1.hook_resid_post'; give a name within a layer, as in "
        "stack('attn.hook_z'), or a pattern of whole names, as in stack('model.layers.*')"
    )
    assert _said(acts.stack, RESID) == (
        "'blocks.1.hook_resid_post' is one site, but stacking needs layers; give a name within a "
        "layer, such as 'hook_resid_post'"
    )


@pytest.mark.skipif(not HAS_T5, reason="this TransformerLens cannot run T5")
def test_a_stack_of_two_stacks():
    acts = _run(bridge("T5ForConditionalGeneration"), "*hook_resid_post")
    assert _said(acts.stack, "hook_resid_post") == (
        "'hook_resid_post' means more than one site of a layer: "
        "'encoder_blocks.0.hook_resid_post' and 'decoder_blocks.0.hook_resid_post'; give a "
        "pattern of whole names, such as 'encoder_blocks.*.hook_resid_post'"
    )


def test_a_stack_of_two_shapes(gpt2):
    acts = _run(gpt2, ["blocks.0.hook_resid_post", Site(RESID, slice=-1)])
    assert _said(acts.stack, "hook_resid_post") == (
        "cannot stack 'blocks.0.hook_resid_post' of the shape (3, 7, 32) with "
        "'blocks.1.hook_resid_post' of the shape (3, 32); stack layers of one shape, or read "
        "them one by one"
    )


def test_saving_nothing(tmp_path):
    assert _said(Activations().save, tmp_path / "x") == (
        "nothing was captured, so there is nothing to save"
    )


def test_saving_lists(gpt2, tmp_path):
    acts = _run(gpt2, RESID, join=None)
    assert _said(acts.save, tmp_path / "x") == (
        "acts.save(path) writes one tensor per site, but join=None keeps a list of them; capture "
        "with join='batch', or save the tensors of the lists yourself"
    )


# The decorator.


def test_a_decorator_without_names(gpt2):
    @captures
    def study(model):
        return model

    assert _said(study, gpt2) == (
        "@captures decorates a function, but got a TransformerBridge; give the names to capture "
        "first, as in @captures('blocks.0.hook_resid_post')"
    )


def test_a_decorated_class():
    assert _said(captures(RESID), Mlp) == (
        "@captures cannot decorate the class 'Mlp'; decorate its methods"
    )


def test_a_decorated_staticmethod():
    assert _said(captures(RESID), staticmethod(print)) == (
        "@captures cannot decorate a staticmethod; write @captures(...) below @staticmethod"
    )


def test_a_decorated_number():
    assert _said(captures(RESID), 3) == "@captures decorates a function, not 3"


def test_a_decorated_call_without_a_model():
    assert _said(captures(RESID)(lambda ids, scale: ids * scale), 3, scale=1) == (
        "no torch module is among the arguments ids, scale of this call; pass the model, or say "
        "where it is: @captures(..., model=model), or model=lambda self, *args, **kwargs: "
        "self.model for a method"
    )


def test_a_stack_of_nothing_is_refused(gpt2):
    with capture(gpt2, RESID) as acts:
        pass
    assert _said(acts.stack, "hook_resid_post") == (
        "there is nothing to stack: no forward of TransformerBridge has run since the block began "
        "or the buffer was cleared"
    )


def test_two_buffers_compared_with_an_operator(gpt2):
    first, second = _run(gpt2, RESID), _run(gpt2, RESID)
    for other in (second, dict(second)):
        assert _said(lambda other=other: first == other) == (
            "buffers cannot be compared with ==, since a tensor does not have a single truth "
            "value; compare their tensors, with torch.testing.assert_close(acts, other, rtol=0, "
            "atol=0), or one with torch.equal(acts[name], other[name])"
        )
        torch.testing.assert_close(first, other, rtol=0, atol=0)
    assert first == first  # noqa: PLR0124
    assert first is not None
    assert first != "acts"


def test_a_buffer_whose_forwards_left_nothing(gpt2):
    acts = _run(gpt2, "blocks.0.attn.qkv.hook_[i]*")
    assert _said(lambda: acts.tensor) == (
        "there is no tensor to read: none of the sites fired in 1 forward of TransformerBridge"
    )
    assert _said(acts.__getitem__, "blocks.0.attn.qkv.hook_in") == (
        "nothing was captured from 'blocks.0.attn.qkv.hook_in': it never fired in 1 forward"
    )
    assert _said(acts.stack, "hook_in") == (
        "there is nothing to stack: none of the sites fired in 1 forward of TransformerBridge"
    )
    acts.clear()
    assert "no forward of TransformerBridge has run since" in _said(lambda: acts.tensor)


def test_a_pattern_of_what_is_switched_off(gpt2):
    assert _said(capture(gpt2, ["hook_result", "hook_z"]).__enter__) == (
        "'hook_result' would never fire, since it matches only 'blocks.0.attn.hook_result', "
        "'blocks.1.attn.hook_result': use_attn_result is off: call model.set_use_attn_result(True) "
        "first"
    )
    off = capture(gpt2, lambda name: name.endswith("hook_mlp_in"))
    assert _said(off.__enter__).startswith("the request would never fire, since it matches ")


def test_a_name_of_several_captured_sites(gpt2):
    acts = _run(gpt2, "hook_z")
    for name in ("hook_z", "attn.hook_z", "blocks.*.attn.hook_z", "blocks.[0-1].**"):
        assert _said(acts.__getitem__, name) == (
            f"nothing was captured from {name!r}: it matches 2 of the captured sites, so read one "
            f"of 'blocks.0.attn.hook_z', 'blocks.1.attn.hook_z', or acts.stack({name!r}) for its "
            "layers"
        )
