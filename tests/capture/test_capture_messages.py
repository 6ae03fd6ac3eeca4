"""Errors, word for word: of the life of a capture, and of the decorator."""

import pytest
from models import Mlp, tokens
from said import message_of, run
from torch import nn

from actctx import capture, captures

RESID = "blocks.1.hook_resid_post"
pytestmark = pytest.mark.usefixtures("unchecked")


# The life of a capture.


def test_entering_twice(gpt2):
    opened = capture(gpt2, RESID)
    with opened:
        assert message_of(opened.__enter__) == (
            "this capture is already open; leave its block first, or create another capture"
        )


def test_reading_from_a_capture_instead_of_its_buffer(gpt2):
    assert message_of(capture(gpt2, RESID).__getitem__, RESID) == (
        "a capture has no item 'blocks.1.hook_resid_post'; captured tensors are in the buffer: "
        "`with capture(...) as acts`"
    )
    with pytest.raises(AttributeError) as caught:
        capture(gpt2, RESID).tensor  # noqa: B018
    assert str(caught.value) == (
        "a capture has no 'tensor'; captured tensors are in the buffer: `with capture(...) as acts`"
    )


def test_leaving_what_is_not_open(gpt2):
    assert message_of(capture(gpt2, RESID).__exit__, None, None, None) == (
        "this capture is not open; enter it with a `with` statement, or open() it"
    )


def test_removed_hooks(gpt2, ids):
    with capture(gpt2, RESID):
        gpt2.reset_hooks()
        assert message_of(gpt2, ids) == (
            "the hook on 'blocks.1.hook_resid_post' was removed inside the block, as "
            "model.reset_hooks() does, so this forward would not be captured; leave the hooks "
            "alone until the block ends, or open a new capture after removing them"
        )


def test_a_hook_point_that_is_switched_off(gpt2):
    assert message_of(capture(gpt2, "blocks.0.attn.hook_result").__enter__) == (
        "'blocks.0.attn.hook_result' would never fire: use_attn_result is off: call "
        "model.set_use_attn_result(True) first"
    )


def test_a_hook_point_that_was_not_reached(gpt2):
    assert message_of(run, gpt2, "blocks.0.attn.qkv.hook_in") == (
        "'blocks.0.attn.qkv.hook_in' never fired in 1 forward: the forwards did not reach this "
        "hook point; see actctx.hook_names(model)"
    )


def test_a_module_that_was_not_called(mlp):
    mlp.spare = nn.Linear(1, 1)
    assert message_of(run, mlp, {"x": "spare", "y": "block"}, tokens(), tokens()) == (
        "'x' ('spare') never fired in 2 forwards: the forwards did not call this module, or only "
        "its .forward, which skips hooks"
    )


def test_a_list_of_modules(llama):
    assert message_of(run, llama, "model.layers") == (
        "'model.layers' never fired in 1 forward: a ModuleList is never called itself; capture the "
        "modules inside it: 'model.layers.*'"
    )


def test_a_site_that_yields_no_tensor(ids):
    class Nothing(nn.Module):
        def forward(self, x):
            return {"hidden": None, "x": x}

    model = nn.Sequential(Nothing())
    assert message_of(run, model, "0", ids) == (
        "'0' yields no tensor but dict(hidden: NoneType, x: Tensor); choose one with "
        "Site(output=...), a position or a name, or capture from one of the modules inside it"
    )


def test_a_stopped_output(mlp, ids):
    with capture(mlp, "block", stop=True):
        output = mlp(ids)
    assert message_of(lambda: output.logits) == (
        "this forward of Mlp was stopped after 'block', the last requested site, so it has no "
        "output; to use the output, or to call generate(), run_with_cache() or a parent module, "
        "capture with stop=False"
    )


# The decorator.


def test_a_decorator_without_names(gpt2):
    @captures
    def study(model):
        return model

    assert message_of(study, gpt2) == (
        "@captures decorates a function, but got a TransformerBridge; give the names to capture "
        "first, as in @captures('blocks.0.hook_resid_post')"
    )


def test_a_decorated_class():
    assert message_of(captures(RESID), Mlp) == (
        "@captures cannot decorate the class 'Mlp'; decorate its methods"
    )


def test_a_decorated_staticmethod():
    assert message_of(captures(RESID), staticmethod(print)) == (
        "@captures cannot decorate a staticmethod; write @captures(...) below @staticmethod"
    )


def test_a_decorated_number():
    assert message_of(captures(RESID), 3) == "@captures decorates a function, not 3"


def test_a_decorated_call_without_a_model():
    assert message_of(captures(RESID)(lambda ids, scale: ids * scale), 3, scale=1) == (
        "no torch module is among the arguments ids, scale of this call; pass the model, or say "
        "where it is: @captures(..., model=model), or model=lambda self, *args, **kwargs: "
        "self.model for a method"
    )
