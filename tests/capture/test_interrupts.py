"""An interrupt at any line: whatever a capture was about to do, it is undone."""

import threading

import pytest
import torch
import torch._dynamo
from interrupts import interrupted
from models import Mlp, bridge, hooks_of, huggingface, tiny_transformer

from actctx import capture, captures
from actctx._capture.forward import _FRAME
from actctx._capture.modes import _STACK, _STANCE
from actctx._capture.opening import _OPEN
from actctx._capture.undo import _LOCK

pytestmark = pytest.mark.thorough

MODELS = {
    "plain": (Mlp, ["block", "head"], {}),
    "shadowed": (Mlp, ["block"], {"stop": True}),
    "huggingface": (lambda: huggingface("LlamaForCausalLM"), "model.layers.*", {"grad": True}),
    "bridge": (bridge, ["blocks.0.hook_resid_post"], {"mask": "attention"}),
    "hooked": (tiny_transformer, ["blocks.0.hook_resid_post", "unembed"], {"capacity": 9}),
}


def _state(model):
    free = []

    def take():
        free.append(_LOCK.acquire(timeout=0.1))
        if free[0]:
            _LOCK.release()

    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    return (
        hooks_of(model),
        torch.is_grad_enabled(),
        list(_STACK.modes),
        _OPEN.get(),
        _FRAME.get(),
        torch._dynamo.eval_frame._stance.stance,
        set(_STANCE._holders),
        free,
    )


def _sweep(model, make, run):
    """Interrupt a run with a fresh capture at each line in turn."""
    run(make())  # what the model does once, as those of Hugging Face do
    before = _state(model)
    at = 1
    while _interrupted(lambda made: run(made.pop()), [make()], at, lambda: _state(model) == before):
        at += 1
    assert at > 50


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("kind", MODELS)
def test_an_interrupt_at_any_line_leaves_nothing_behind(kind):
    build, names, options = MODELS[kind]
    model = build()
    if kind == "shadowed":
        model.forward = model.forward

    def run(opened):
        with opened:
            pass

    _sweep(model, lambda: capture(model, names, **options), run)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("stop", [False, True])
def test_an_interrupt_at_any_line_of_a_forward_leaves_nothing_behind(mlp, ids, stop):
    def run(opened):
        with opened:
            mlp(ids)

    _sweep(mlp, lambda: capture(mlp, "block", stop=stop), run)


@pytest.mark.usefixtures("unchecked")
def test_an_interrupt_at_any_line_of_a_decorated_generator_leaves_nothing_behind(mlp, ids):
    @captures("block")
    def study(acts, model):
        yield model(ids)
        yield acts

    _sweep(mlp, lambda: study, lambda generator: list(generator(mlp)))


@pytest.mark.usefixtures("unchecked")
def test_an_interrupt_at_any_line_of_a_decorated_coroutine_leaves_nothing_behind(mlp, ids):
    @captures("block")
    async def study(model):
        return model(ids)

    def run(coroutine):
        with pytest.raises(StopIteration):
            coroutine(mlp).send(None)

    _sweep(mlp, lambda: study, run)


def _interrupted(run, made, at, is_as_before):
    """Run with an interrupt at a line; tell whether it came so far."""
    try:
        with interrupted(at) as interrupts:
            run(made)
    except KeyboardInterrupt:
        # Where the block's `__exit__` had not begun yet, hooks go with the traceback that has them.
        name, _, is_first = interrupts.where
        assert is_as_before() or (name.endswith(".__exit__") and is_first), interrupts.where
    assert is_as_before(), interrupts.where
    return interrupts.seen >= at
