"""Errors, word for word: of names, options and slices."""

import numpy as np
import pytest
import torch
from models import bridge, huggingface
from said import message_of, run
from torch import nn

from actctx import Site, capture, captures

RESID = "blocks.1.hook_resid_post"
ATTN = "blocks.0.attn.hook_z"
pytestmark = pytest.mark.usefixtures("unchecked")


# Names.


def test_an_unknown_name(gpt2):
    assert message_of(capture, gpt2, "blocks.1.hook_reisd_post") == (
        "no hook point matches 'blocks.1.hook_reisd_post'; closest: 'blocks.1.hook_resid_post', "
        "'blocks.0.hook_resid_post', 'blocks.1.hook_resid_pre' (see actctx.hook_names(model))"
    )


def test_unknown_names(gpt2):
    assert message_of(capture, gpt2, ["blocks.0.hook_otu", RESID, "ln_finale.hook_in"]) == (
        "no hook point matches 'blocks.0.hook_otu', 'ln_finale.hook_in'; closest: "
        "'blocks.0.hook_out', 'ln_final.hook_in' (see actctx.hook_names(model))"
    )


def test_an_unknown_module(mlp):
    assert message_of(capture, mlp, "heda") == (
        "no module matches 'heda'; closest: 'head' (see actctx.hook_names(model))"
    )


def test_a_hook_name_that_another_architecture_has():
    assert message_of(capture, bridge("GPTNeoXForCausalLM"), "blocks.0.hook_resid_mid") == (
        "no hook point matches 'blocks.0.hook_resid_mid'; closest: 'blocks.0.hook_resid_pre', "
        "'blocks.0.hook_resid_post', 'blocks.1.hook_resid_pre'; TransformerLens has names with "
        "this ending, but this architecture may not (see actctx.hook_names(model))"
    )
    plain = message_of(capture, huggingface("GPTNeoXForCausalLM"), "blocks.0.hook_resid_mid")
    assert "but this architecture may not, or only in a TransformerBridge (see" in plain


def test_a_hook_name_without_its_beginning(gpt2, llama):
    for model, kind in ((gpt2, "hook point"), (llama, "module")):
        assert message_of(capture, model, "resid_post") == (
            f"no {kind} matches 'resid_post'; hook names of TransformerLens begin with hook_: "
            "'hook_resid_post' (see actctx.hook_names(model))"
        )


def test_a_misspelt_last_part_of_hook_names(gpt2):
    assert "closest: 'hook_pattern'" in message_of(capture, gpt2, "hook_patern")


def test_braces_in_a_pattern(gpt2):
    assert "braces mean nothing in a pattern: give a list of names, or '[0-3]' (see" in message_of(
        capture, gpt2, "blocks.{0,1}.hook_resid_post"
    )


def test_a_firing_that_is_no_number():
    assert message_of(Site, "a", firing="last") == (
        "Site(firing='last') is not the number of a firing; give an int, such as 0 for the first "
        "of each forward or -1 for the last"
    )


def test_a_model_of_a_decorated_call_that_is_none():
    decorated = captures("block", model="model")(lambda: None)
    assert message_of(decorated) == (
        "@captures(..., model='model') is not a model; give one, or a function that finds it among "
        "the arguments of a call, as in model=lambda self, *args, **kwargs: self.model"
    )


def test_a_hook_name_on_a_model_without_hook_points(mlp):
    assert message_of(capture, mlp, "blocks.0.hook_resid_post") == (
        "no module matches 'blocks.0.hook_resid_post'; this model has no hook points, its names "
        "are those of named_modules(), such as 'head' (see actctx.hook_names(model))"
    )


def test_a_pattern_that_matches_nothing(gpt2):
    assert message_of(capture, gpt2, "*.hook_zzz") == (
        "no hook point matches '*.hook_zzz'; in a pattern '*' stays within two dots and '**' "
        "spans them (see actctx.hook_names(model))"
    )


def test_names_that_ask_for_nothing(gpt2):
    assert message_of(capture, gpt2, []) == (
        "no hook point was requested: the names are empty, or the predicate accepts none (see "
        "actctx.hook_names(model))"
    )


def test_what_names_nothing(gpt2):
    assert message_of(capture, gpt2, 3) == (
        "cannot capture from 3: give a hook name, a glob, a module, a Site, a predicate, a list "
        "of these, or a mapping of aliases to them"
    )


def test_a_module_of_another_model(gpt2):
    assert message_of(capture, gpt2, nn.Linear(1, 1)) == (
        "the Linear that was given is not a module of this model; give a module that "
        "model.named_modules() lists, or its name"
    )


def test_an_alias_of_several_places_that_is_read_as_one(gpt2):
    acts = run(gpt2, {"resid": "*hook_resid_post"})
    several = "'resid.blocks.0.hook_resid_post', 'resid.blocks.1.hook_resid_post'"
    assert message_of(acts.__getitem__, "resid") == (
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
    assert message_of(capture, gpt2, {alias: RESID}) == (
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
    assert message_of(capture, gpt2, [Site(glob, slice=0), Site(RESID, slice=1)]) == (
        "'blocks.1.hook_resid_post' is requested twice with different options; name each with a "
        "mapping, such as {'first': Site('blocks.*.hook_resid_post', ...), 'second': "
        "Site('blocks.1.hook_resid_post', ...)}"
    )


def test_what_is_no_model():
    assert message_of(capture, "gpt2", RESID) == (
        "cannot capture from a str; give a torch module, such as a TransformerBridge, a "
        "HookedTransformer or a Hugging Face model"
    )


# Options.


def test_an_io_that_is_neither():
    assert message_of(Site, RESID, io="inn") == (
        "Site(io='inn') is neither 'in' nor 'out'; give io='out' for what the module returns, or "
        "io='in' for what it is given"
    )


def test_axes_that_name_one_twice():
    assert message_of(Site, RESID, axes="pos pos") == (
        "Site(axes='pos pos') names an axis twice; give each axis its own name, in order, as in "
        "axes='batch pos d_model'"
    )


def test_a_dtype_that_is_none(gpt2):
    assert message_of(capture, gpt2, RESID, dtype="float16") == (
        "dtype='float16' is not one of torch's floating-point dtypes; give one, such as "
        "torch.float16"
    )


def test_a_device_that_is_none(gpt2):
    assert message_of(capture, gpt2, RESID, device="gpu7") == (
        "device='gpu7' cannot hold activations: Invalid device string: 'gpu7'"
    )


def test_a_join_that_is_no_axis(gpt2):
    assert message_of(capture, gpt2, RESID, join=1) == (
        "join=1 is not an axis; give 'batch', 'pos' or None for a list"
    )


def test_a_join_along_an_axis_that_the_slice_drops(gpt2):
    assert message_of(capture, gpt2, RESID, join="pos", slice=-1) == (
        "the forwards of 'blocks.1.hook_resid_post' cannot be joined along 'pos': its axes, "
        "after the slice, are 'batch d_model'; join along one of them, or keep a list "
        "with join=None"
    )


def test_a_join_along_an_axis_that_is_not_known(linear):
    assert message_of(capture, linear, "0", join="pos") == (
        "the axes of '0' are not known, so its forwards cannot be joined along 'pos'; name "
        "them, as in Site(..., axes='batch pos d_model')"
    )


# Slices.


def test_an_axis_that_a_site_does_not_have(gpt2):
    assert message_of(capture, gpt2, RESID, slice={"head": 0}) == (
        "'blocks.1.hook_resid_post' has no axis 'head'; its axes are 'batch pos d_model'; select "
        "along one of these, or by position with a tuple"
    )


def test_an_axis_of_a_module(linear):
    assert message_of(capture, linear, "0", slice=-1) == (
        "the axes of the module '0' are not known, so there is no 'pos' to select from; name "
        "them, as in Site(..., axes='batch pos d_model'), or select by position with a tuple, as "
        "in slice=np.s_[:, -1]"
    )


def test_a_head_outside_the_config(gpt2):
    assert message_of(capture, gpt2, ATTN, slice={"head": [0, 4]}) == (
        "'blocks.0.attn.hook_z' has the size 4 along 'head', so there is no position 4; choose "
        "from -4 to 3"
    )


def test_a_position_outside_the_forward(gpt2):
    assert message_of(run, gpt2, RESID, slice=7) == (
        "'blocks.1.hook_resid_post' has the size 7 along 'pos', so there is no position 7; "
        "choose from -7 to 6"
    )


def test_a_mask_of_another_length(gpt2):
    assert message_of(run, gpt2, RESID, slice=[True, False]) == (
        "'blocks.1.hook_resid_post' has the size 7 along 'pos', but the mask that selects from "
        "it has the length 2; give one entry for each position"
    )


def test_a_tuple_that_is_too_long(gpt2):
    assert message_of(capture, gpt2, RESID, slice=np.s_[0, 0, 0, 0]) == (
        "the slice of 'blocks.1.hook_resid_post' has 4 entries, but its axes are "
        "'batch pos d_model'; give as many entries as there are axes, or fewer"
    )


def test_a_tuple_that_is_too_long_for_the_forward(mlp):
    assert message_of(run, mlp, "block", slice=np.s_[:, :, :, 0]) == (
        "'block' fired with the shape (3, 7, 8), which has no axis 3; give the slice as many "
        "entries as there are axes, or fewer"
    )


def test_a_tuple_with_two_ellipses(gpt2):
    assert message_of(capture, gpt2, RESID, slice=(..., 0, ...)) == (
        "the slice of 'blocks.1.hook_resid_post' has more than one '...'; give one"
    )


def test_one_axis_selected_twice(gpt2):
    pattern = "blocks.0.attn.hook_pattern"
    assert message_of(capture, gpt2, pattern, slice={"pos": 0, "query": 1}) == (
        "the slice of 'blocks.0.attn.hook_pattern' selects twice from one axis; give one index "
        "for it"
    )


def test_what_does_not_select(gpt2):
    assert message_of(capture, gpt2, RESID, slice={"pos": "last"}) == (
        "the slice of 'blocks.1.hook_resid_post' cannot select with 'last'; give an int, a "
        "slice, a range, a list of ints, a one-dimensional index tensor or a bool mask of the "
        "whole axis"
    )


def test_a_site_that_fires_with_other_axes_than_were_named(mlp):
    assert message_of(run, mlp, Site("block", axes="batch pos head d_head")) == (
        "'block' fired with the shape (3, 7, 8), but Site(axes='batch pos head d_head') names 4 "
        "axes; name all axes that it has"
    )


def test_a_hook_point_that_fires_with_other_axes_than_are_known():
    model = bridge("OPTForCausalLM")
    name = "blocks.0.ln2.hook_normalized"
    with capture(model, name, slice=-1):
        said = message_of(
            model.blocks[0].ln2, torch.randn(21, 32)
        )  # of how many sequences is not known
    assert said == (
        "'blocks.0.ln2.hook_normalized' has no axis 'pos'; its axes are 'token d_model'; if it "
        "has one row for each token, in order, give Site(axes='batch pos d_model'), else "
        "select by position with a tuple"
    )
