"""Masks that tell who attends to whom: which tokens are padding by them, and where they hide it."""

import pytest
import torch
import transformers
from models import VOCAB, huggingface, tokens
from torch import nn

from actctx import OptionError, capture

POS = 6
CAUSAL, ALL = torch.ones(POS, POS).tril().bool(), torch.ones(POS, POS).bool()
ITSELF = torch.eye(POS).bool()
_ORDER = {"causal": CAUSAL, "both ways": ALL}
REFUSED = r"the forward's mask of four axes does not say which tokens are padding"


class Own(nn.Module):
    """A custom model that is given a mask for the capture alone."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.layer = nn.Embedding(VOCAB, 8), nn.Linear(8, 8)

    def forward(self, input_ids, attention_mask):
        del attention_mask
        return self.layer(self.embed(input_ids))


def keys(side, count):
    real = torch.arange(POS) < count
    return real.flip(0) if side == "left" else real


def kept(sees):
    model = Own()
    with capture(model, "layer", mask="attention") as acts:
        model(tokens(1, sees.shape[-2]), sees[None, None])
    return acts.positions("layer")[:, 1].tolist()


@pytest.mark.parametrize("order", _ORDER)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("count", range(1, POS + 1))
def test_padding_that_nobody_attends_to_is_padding(order, side, count):
    real = keys(side, count)
    by_keys = _ORDER[order] & real
    both = by_keys & real[:, None]
    wanted = real.nonzero().flatten().tolist()
    assert kept(by_keys) == wanted
    assert kept(both) == wanted
    added = torch.zeros(both.shape).masked_fill(~both, torch.finfo(torch.float32).min)
    assert kept(added) == wanted


@pytest.mark.parametrize("order", _ORDER)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("count", range(1, POS - 1))
def test_padding_to_which_all_keys_are_opened_is_padding_on_either_side(order, side, count):
    real = keys(side, count)
    sees = _ORDER[order] & real & real[:, None]
    assert kept(sees | ~sees.any(1, keepdim=True)) == real.nonzero().flatten().tolist()


@pytest.mark.parametrize("order", _ORDER)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("count", range(1, POS - 1))
@pytest.mark.parametrize("attends", [True, False])
def test_padding_that_attends_to_itself_is_refused(order, side, count, attends):
    real = keys(side, count)
    sees = _ORDER[order] & real
    if not attends:
        sees = sees & real[:, None]
    with pytest.raises(OptionError, match=REFUSED):
        kept(sees | ITSELF)


@pytest.mark.parametrize(
    "sees",
    [
        CAUSAL,
        ALL,
        CAUSAL & ~ALL.tril(-2),
        CAUSAL & ~ALL.tril(-4),
        torch.block_diag(torch.ones(3, 3), torch.ones(3, 3)).bool() & CAUSAL,
        torch.block_diag(torch.ones(4, 4), torch.ones(2, 2)).bool(),
        CAUSAL | (torch.arange(POS) < 3) & (torch.arange(POS) < 3)[:, None],
        ALL[:1, :1],
    ],
    ids=["causal", "both ways", "window", "wide", "packed", "packed both ways", "prefix", "one"],
)
def test_masks_without_padding_keep_all_tokens(sees):
    assert kept(sees) == list(range(len(sees)))


def test_the_refusal_says_what_to_give():
    with pytest.raises(OptionError) as refused:
        kept(ITSELF)
    assert str(refused.value) == (
        "the forward's mask of four axes does not say which tokens are padding: some attend to "
        "themselves, but no other attends to them; pass the mask to capture, of the shape batch pos"
    )


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_masks_of_four_axes_behind_a_cache_keep_all_that_is_run(cache):
    model = huggingface("LlamaForCausalLM")
    ids = tokens(2)
    with torch.no_grad():
        whole = model(ids, output_hidden_states=True).hidden_states[2]
    is_static, past, rows = cache == "static", None, []
    if is_static:
        past = transformers.StaticCache(config=model.config, max_cache_len=12)
    for begin, end in ((0, 4), (4, 6), (6, 7)):
        sees = torch.arange(12 if is_static else end)
        sees = (sees <= torch.arange(begin, end)[:, None]).expand(2, 1, -1, -1)
        added = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)
        with capture(model.model, "layers.1", mask="attention") as acts:
            past = model.model(
                ids[:, begin:end], attention_mask=added, past_key_values=past, use_cache=True
            ).past_key_values
        rows.append(acts["layers.1"].reshape(2, -1, 32))
        assert acts.positions("layers.1")[:, 1].unique().tolist() == list(range(begin, end))
    normed = model.model.norm(torch.cat(rows, 1))
    torch.testing.assert_close(normed, whole, atol=1e-5, rtol=1e-5)
