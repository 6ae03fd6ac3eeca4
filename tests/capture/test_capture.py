"""The life of a capture: what it hands back, and what it leaves behind."""

import gc
import weakref

import pytest
import torch
from models import Mlp, hooks_of, plainly_hooked
from torch import nn

from actctx import (
    CaptureStateError,
    HooksRemovedError,
    Site,
    capture,
)

RESID = "blocks.1.hook_resid_post"


class Boom(Exception):
    pass


# What is handed back.


def test_a_hook_point_is_captured_as_a_plain_hook_sees_it(gpt2, ids):
    with capture(gpt2, RESID) as acts:
        gpt2(ids)
    assert torch.equal(acts[RESID], plainly_hooked(gpt2, ids, RESID)[RESID][0])


def test_the_output_of_a_forward_is_left_as_it_is(gpt2, ids):
    with torch.no_grad():
        expected = gpt2(ids)
    with capture(gpt2, "**"):
        logits = gpt2(ids)
    assert torch.equal(logits, expected)


def test_heads_are_split_as_the_hook_point_splits_them(gpt2, ids):
    with capture(gpt2, "blocks.0.attn.hook_q") as acts:
        gpt2(ids)
    assert acts.tensor.shape == (3, 7, 4, 8)


def test_a_module_is_captured_by_its_name(llama, ids):
    kept = []
    handle = llama.model.layers[1].register_forward_hook(lambda *args: kept.append(args[2]))
    with capture(llama, "model.layers.1") as acts:
        llama(ids)
    handle.remove()
    assert torch.equal(acts.tensor, kept[0])


def test_a_module_of_a_bridge_is_captured_by_its_name(gpt2, ids):
    with capture(gpt2, ["blocks.1", RESID]) as acts:
        gpt2(ids)
    assert torch.equal(acts["blocks.1"], acts[RESID])


def test_a_module_is_captured_in_place_of_its_name(mlp, ids):
    with capture(mlp, mlp.block) as acts:
        mlp(ids)
    assert list(acts) == ["block"]


def test_the_input_of_a_module_is_captured_with_io_in(mlp, ids):
    with capture(mlp, {"in": Site("head", io="in"), "block": "block"}) as acts:
        mlp(ids)
    assert torch.equal(acts["in"], acts["block"])


def test_of_a_tuple_the_first_value_is_captured(llama, ids):
    kept = []
    attention = llama.model.layers[0].self_attn
    handle = attention.register_forward_hook(lambda *args: kept.append(args[2][0]))
    with capture(llama, attention) as acts:
        llama(ids)
    handle.remove()
    assert torch.equal(acts.tensor, kept[0])


def test_a_captured_tensor_is_detached_contiguous_and_no_inference_tensor(gpt2, ids):
    with (
        capture(gpt2, ["blocks.0.attn.hook_z", "blocks.0.attn.hook_q"]) as acts,
        torch.inference_mode(),
    ):
        gpt2(ids)
    for tensor in acts.values():
        assert not tensor.requires_grad
        assert tensor.is_contiguous()
        assert not tensor.is_inference()
        nn.Linear(8, 1)(tensor).sum().backward()


def test_a_joined_tensor_is_no_inference_tensor(gpt2, ids):
    with capture(gpt2, RESID) as acts, torch.inference_mode():
        gpt2(ids)
        gpt2(ids)
        joined = acts.tensor
    assert not joined.is_inference()


def test_captures_share_no_storage_with_each_other_or_the_model(gpt2, ids):
    names = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_pre"]
    live = []
    for name in names:
        gpt2.hook_dict[name].add_hook(lambda activation, hook: live.append(activation))  # noqa: ARG005
    with capture(gpt2, names) as acts:
        gpt2(ids)
    for name in names:
        gpt2.hook_dict[name].remove_hooks()
    pointers = [t.untyped_storage().data_ptr() for t in (*live, *acts.values())]
    assert pointers[0] == pointers[1], "the two hook points share storage in the model"
    assert len(set(pointers)) == 3


def test_a_later_edit_in_place_does_not_reach_a_captured_tensor(ids):
    class Editing(Mlp):
        def forward(self, ids):
            return self.head(self.block(self.embed(ids)).mul_(0))

    model = Editing()
    with capture(model, "block") as acts:
        model(ids)
    assert acts.tensor.any()


def test_a_slice_does_not_keep_the_rest_of_the_tensor_alive(gpt2, ids):
    with capture(gpt2, RESID, slice={"pos": -1}) as acts:
        gpt2(ids)
    assert acts.tensor.untyped_storage().nbytes() == acts.tensor.nbytes == acts.nbytes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_dtype_casts_after_selecting(gpt2, ids, dtype):
    with capture(gpt2, RESID, slice=[1, 5], dtype=dtype) as acts:
        gpt2(ids)
    expected = plainly_hooked(gpt2, ids, RESID)[RESID][0][:, [1, 5]].to(dtype)
    assert acts.tensor.dtype == dtype
    assert torch.equal(acts.tensor, expected)


def test_a_dtype_leaves_token_ids_as_they_are(gpt2, ids):
    with capture(gpt2, "embed.hook_in", dtype=torch.float16) as acts:
        gpt2(ids)
    assert torch.equal(acts.tensor, ids)


def test_a_device_moves_what_is_captured(gpt2, ids):
    with capture(gpt2, RESID, device="meta") as acts:
        gpt2(ids)
    assert acts.tensor.is_meta
    assert acts.tensor.shape == (3, 7, 32)


def test_a_site_has_options_of_its_own(gpt2, ids):
    sites = [Site(RESID, dtype=torch.float16, slice={}), "blocks.0.hook_resid_post"]
    with capture(gpt2, sites, slice=-1) as acts:
        gpt2(ids)
    assert acts[RESID].dtype == torch.float16
    assert acts[RESID].shape == (3, 7, 32)
    assert acts["blocks.0.hook_resid_post"].shape == (3, 32)


def test_one_place_is_captured_twice_under_two_aliases(gpt2, ids):
    sites = {"first": Site(RESID, slice=0), "last": Site(RESID, slice=-1)}
    with capture(gpt2, sites) as acts:
        gpt2(ids)
    whole = plainly_hooked(gpt2, ids, RESID)[RESID][0]
    assert torch.equal(acts.first, whole[:, 0])
    assert torch.equal(acts.last, whole[:, -1])


def test_a_capture_sees_what_hooks_before_it_changed(gpt2, ids):
    point = gpt2.hook_dict[RESID]
    point.add_hook(lambda activation, hook: activation * 0)  # noqa: ARG005
    with capture(gpt2, RESID) as acts:
        gpt2(ids)
    point.remove_hooks()
    assert not acts.tensor.any()


# Gradients.


def test_the_block_and_its_forwards_run_without_gradients(gpt2, ids):
    with capture(gpt2, RESID):
        assert not torch.is_grad_enabled()
        assert not gpt2(ids).requires_grad
    assert torch.is_grad_enabled()


def test_forwards_run_without_gradients_where_the_block_switches_them_on(gpt2, ids):
    with capture(gpt2, RESID) as acts, torch.enable_grad():
        assert not gpt2(ids).requires_grad
    assert not acts.tensor.requires_grad


def test_gradients_stay_off_where_they_were_off(gpt2, ids):
    with torch.no_grad():
        with capture(gpt2, RESID):
            gpt2(ids)
        assert not torch.is_grad_enabled()


def test_grad_keeps_the_graph(gpt2, ids):
    with capture(gpt2, RESID, grad=True, slice=-1, dtype=torch.float64) as acts:
        gpt2(ids)
    acts.tensor.sum().backward()
    weight = gpt2.blocks[0].mlp.out.original_component.weight
    found, weight.grad = weight.grad, None
    gpt2.zero_grad()
    kept = []
    gpt2.hook_dict[RESID].add_hook(lambda activation, hook: kept.append(activation))  # noqa: ARG005
    gpt2(ids)
    gpt2.hook_dict[RESID].remove_hooks()
    kept[0][:, -1].double().sum().backward()
    assert torch.equal(found, weight.grad)
    gpt2.zero_grad()


def test_captures_that_close_in_another_order_give_gradients_back(mlp):
    first, second, third = (capture(mlp, "block") for _ in range(3))
    for each in (first, second, third):
        each.__enter__()
    for each in (first, third, second):
        assert not torch.is_grad_enabled()
        each.__exit__(None, None, None)
    assert torch.is_grad_enabled()


# What is left behind.


@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_error_in_the_block_comes_out_and_leaves_the_model_as_it_was(gpt2, error):
    before = hooks_of(gpt2)
    raised = error()
    with pytest.raises(error) as caught, capture(gpt2, "**"):
        raise raised
    assert caught.value is raised
    assert hooks_of(gpt2) == before


def test_an_error_in_the_forward_comes_out_and_leaves_the_model_as_it_was(gpt2):
    before = hooks_of(gpt2)
    with pytest.raises(IndexError), capture(gpt2, "**"):
        gpt2(torch.tensor([[10_000]]))
    assert hooks_of(gpt2) == before


def test_hooks_of_others_stay_and_keep_their_order(gpt2, ids):
    ran = []
    point = gpt2.hook_dict[RESID]
    point.add_hook(lambda activation, hook: ran.append("first"))  # noqa: ARG005
    with capture(gpt2, RESID):
        point.add_hook(lambda activation, hook: ran.append("second"))  # noqa: ARG005
        gpt2(ids)
    gpt2(ids)
    point.remove_hooks()
    assert ran == ["first", "second"] * 2


def test_a_forward_that_others_shadowed_inside_the_block_stays_theirs(mlp, ids):
    with capture(mlp, "block") as acts:
        below = mlp.forward
        mlp.forward = lambda ids: below(ids) * 2
        doubled = mlp(ids)
    assert torch.equal(mlp(ids), doubled)
    del mlp.forward
    assert torch.equal(mlp(ids) * 2, doubled)
    assert acts.tensor.shape == (3, 7, 8)


def test_a_forward_that_was_shadowed_before_is_given_back(mlp, ids):
    original = mlp.forward
    mlp.forward = shadow = lambda ids: original(ids) + 1
    with capture(mlp, "block"):
        mlp(ids)
    assert mlp.forward is shadow


def test_captures_nest_and_close_in_any_order(gpt2, ids):
    outer, inner = capture(gpt2, RESID), capture(gpt2, "blocks.0.hook_resid_post")
    before = hooks_of(gpt2)
    outer_acts = outer.__enter__()
    gpt2(ids)
    inner_acts = inner.__enter__()
    gpt2(ids)
    outer.__exit__(None, None, None)
    gpt2(ids)
    inner.__exit__(None, None, None)
    assert outer_acts.tensor.shape == inner_acts.tensor.shape == (6, 7, 32)
    assert hooks_of(gpt2) == before


def test_a_capture_is_used_again_with_a_fresh_buffer(gpt2, ids):
    again = capture(gpt2, RESID)
    with again as first:
        gpt2(ids)
    with again as second:
        gpt2(ids[:1])
    assert first.tensor.shape == (3, 7, 32)
    assert second.tensor.shape == (1, 7, 32)


def test_a_capture_that_is_open_cannot_be_entered(gpt2):
    opened = capture(gpt2, RESID)
    with opened, pytest.raises(CaptureStateError, match="already open"):
        opened.__enter__()


def test_a_capture_that_is_dropped_while_open_takes_its_hooks_off(mlp):
    before = hooks_of(mlp)
    opened = capture(mlp, "block")
    opened.__enter__()
    assert hooks_of(mlp) != before
    del opened
    assert hooks_of(mlp) == before
    assert torch.is_grad_enabled()


def test_a_model_is_freed_after_its_captures(ids):
    model = Mlp()
    with capture(model, "block") as acts:
        model(ids)
    freed = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert freed() is None
    finally:
        gc.enable()
    assert acts.tensor.shape == (3, 7, 8)


def test_reset_hooks_inside_the_block_is_noticed(gpt2, ids):
    with pytest.raises(HooksRemovedError), capture(gpt2, RESID) as acts:
        gpt2(ids)
        gpt2.reset_hooks()
        gpt2(ids)
    assert acts.tensor.shape == (3, 7, 32)


def test_reset_hooks_after_the_last_forward_does_no_harm(gpt2, ids):
    with capture(gpt2, RESID) as acts:
        gpt2(ids)
        gpt2.reset_hooks()
    assert acts.tensor.shape == (3, 7, 32)


def test_run_with_hooks_inside_the_block_leaves_the_capture_alone(gpt2, ids):
    with capture(gpt2, RESID) as acts:
        gpt2.run_with_hooks(ids, fwd_hooks=[("blocks.0.hook_out", lambda x, hook: x * 0)])  # noqa: ARG005
        gpt2.run_with_cache(ids)
    assert acts.forwards == 2
    assert not torch.equal(acts.tensor[:3], acts.tensor[3:])


def test_a_call_of_forward_itself_is_captured(gpt2, ids):
    with capture(gpt2, RESID) as acts:
        gpt2.forward(ids)
    assert acts.forwards == 1
