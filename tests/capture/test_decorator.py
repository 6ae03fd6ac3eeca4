"""The decorator."""

import asyncio
import functools
import inspect
from typing import Optional

import pytest
import torch
from models import hooks_of, plainly_hooked, tokens

import actctx
from actctx import Activations, NeverFiredError, OptionError, captures
from actctx._capture.capture import CaptureOptions

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


def _annotated_as_optional(model, ids, acts: Optional[Activations] = None):  # noqa: UP045
    model(ids)
    return acts.tensor


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


def test_buffers_of_the_users_own_stay_theirs(gpt2, ids):
    @captures(RESID)
    def compare(
        model, ids, before: Activations | None = None, others: list[Activations] | None = None
    ):
        model(ids)
        return before, others

    (before, others), acts = compare(gpt2, ids)
    assert before is others is None
    (before, others), _ = compare(gpt2, ids, before=acts, others=[acts])
    assert before is others[0] is acts


def test_an_annotation_that_only_a_type_checker_can_read_does_not_hide_the_others(gpt2, ids):
    @captures(RESID)
    def norms(model: "NowhereToBeFound", buffer: "Activations", ids):
        model(ids)
        return buffer.tensor

    assert norms(gpt2, ids).shape == (3, 7, 32)


def test_a_decorator_without_its_names_is_refused():
    def run(model, ids):
        return model(ids)

    with pytest.raises(OptionError) as caught:
        captures(run)
    assert str(caught.value) == (
        "@captures got the function 'run' instead of the names to capture; give names, as in "
        "@captures('blocks.0.hook_resid_post')"
    )


def test_its_signature_shows_the_options_of_capture():
    options = dict(list(inspect.signature(actctx.capture).parameters.items())[2:])
    shown = inspect.signature(captures).parameters
    assert list(shown) == ["names", "model", *options]
    assert {name: shown[name] for name in options} == options
    assert list(CaptureOptions.__annotations__) == list(options)


def test_an_option_that_does_not_exist_is_refused_before_any_call():
    with pytest.raises(TypeError, match=r"captures\(\) got an unexpected keyword argument 'stopp'"):
        captures(RESID, stopp=True)


def test_the_buffer_is_not_in_the_signature():
    assert list(inspect.signature(captures(RESID)(_annotated)).parameters) == ["model", "ids"]
    with pytest.raises(TypeError, match="receives 'acts' from @captures, not from its callers"):
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


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("function", [int, staticmethod(_named), classmethod(_named), 3])
def test_what_cannot_be_decorated_is_refused(function):
    with pytest.raises(OptionError, match="@captures"):
        captures(RESID)(function)


# Coroutines and generators.


def test_a_coroutine_is_decorated(gpt2, ids):
    @captures(RESID)
    async def run(model, ids):
        await asyncio.sleep(0)
        return model(ids)

    @captures(RESID)
    async def received(acts: Activations, model, ids):
        model(ids)
        await asyncio.sleep(0)
        return acts.tensor

    assert inspect.iscoroutinefunction(run)
    logits, acts = asyncio.run(run(gpt2, ids))
    assert logits.shape == (3, 7, 50)
    assert torch.equal(acts.tensor, asyncio.run(received(gpt2, ids)))


def test_coroutines_that_interleave_see_their_own_forwards(gpt2):
    @captures(RESID, slice=-1)
    async def run(model, count):
        for _ in range(4):
            assert torch.is_grad_enabled(), "a coroutine must not switch off another's gradients"
            model(tokens(count, seed=count))
            await asyncio.sleep(0)

    async def together():
        return await asyncio.gather(*(run(gpt2, count) for count in (1, 2, 3)))

    for count, (_, acts) in zip((1, 2, 3), asyncio.run(together()), strict=True):
        alone = plainly_hooked(gpt2, tokens(count, seed=count), RESID)[RESID][0][:, -1]
        assert torch.equal(acts.tensor, alone.repeat(4, 1))


def _is_free(model):
    return not any(point.has_hooks() for point in model.hook_dict.values())


def test_a_generator_holds_hooks_only_while_it_runs(gpt2, ids):
    @captures(RESID)
    def steps(model, ids):
        sent = []
        for _ in range(3):
            assert not _is_free(model)
            assert not torch.is_grad_enabled()
            model(ids)
            sent.append((yield len(sent)))
        return sent

    generator, acts = steps(gpt2, ids)
    assert _is_free(gpt2)
    assert next(generator) == 0
    assert _is_free(gpt2)
    assert torch.is_grad_enabled()
    gpt2(ids)  # while the generator waits: not its own
    assert generator.send("a") == 1
    assert generator.send("b") == 2
    with pytest.raises(StopIteration) as end:
        generator.send("c")
    assert end.value.value == ["a", "b", "c"]
    assert acts.forwards == 3


def test_a_generator_that_receives_the_buffer_yields_what_it_did(gpt2, ids):
    @captures(RESID)
    def steps(acts: Activations, model, ids):
        for _ in range(2):
            model(ids)
            yield acts.tensor
            acts.clear()

    assert [part.shape for part in steps(gpt2, ids)] == [(3, 7, 32)] * 2


def test_a_generator_that_is_closed_early_is_told(gpt2, ids):
    told = []

    @captures(RESID)
    def steps(acts, model, ids):
        try:
            model(ids)
            yield acts.tensor
        except GeneratorExit:
            told.append(_is_free(model))
            raise

    generator = steps(gpt2, ids)
    next(generator)
    generator.close()
    assert told == [False]
    assert _is_free(gpt2)
    del generator


def test_an_error_is_thrown_into_a_generator(gpt2, ids):
    @captures(RESID)
    def steps(acts, model, ids):
        try:
            yield 0
        except ZeroDivisionError:
            model(ids)
            yield acts.forwards

    generator = steps(gpt2, ids)
    next(generator)
    assert generator.throw(ZeroDivisionError) == 1
    assert list(generator) == []


def test_an_async_generator_holds_hooks_only_while_it_runs(gpt2, ids):
    @captures(RESID)
    async def steps(model, ids):
        for step in range(3):
            model(ids)
            await asyncio.sleep(0)
            assert not _is_free(model)
            yield step

    async def run():
        generator, acts = steps(gpt2, ids)
        seen = []
        async for step in generator:
            seen.append((step, _is_free(gpt2)))
            gpt2(ids)
        early, _ = steps(gpt2, ids)
        await early.asend(None)
        await early.aclose()
        return seen, acts

    seen, acts = asyncio.run(run())
    assert seen == [(0, True), (1, True), (2, True)]
    assert acts.forwards == 3
    assert _is_free(gpt2)


def test_a_generator_that_ends_without_its_site_is_an_error(mlp, ids):
    mlp.spare = torch.nn.Linear(1, 1)

    @captures("spare")
    def steps(model, ids):
        model(ids)
        yield 1

    generator, _ = steps(mlp, ids)
    assert next(generator) == 1
    with pytest.raises(NeverFiredError):
        next(generator)


def test_a_model_before_the_names_is_told_where_it_belongs(gpt2):
    for given in ((gpt2, RESID), (RESID, gpt2)):
        with pytest.raises(OptionError) as caught:
            captures(*given)
        assert str(caught.value) == (
            "@captures takes only the names by position, but got "
            f"({', '.join(type(each).__name__ for each in given)}); write "
            "@captures('blocks.1.hook_resid_post', model=model), or omit the model if it is an "
            "argument of the calls"
        )


def test_a_method_receives_the_buffer_behind_self(gpt2, ids):
    class Study:
        model = gpt2

        @captures(RESID, model=lambda self, *_: self.model)
        def run(self, acts: Activations, ids):
            self.model(ids)
            return acts.tensor

    expected = plainly_hooked(gpt2, ids, RESID)[RESID][0]
    assert torch.equal(Study().run(ids), expected)
    assert list(inspect.signature(Study().run).parameters) == ["ids"]
