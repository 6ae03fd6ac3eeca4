"""Early stops: where forwards end, and what a stopped call returns."""

import copy
import functools
import gc
import inspect
import math
import operator
import pickle
import types

import numpy as np
import pytest
import torch
from models import Mlp, bridge, hooks_of, plainly_hooked
from torch import nn

from actctx import CaptureStateError, Stopped, StoppedError, capture

RESID = "blocks.0.hook_resid_post"
LATER = "blocks.1.hook_resid_post"


@pytest.fixture
def stopped(mlp, ids):
    with capture(mlp, "block", stop=True):
        return mlp(ids)


def _ran(model, ids, *names):
    """List which of the hook points run in a forward."""
    ran = []
    for name in names:
        model.hook_dict[name].add_hook(lambda activation, hook: ran.append(hook.name))  # noqa: ARG005
    model(ids)
    for name in names:
        model.hook_dict[name].remove_hooks()
    return ran


def test_each_forward_of_a_loop_stops(gpt2, ids):
    with capture(gpt2, RESID, stop=True) as acts:
        outputs = [gpt2(ids) for _ in range(4)]
    assert all(isinstance(output, Stopped) for output in outputs)
    assert torch.equal(acts.tensor[:3], plainly_hooked(gpt2, ids, RESID)[RESID][0])
    assert len(acts.tensor) == 12


def test_a_forward_stops_after_its_last_site_in_whatever_order_they_are_asked_for(gpt2, ids):
    with capture(gpt2, [LATER, RESID], stop=True) as acts:
        ran = _ran(gpt2, ids, "blocks.1.hook_in", "ln_final.hook_in")
    assert ran == ["blocks.1.hook_in"]
    assert list(acts) == [RESID, LATER]


def test_hook_points_that_are_switched_off_do_not_keep_a_forward_running(gpt2, ids):
    with capture(gpt2, ["hook_[rz]*", "hook_mlp_*"], stop=True) as acts:
        assert isinstance(gpt2(ids), Stopped)
    assert list(acts)[-1] == "blocks.1.hook_resid_post"
    assert {name.rpartition(".")[2] for name in acts.missing} == {"hook_result", "hook_mlp_in"}


def test_a_stop_inside_a_stop_waits_for_the_outer_capture(gpt2, ids):
    with capture(gpt2, LATER, stop=True) as outer, capture(gpt2, RESID, stop=True) as inner:
        assert isinstance(gpt2(ids), Stopped)
    assert outer.tensor.shape == inner.tensor.shape == (3, 7, 32)


def test_an_inner_stop_never_starves_an_outer_capture(gpt2, ids):
    with capture(gpt2, ["unembed.hook_out", RESID]) as outer:
        with capture(gpt2, RESID, stop=True) as inner:
            gpt2(ids)
        assert gpt2(ids).shape == (3, 7, 50)
    assert outer["unembed.hook_out"].shape == (6, 7, 50)
    assert inner.tensor.shape == (3, 7, 32)


def test_a_forward_stops_once_the_sites_of_all_captures_have_fired(gpt2, ids):
    with capture(gpt2, LATER), capture(gpt2, RESID, stop=True):
        ran = _ran(gpt2, ids, "blocks.1.hook_in", "ln_final.hook_in")
    assert ran == ["blocks.1.hook_in"]


def test_forwards_run_to_their_end_once_the_stopping_capture_is_closed(gpt2, ids):
    outer, inner = capture(gpt2, RESID, stop=True), capture(gpt2, LATER)
    outer.__enter__()
    inner.__enter__()
    assert isinstance(gpt2(ids), Stopped)
    outer.__exit__(None, None, None)
    assert gpt2(ids).shape == (3, 7, 50)
    inner.__exit__(None, None, None)


def test_a_stop_in_a_part_waits_for_a_capture_of_the_whole(llama, ids):
    with capture(llama, "lm_head") as outer, capture(llama.model, "layers.0", stop=True) as inner:
        llama(ids)
    assert outer.tensor.shape == (3, 7, 50)
    assert inner.tensor.shape == (3, 7, 32)


@pytest.mark.parametrize("stop", [False, True])
def test_a_capture_of_a_part_keeps_what_it_has_when_the_whole_stops(llama, ids, stop):
    with (
        capture(llama, "model.layers.1", stop=True) as outer,
        capture(llama.model, "layers.1", stop=stop) as inner,
    ):
        llama(ids)
        llama(ids)
    assert inner.forwards == outer.forwards == 2
    assert torch.equal(inner.tensor, outer.tensor)


def test_hooks_that_must_always_run_do_run_when_a_forward_stops(mlp, ids):
    ran = []
    handle = mlp.block.register_forward_hook(lambda *args: ran.append(args), always_call=True)
    with capture(mlp, mlp.block[0], stop=True):
        mlp(ids)
    handle.remove()
    assert len(ran) == 1


def test_a_stopped_forward_leaves_no_tensor_alive():
    class Held(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Identity()

        def forward(self, x):
            scratch = x + 1
            references.append(scratch.untyped_storage()._weak_ref())
            return self.inner(scratch)

    references = []
    model = Held()
    gc.collect()
    gc.disable()
    try:
        with capture(model, "inner", stop=True) as acts:
            for _ in range(5):
                model(torch.zeros(4))
        alive = [ref for ref in references if not torch.UntypedStorage._expired(ref)]
    finally:
        gc.enable()
        for ref in references:
            torch.UntypedStorage._free_weak_ref(ref)
    assert acts.tensor.shape == (20,)
    assert not alive


# What a stopped call returns.


@pytest.mark.parametrize(
    "use",
    [
        lambda out: out.logits,
        lambda out: out[0],
        lambda out: out + 1,
        lambda out: 1 - out,
        lambda out: out == 0,
        lambda out: out < 0,
        bool,
        float,
        len,
        list,
        torch.argmax,
        lambda out: torch.stack([out]),
        np.asarray,
        lambda out: torch.zeros(1) + out,
        lambda out: nn.functional.softmax(out, dim=-1),
        lambda out: out(1),
        lambda out: 3 in out,
        lambda out: setattr(out, "logits", 0),
        lambda out: -out,
        lambda out: out @ out,
        lambda out: out << 1,
        lambda out: 1 >> out,
        lambda out: divmod(out, 2),
        lambda out: divmod(2, out),
        round,
        math.floor,
        complex,
        next,
        reversed,
        lambda out: operator.delitem(out, 0),
        lambda out: delattr(out, "logits"),
        lambda out: f"{out:.3f}",
    ],
)
def test_every_use_of_a_stopped_output_raises(stopped, use):
    with pytest.raises(StoppedError, match="'block'"):
        use(stopped)


def test_a_stopped_output_shows_what_happened(stopped):
    assert (
        repr(stopped)
        == "<Stopped: Mlp.forward ended after 'block', as capture(stop=True) requested>"
    )
    assert f"{stopped}" == format(stopped) == str(stopped) == repr(stopped)


def test_generate_of_hugging_face_under_stop_is_an_error(llama, ids):
    before = hooks_of(llama)
    with pytest.raises(StoppedError), capture(llama, "model.layers.0", stop=True):
        llama.generate(ids, max_new_tokens=2)
    assert hooks_of(llama) == before


@pytest.mark.parametrize("given", ["past_key_values", "cache", "by position"])
def test_a_cache_of_the_caller_is_refused_before_it_is_filled(llama, ids, given):
    own = inspect.signature(llama.forward).parameters
    if given == "cache" and given not in own:
        pytest.skip("this transformers has no such argument")
    with torch.no_grad():
        cache = llama(ids[:, :5]).past_key_values
    ran = []
    handle = llama.model.embed_tokens.register_forward_hook(lambda *args: ran.append(args))
    with pytest.raises(StoppedError) as caught, capture(llama, "model.layers.0", stop=True):
        if given == "by position":
            llama(ids[:, 5:], None, None, cache)
        else:
            llama(ids[:, 5:], **{given: cache})
    handle.remove()
    named = list(own)[3] if given == "by position" else given
    assert str(caught.value) == (
        f"this forward of LlamaForCausalLM was given {named}, a cache that a capture with "
        "stop=True would leave half filled, since not all layers run; to use a cache, or to call "
        "generate(), capture with stop=False"
    )
    assert not ran
    assert {layer.get_seq_length() for layer in cache.layers} == {5}


def test_a_cache_that_the_model_makes_itself_is_not_refused(llama, ids):
    with capture(llama, "model.layers.0", stop=True):
        assert isinstance(llama(ids, past_key_values=None, use_cache=True), Stopped)


def test_a_cache_that_the_model_gives_to_its_parts_is_not_refused(ids):
    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Identity(), nn.Identity()

        def forward(self, x, past_key_values):
            return self.second(self.first(x + len(past_key_values)))

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = Part()

        def forward(self, x):
            return self.part(x, past_key_values=[])

    model = Whole()
    with capture(model, "part.first", stop=True), capture(model.part, "first", stop=True) as acts:
        assert isinstance(model(ids), Stopped)
    assert torch.equal(acts.tensor, ids)


def test_a_cache_of_the_caller_is_filled_where_nothing_stops(llama, ids):
    with torch.no_grad():
        cache = llama(ids[:, :5]).past_key_values
    with capture(llama, "model.layers.0"):
        llama(ids[:, 5:], past_key_values=cache)
    assert {layer.get_seq_length() for layer in cache.layers} == {7}


def test_generate_of_a_bridge_under_stop_is_an_error(gpt2, ids):
    with pytest.raises(StoppedError), capture(gpt2, RESID, stop=True):
        gpt2.generate(ids, max_new_tokens=2, verbose=False)


def test_run_with_cache_under_stop_is_an_error(gpt2, ids):
    gpt2.run_with_cache(ids)  # transformers puts hooks of its own on at the first, for good
    before = hooks_of(gpt2)
    with pytest.raises(StoppedError), capture(gpt2, RESID, stop=True):
        gpt2.run_with_cache(ids)
    assert hooks_of(gpt2) == before
    _, cache = gpt2.run_with_cache(ids)
    assert torch.equal(cache[RESID].detach(), plainly_hooked(gpt2, ids, RESID)[RESID][0])


def test_a_call_through_a_parent_module_under_stop_is_an_error(llama, ids):
    before = hooks_of(llama)
    with pytest.raises(StoppedError), capture(llama.model, "layers.0", stop=True):
        llama(ids)
    assert hooks_of(llama) == before


def test_the_signature_of_forward_can_be_read_during_a_capture(llama):
    import inspect

    before = inspect.signature(llama.forward)
    with capture(llama, "model.layers.0"):
        assert inspect.signature(llama.forward) == before


CLONES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m))}  # noqa: S301


@pytest.mark.parametrize("clone", CLONES.values(), ids=CLONES)
def test_a_copy_of_a_model_made_during_a_capture_is_its_own(ids, clone):
    model = Mlp()
    with capture(model, "head", stop=True) as acts:
        twin = clone(model)
        with torch.no_grad():
            twin.head.bias += 1
        assert torch.is_tensor(twin(ids))
        assert len(acts) == 0
        model(ids)
    assert torch.allclose(twin(ids), model(ids) + 1)


def test_a_copy_of_a_bridge_made_during_a_capture_is_its_own(ids):
    model = bridge()
    with capture(model, RESID, stop=True) as acts:
        twin = copy.deepcopy(model)
        assert twin(ids).shape == (3, 7, 50)
        assert len(acts) == 0
    with torch.no_grad():
        assert torch.equal(twin(ids), model(ids))


@pytest.mark.parametrize("clone", CLONES.values(), ids=CLONES)
def test_a_copy_of_a_model_whose_forward_is_a_method_of_another_name_is_its_own(ids, clone):
    model = Mlp()
    model.forward = types.MethodType(_doubled, model)
    with capture(model, "head", stop=True):
        twin = clone(model)
    with torch.no_grad():
        twin.head.weight.zero_()
        assert torch.equal(twin(ids), 2 * twin.head.bias.expand(3, 7, 4))


def _doubled(self, ids):
    return Mlp.forward(self, ids) * 2


def test_a_shallow_copy_of_a_model_made_during_a_capture_can_be_captured_itself(mlp, ids):
    with capture(mlp, "block"):
        twin = copy.copy(mlp)
        with pytest.raises(CaptureStateError, match="shallow copy"):
            twin(ids)
    once, twin.twice = mlp(ids), True
    with capture(twin, "block") as acts:
        assert not torch.equal(twin(ids), once)
    assert acts.forwards == 1
    assert "forward" not in twin.__dict__


def test_a_forward_that_was_saved_in_a_block_and_set_behind_it_does_no_harm(mlp, ids):
    expected = mlp(ids)
    with capture(mlp, "block"):
        saved = mlp.forward
    mlp.forward = saved
    assert torch.equal(mlp(ids), expected)
    with capture(mlp, "block") as acts:
        assert torch.equal(mlp(ids), expected)
    assert acts.forwards == 1
    assert torch.equal(copy.deepcopy(mlp)(ids), mlp(ids))


def test_a_forward_that_was_wrapped_in_a_block_is_run_by_the_captures_inside(mlp, ids):
    expected = mlp(ids)
    with capture(mlp, "block") as outer:
        below = mlp.forward
        mlp.forward = functools.wraps(below)(lambda ids: below(ids) * 2)
        with capture(mlp, "head") as inner:
            assert torch.equal(mlp(ids), expected * 2)
        assert torch.equal(mlp(ids), expected * 2)
    assert (outer.forwards, inner.forwards) == (2, 1)
