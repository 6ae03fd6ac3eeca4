"""Sites with one row for each token, such as routers: refused with the axes that divide them."""

import pytest
import torch
import transformers
from models import VOCAB, tokens

from actctx import AxisError, Site, capture

NAME = "model.layers.0.mlp.gate"
MASK = torch.arange(7) < torch.tensor([5, 2, 7])[:, None]
REMEDY = "if it has one row for each token, in order, give Site(axes='batch pos _')"


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = transformers.Cohere2MoeConfig(
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=VOCAB,
        num_experts=6,
        num_experts_per_tok=2,
        pad_token_id=0,
    )
    return transformers.Cohere2MoeForCausalLM(config).eval()


def routed(model, **given):
    kept = []
    gate = model.get_submodule(NAME)
    handle = gate.register_forward_hook(lambda *args: kept.append(args[2][0]))
    with torch.no_grad():
        model(**given)
    handle.remove()
    return kept[0].reshape(3, 7, -1)


def test_the_remedy_for_a_mask_keeps_the_rows_of_tokens(model):
    given = {"input_ids": tokens(3), "attention_mask": MASK.long()}
    with (
        pytest.raises(AxisError) as refused,
        capture(model, NAME, mask="attention"),
    ):
        model(**given)
    assert str(refused.value) == (
        f"mask= keeps real tokens, but {NAME!r} has no axis 'batch': its axes are 'token _'; "
        f"{REMEDY}, else capture it without mask="
    )
    with capture(model, Site(NAME, axes="batch pos _"), mask="attention") as acts:
        model(**given)
    assert torch.equal(acts.tensor, routed(model, **given)[MASK])


def test_the_remedy_for_a_slice_selects_positions(model):
    with pytest.raises(AxisError) as refused, capture(model, NAME, slice={"pos": -1}):
        model(tokens(3))
    assert str(refused.value) == (
        f"{NAME!r} has no axis 'pos'; its axes are 'token _'; {REMEDY}, else select by position "
        "with a tuple"
    )
    with capture(model, Site(NAME, axes="batch pos _", slice={"pos": -1})) as acts:
        model(tokens(3))
    assert torch.equal(acts.tensor, routed(model, input_ids=tokens(3))[:, -1])
