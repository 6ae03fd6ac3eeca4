"""Decorated functions with a `Schema`: their arguments and results are checked with its fields."""

import asyncio

import pytest
import torch
from fields import ANOTHER_NAME, Resid, one
from jaxtyping import Float, Int
from models import GENERATION, huggingface
from torch import Tensor

from actctx import (
    Schema,
    TypedError,
    capture,
    captures,
    site,
)
from actctx._results.annotations import Claim, hold


def test_a_decorated_function_receives_it(gpt2, ids):
    @captures(Resid, stop=True)
    def norms(acts: Resid, model, ids) -> Float[Tensor, "batch"]:
        model(ids)
        return acts.resid.norm(dim=-1)

    assert norms(gpt2, ids).shape == (3,)


def test_a_decorated_function_that_does_not_want_it_gives_it_back(gpt2, ids):
    @captures(Resid)
    def logits(model, ids):
        return model(ids)

    result, acts = logits(gpt2, ids)
    assert result.shape == (3, 7, 50)
    assert isinstance(acts, Resid)


def test_arguments_and_results_are_checked_in_one_scope_with_the_fields(gpt2, ids):
    @captures(Resid)
    def scores(
        acts: Resid,
        model,
        ids: Int[Tensor, "batch pos"],
        *directions: Float[Tensor, " d_model"],
        keep: int = 0,
    ) -> Float[Tensor, " batch"]:
        model(ids)
        return acts.resid[keep:] @ directions[0]

    direction = torch.zeros(32)
    assert scores(gpt2, ids, direction).shape == (3,)
    for arguments, options, message in (
        (
            (ids.float(), direction),
            {},
            "the argument 'ids' of scores is float32 (3, 7), which does not match Int[Tensor, "
            '"batch '
            'pos"]: Int does not hold float32; write Float32',
        ),
        (
            (ids, direction, torch.zeros(31)),
            {},
            "the argument 'directions' of scores is float32 (31,), which does not match "
            "Float[Tensor, "
            '"d_model"]: d_model is 31 here, but 32 in the model\'s config' + ANOTHER_NAME,
        ),
        (
            (ids, direction),
            {"keep": 1},
            "the result of scores is float32 (2,), which does not match "
            'Float[Tensor, "batch"]: batch is 2 '
            "here, but 3 in the argument 'ids' of scores" + ANOTHER_NAME,
        ),
    ):
        with pytest.raises(TypedError) as caught:
            scores(gpt2, *arguments, **options)
        assert str(caught.value) == message


def test_tensors_in_containers_are_checked_one_by_one(gpt2, ids):
    @captures(Resid)
    def run(
        model,
        ids,
        several: list[Float[Tensor, " d_model"]],
        maybe: Float[Tensor, " d_model"] | None = None,
    ):
        model(ids)
        return several, maybe

    right, wrong = torch.zeros(32), torch.zeros(31)
    run(gpt2, ids, [right] * 9, right)
    start = "d_model is 31 here, but 32 in the model's config"
    for arguments, what in (
        (([right] * 8 + [wrong],), "the argument 'several' of run at [8]"),
        (([], wrong), "the argument 'maybe' of run"),
    ):
        with pytest.raises(TypedError) as caught:
            run(gpt2, ids, *arguments)
        assert str(caught.value) == (
            f'{what} is float32 (31,), which does not match Float[Tensor, "d_model"]: '
            f"{start}{ANOTHER_NAME}"
        )


def test_annotations_calculate_with_each_other_in_any_order():
    sizes = {"d": 4}
    hints = ["_ n+0 _", "_ n m*2", "_ _ m"]
    claims = [Claim(h, torch.zeros(3, 7, 8 if "*" in h else 4), Float[Tensor, h]) for h in hints]
    hold([*claims, Claim("n", torch.zeros(7), Float[Tensor, " n"])], sizes)


def test_keyword_arguments_are_checked_one_by_one(gpt2, ids):
    @captures(Resid)
    def run(model, ids, **directions: Float[Tensor, " d_model"]):
        model(ids)
        return directions

    run(gpt2, ids, up=torch.zeros(32))
    with pytest.raises(TypedError, match="d_model is 31 here"):
        run(gpt2, ids, up=torch.zeros(32), down=torch.zeros(31))


@pytest.mark.skipif(GENERATION < 3, reason="TransformerLens 2 has no adapters")
def test_an_mlp_that_runs_on_flattened_sequences_has_tokens(ids):
    class Flat(Schema):
        neurons: Float[Tensor, "token d_mlp"] = site("blocks.0.mlp.hook_post")

    model = huggingface("OPTForCausalLM")
    with capture(model, Flat) as acts:
        model(ids)
    assert acts.neurons.shape == (21, 64)


def test_a_wrong_argument_is_told_before_the_function_runs(gpt2, ids):
    ran = []

    @captures(Resid)
    def run(model, ids: Float[Tensor, "batch pos"]):
        ran.append(model(ids))

    with pytest.raises(TypedError):
        run(gpt2, ids)
    assert not ran


def test_generators_and_coroutines_are_checked_when_they_end(gpt2, ids):
    @captures(Resid)
    def steps(acts: Resid, model, ids: Int[Tensor, "other pos"]):
        model(ids[1:])
        yield acts.resid

    @captures(one(Float[Tensor, "batch pos d_model"]))
    async def later(model, ids: Int[Tensor, "batch pos"]) -> int:
        model(ids[1:])
        return 3

    assert [resid.shape for resid in steps(gpt2, ids)] == [(2, 32)]
    with pytest.raises(TypedError, match="batch is 2 here, but 3 in the argument 'ids' of later"):
        asyncio.run(later(gpt2, ids))


def test_a_decorated_function_without_a_schema_is_left_alone(gpt2, ids):
    @captures("blocks.0.hook_resid_post")
    def run(model, ids: Float[Tensor, "batch d_model"]) -> Int[Tensor, "pos"]:
        return model(ids)

    logits, _ = run(gpt2, ids)
    assert logits.shape == (3, 7, 50)
