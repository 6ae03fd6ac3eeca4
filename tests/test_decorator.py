"""The decorator."""

import functools
import inspect
from typing import Optional

import pytest
import torch
from models import hooks_of, plainly_hooked

import actctx
from actctx import Activations, OptionError, captures

RESID = "blocks.1.hook_resid_post"


def test_a_call_returns_its_result_and_the_activations(gpt2, ids):
    @captures(RESID, slice=-1)
    def logits(model, ids):
        return model(ids)

    result, acts = logits(gpt2, ids)
    assert result.shape == (3, 7, 50)
    assert torch.equal(acts.tensor, plainly_hooked(gpt2, ids, RESID)[RESID][0][:, -1])


def test_each_call_has_a_capture_of_its_own(gpt2, ids):
    @captures(RESID)
    def run(model, ids):
        model(ids)

    first, second = run(gpt2, ids)[1], run(gpt2, ids[:1])[1]
    assert first.tensor.shape == (3, 7, 32)
    assert second.tensor.shape == (1, 7, 32)


def test_a_function_that_calls_itself_nests_its_captures(gpt2, ids):
    @captures(RESID)
    def run(model, ids, depth):
        inner = run(model, ids, depth - 1)[1] if depth else None
        model(ids)
        return inner

    inner, outer = run(gpt2, ids, 1)
    assert len(inner.tensor) == 3
    assert len(outer.tensor) == 6


def _named(model, ids, acts):
    model(ids)
    return acts.tensor


def _annotated(buffer: Activations, model, ids):
    model(ids)
    return buffer.tensor


def _annotated_as_text(model, ids, *, buffer: "actctx.Activations"):
    model(ids)
    return buffer.tensor


def _annotated_as_optional(model, ids, buffer: Optional[Activations] = None):  # noqa: UP045
    model(ids)
    return buffer.tensor


def _in_the_middle(model, acts, ids=None, *more, flag=True):
    assert flag
    assert not more
    model(ids)
    return acts.tensor


@pytest.mark.parametrize(
    "function", [_named, _annotated, _annotated_as_text, _annotated_as_optional, _in_the_middle]
)
def test_a_function_that_asks_for_the_buffer_receives_it(gpt2, ids, function):
    decorated = captures(RESID)(function)
    assert decorated(gpt2, ids).shape == (3, 7, 32)
    assert decorated(model=gpt2, ids=ids).shape == (3, 7, 32)


def test_the_buffer_is_not_in_the_signature():
    assert list(inspect.signature(captures(RESID)(_annotated)).parameters) == ["model", "ids"]
    with pytest.raises(TypeError, match="acts"):
        captures(RESID)(_named)(None, None, acts=Activations())


def test_name_docs_and_signature_are_kept():
    def analyse(model: torch.nn.Module, ids: torch.Tensor, *, scale: float = 1.0) -> float:
        """Analyse."""

    decorated = captures(RESID)(analyse)
    assert decorated.__name__ == "analyse"
    assert decorated.__doc__ == "Analyse."
    assert decorated.__wrapped__ is analyse
    assert inspect.signature(decorated) == inspect.signature(analyse)


def test_methods_are_decorated(gpt2, ids):
    class Study:
        def __init__(self, model):
            self.model = model

        @captures(RESID, model=lambda self, *_: self.model)
        def own(self, ids):
            return self.model(ids)

        @captures(RESID)
        def passed(self, model, ids):
            return model(ids)

        @staticmethod
        @captures(RESID)
        def static(model, ids):
            return model(ids)

    study = Study(gpt2)
    for result, acts in (study.own(ids), study.passed(gpt2, ids), study.static(gpt2, ids)):
        assert result.shape == (3, 7, 50)
        assert acts.tensor.shape == (3, 7, 32)


def test_a_method_of_a_module_captures_from_the_module(mlp, ids):
    class Probe(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = mlp

        @captures("inner.block")
        def study(self, ids):
            return self.inner(ids)

    assert Probe().study(ids)[1].tensor.shape == (3, 7, 8)


def test_the_model_is_found_among_all_arguments(gpt2, ids):
    @captures(RESID)
    def run(*args, **kwargs):
        (kwargs.get("model") or args[1])(ids)

    assert run(1, gpt2)[1].forwards == 1
    assert run(1, model=gpt2)[1].forwards == 1


def test_the_model_is_given_to_the_decorator(gpt2, ids):
    @captures(RESID, model=gpt2)
    def run():
        return gpt2(ids)

    assert run()[1].tensor.shape == (3, 7, 32)


def test_a_partial_is_decorated(gpt2, ids):
    run = captures(RESID)(functools.partial(lambda model, ids: model(ids), ids=ids))
    assert run(gpt2)[1].tensor.shape == (3, 7, 32)


def test_options_are_those_of_capture(gpt2, ids):
    @captures(RESID, dtype=torch.float16, stop=True, join="pos", device="cpu")
    def run(model):
        model(ids)
        return model(ids)

    output, acts = run(gpt2)
    assert isinstance(output, actctx.Stopped)
    assert acts.tensor.shape == (3, 14, 32)
    assert acts.tensor.dtype == torch.float16


def test_an_error_comes_out_and_hooks_go(gpt2, ids):
    before = hooks_of(gpt2)

    @captures(RESID)
    def run(model, ids):
        model(ids)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(gpt2, ids)
    assert hooks_of(gpt2) == before
    assert torch.is_grad_enabled()


def test_a_call_without_a_model_is_an_error():
    with pytest.raises(OptionError, match="no torch module"):
        captures(RESID)(lambda ids: ids)(3)


async def _coroutine(model):
    model()


def _generator(model):
    yield model


async def _async_generator(model):
    yield model


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "function",
    [int, staticmethod(_named), classmethod(_named), 3, _coroutine, _generator, _async_generator],
)
def test_what_cannot_be_decorated_is_refused(function):
    with pytest.raises(OptionError, match="@captures"):
        captures(RESID)(function)
