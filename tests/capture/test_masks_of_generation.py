"""Masks over several forwards: which sequences a forward continues, and `generate`."""

import copy
import inspect
import warnings

import pytest
import torch
import transformers
from configs import PROPHET, SPECIAL, TWO_SIDED
from masked import LAYER, LEFT, RIGHT
from models import GENERATION, OLD_CACHE, VOCAB, bart, hooked, huggingface, tokens
from torch import nn

from actctx import NeverFiredError, OptionError, SelectionError, Site, capture

GREEDY = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}


# Which sequences a forward continues.


class Stateful(nn.Module):
    """A module with an argument that is called as caches are, and is none that can be followed."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 8)

    def forward(self, input_ids, attention_mask=None, state=None):  # noqa: ARG002
        return self.embed(input_ids)


@pytest.mark.parametrize("state", [3, "warm", (), [None], {}, {"memory": torch.ones(2)}], ids=str)
def test_what_is_only_called_a_cache_breaks_no_forward(state, ids):
    torch.manual_seed(0)
    model, mask = Stateful().eval(), torch.ones_like(ids)
    with capture(model, "embed", mask="attention") as acts:
        for _ in range(2):
            model(ids, attention_mask=mask, state=state)
    assert acts.positions("embed").tolist() == [[row, pos] for row in range(6) for pos in range(7)]


@pytest.mark.parametrize("state", [3, "warm", (), {}], ids=str)
def test_an_empty_cache_does_not_count_as_one_that_is_continued(state, ids):
    model = Stateful().eval()
    with capture(model, "embed", join="pos") as acts:
        for _ in range(2):
            model(ids, state=state)
    assert acts.tensor.shape == (3, 14, 8)


def test_masks_without_values_are_refused_and_warn_of_nothing(ids):
    ids = ids.to("meta")
    model, mask = Stateful().to("meta"), torch.ones_like(ids)
    with capture(model, "embed", slice={"pos": -1}) as acts:
        model(ids, attention_mask=mask)
    assert acts.tensor.shape == (3, 8)
    with (
        pytest.raises(OptionError, match="the mask is on the meta device, so it does not say"),
        capture(model, "embed", mask="attention"),
    ):
        model(ids, attention_mask=mask)


def test_copies_of_one_prefix_are_sequences_of_their_own(llama):
    prefix = transformers.DynamicCache()
    with capture(llama, LAYER, mask="attention") as acts:
        with torch.no_grad():
            llama(tokens(1, 4), attention_mask=torch.ones(1, 4), past_key_values=prefix)
        acts.clear()
        for seed, length in enumerate((2, 3, 1)):
            cache = copy.deepcopy(prefix)
            given = tokens(1, length, seed=seed)
            llama(given, attention_mask=torch.ones(1, 4 + length), past_key_values=cache)
            llama(given[:, :1], attention_mask=torch.ones(1, 5 + length), past_key_values=cache)
    expected = [[i, 4 + j] for i, n in enumerate((2, 3, 1)) for j in range(n + 1)]
    assert acts.positions("model.layers.1").tolist() == expected


def test_forwards_of_several_caches_take_turns(llama):
    caches = [transformers.DynamicCache() for _ in range(2)]
    with capture(llama, LAYER, mask="attention") as acts:
        for step in range(3):
            for cache in caches:
                llama(tokens(2, 1), attention_mask=torch.ones(2, step + 1), past_key_values=cache)
    expected = [[row + 2 * i, step] for step in range(3) for i in range(2) for row in range(2)]
    assert acts.positions("model.layers.1").tolist() == expected


def test_a_cache_that_a_forward_returned_is_continued(llama, ids):
    with capture(llama, LAYER, mask="attention") as acts:
        for _ in range(2):
            cache = llama(ids, attention_mask=torch.ones(3, 7), use_cache=True).past_key_values
            llama(ids[:, :1], attention_mask=torch.ones(3, 8), past_key_values=cache)
    once = [[row, pos] for row in range(3) for pos in range(7)] + [[row, 7] for row in range(3)]
    assert acts.positions("model.layers.1").tolist() == once + [[r + 3, pos] for r, pos in once]


def test_a_cache_that_was_cut_back_begins_new_sequences(llama, ids):
    cache = transformers.DynamicCache()
    with capture(llama, LAYER, mask="attention") as acts:
        for tail in (5, 6):
            llama(
                ids[:1, cache.get_seq_length() : tail],
                past_key_values=cache,
                attention_mask=torch.ones(1, tail),
            )
            cache.crop(3 - tail)
    assert acts.positions("model.layers.1").tolist() == (
        [[0, pos] for pos in range(5)] + [[1, pos] for pos in range(3, 6)]
    )


@pytest.mark.skipif(not OLD_CACHE, reason="bridges lose the cache of this transformers")
@pytest.mark.skipif(GENERATION < 4, reason="bridges before 4 generate otherwise")
def test_generate_of_a_bridge_continues_its_prompt(gpt2, ids):
    resid = "blocks.1.hook_resid_post"
    mask = torch.ones(3, 7).long()
    with capture(gpt2, resid, mask="attention") as acts:
        gpt2.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=3,
            do_sample=False,
            stop_at_eos=False,
            verbose=False,
        )
    prompt = mask.nonzero().tolist()
    assert acts.positions(resid).tolist() == prompt + [[i, 7 + k] for k in (0, 1) for i in range(3)]


@pytest.mark.skipif(GENERATION != 3, reason="hooked models of TransformerLens 3 have such caches")
def test_a_mask_of_new_tokens_continues_what_the_cache_of_a_hooked_model_holds(ids):
    from models import hooked_config
    from transformer_lens import HookedTransformer
    from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

    model = HookedTransformer(hooked_config()).eval()
    name = "blocks.1.hook_resid_post"
    mask = torch.ones(3, 7).long()
    with capture(model, name, mask="attention") as acts:
        for _ in range(2):
            cache = TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", 3)
            for start, end in [(0, 4), (4, 7)]:
                model(ids[:, start:end], attention_mask=mask[:, start:end], past_kv_cache=cache)
    once = [[i, p] for s, e in [(0, 4), (4, 7)] for i in range(3) for p in range(s, e)]
    assert acts.positions(name).tolist() == once + [[i + 3, pos] for i, pos in once]


# generate().


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prefill_chunk_size": 3},
        {"cache_implementation": "static"},
        {"cache_implementation": "static", "prefill_chunk_size": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "architecture",
    ["LlamaForCausalLM", "GPT2LMHeadModel", "BloomForCausalLM", "Gemma2ForCausalLM"],
)
@pytest.mark.parametrize("mask", [LEFT, torch.ones(3, 7).long()], ids=["padded", "whole"])
def test_generate_keeps_each_real_token_once(architecture, options, mask, ids):
    model = huggingface(architecture)
    layer = next(n for n in ("model.layers.1", "transformer.h.1") if _has(model, n))
    site = Site(layer, axes="batch pos d_model")
    with capture(model, site, mask="attention") as acts:
        whole = model.generate(ids * mask, attention_mask=mask, **GREEDY, **options)
    full = torch.cat([mask, torch.ones(3, 2).long()], 1)
    where = acts.positions(layer)
    assert sorted(where.tolist()) == full.nonzero().tolist()
    given = {"attention_mask": full}
    if "position_ids" in inspect.signature(model.forward).parameters:
        given["position_ids"] = (full.cumsum(1) - 1).clamp(min=0)
    expected = hooked(model, layer, whole[:, :-1], **given)
    assert torch.allclose(acts.tensor, expected[tuple(where.T)], atol=1e-5)


@pytest.mark.parametrize("mask", [LEFT, torch.ones(3, 7).long()], ids=["padded", "whole"])
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}], ids=str)
def test_logits_of_generate_are_of_the_last_positions(llama, ids, mask, options):
    site = Site("lm_head", axes="batch pos d_vocab")
    with capture(llama, site, mask="attention") as acts:
        llama.generate(ids * mask, attention_mask=mask, **GREEDY, **options)
    expected = [[row, pos] for pos in (6, 7, 8) for row in range(3)]
    assert acts.positions("lm_head").tolist() == expected


@pytest.mark.parametrize(
    ("kind", "layer", "error"),
    [
        # one stream of positions for each token that it foresees
        ("ProphetNetForConditionalGeneration", "prophetnet.decoder.layers.1", SelectionError),
        # both append placeholders, and hand on no mask
        ("XLNetLMHeadModel", "transformer.layer.1", OptionError),
        ("XLMWithLMHeadModel", "transformer.attentions.1", OptionError),
    ],
)
def test_generate_of_what_runs_other_than_its_tokens_is_refused(kind, layer, error, ids):
    sizes = {**TWO_SIDED, **PROPHET}
    sizes |= {"n_layer": 2, "n_layers": 2, "n_head": 4, "n_heads": 4, "emb_dim": 32, "d_inner": 64}
    sizes |= {"n_words": VOCAB, "bos_index": 1, "eos_index": 2, "pad_index": 0, "unk_index": 3}
    kind = getattr(transformers, kind)
    known = inspect.signature(kind.config_class.__init__).parameters
    torch.manual_seed(0)
    model = kind(
        kind.config_class(**{name: size for name, size in sizes.items() if name in known})
    ).eval()
    site = Site(layer, axes="batch pos d_model")
    with pytest.raises(error), capture(model, site, mask="attention"):
        model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)


def _has(model, name):
    return name in dict(model.named_modules())


@pytest.mark.parametrize("mask", [LEFT, torch.ones(3, 7).long()], ids=["padded", "whole"])
def test_generate_of_a_recurrent_model_keeps_each_real_token_once(mask, ids):
    config = transformers.MambaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        state_size=4,
        num_hidden_layers=2,
        **SPECIAL,
    )
    torch.manual_seed(0)
    model = transformers.MambaForCausalLM(config).eval()
    site = Site("backbone.layers.1", axes="batch pos d_model")
    with capture(model, site, mask="attention") as acts:
        model.generate(ids * mask, attention_mask=mask, **GREEDY)
    full = torch.cat([mask, torch.ones(3, 2).long()], 1)
    assert sorted(acts.positions("backbone.layers.1").tolist()) == full.nonzero().tolist()


def test_generate_keeps_all_that_a_decoder_runs(ids):
    model, site = bart(), Site("model.decoder.layers.1", axes="batch pos d_model")
    with capture(
        model, [site, Site("lm_head", axes="batch pos d_vocab")], mask="attention"
    ) as acts:
        model.generate(ids, attention_mask=RIGHT, **GREEDY)
    expected = [[row, step] for step in range(3) for row in range(3)]
    assert acts.positions("model.decoder.layers.1").tolist() == expected
    assert acts.positions("lm_head").tolist() == expected


def test_sliding_windows_count_from_the_start(ids):
    model = huggingface("MistralForCausalLM", sliding_window=4)
    with capture(model, LAYER, mask="attention") as acts:
        model.generate(ids, attention_mask=LEFT, **GREEDY)
    full = torch.cat([LEFT, torch.ones(3, 2).long()], 1)
    assert sorted(acts.positions("model.layers.1").tolist()) == full.nonzero().tolist()


def test_guidance_runs_sequences_of_its_own(llama, ids):
    with capture(llama, LAYER, mask="attention") as acts:
        llama.generate(ids, attention_mask=torch.ones_like(ids), guidance_scale=1.5, **GREEDY)
    where = acts.positions("model.layers.1")
    guided = where[where[:, 0] < 3].tolist()
    assert sorted(guided) == [[row, pos] for row in range(3) for pos in range(9)]
    free = where[where[:, 0] >= 3].tolist()
    assert sorted(free) == [[row, pos] for row in range(3, 6) for pos in range(3)]


def test_tokens_that_generate_takes_back_are_told_of(llama):
    given = tokens(1, 4).repeat(1, 3)
    with pytest.warns(UserWarning, match="takes back wrong guesses") as caught:  # noqa: SIM117
        with capture(llama, LAYER, mask="attention") as acts:
            whole = llama.generate(
                given,
                max_new_tokens=8,
                min_new_tokens=8,
                do_sample=False,
                prompt_lookup_num_tokens=3,
            )
    assert len(caught) == 1
    where = acts.positions("model.layers.1").tolist()
    last = {tuple(place): row for place, row in zip(where, acts.tensor, strict=True)}
    expected = hooked(llama, "model.layers.1", whole[:, :-1])
    for (_, pos), row in last.items():
        if pos < whole.shape[1] - 1:
            assert torch.allclose(row, expected[0, pos], atol=1e-5)
    assert len(where) > whole.shape[1] - 1


@pytest.mark.parametrize("options", [{"guidance_scale": 1.5}, {"use_cache": False}], ids=str)
def test_forwards_that_do_not_continue_each_other_are_told_of_when_joined_by_position(
    llama, ids, options
):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with capture(llama, LAYER, join="pos"):
            llama.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY, **options)
    assert [str(each.message) for each in caught] == [
        "join='pos' joins a forward to one that it does not continue, so positions repeat or "
        "belong to other sequences, as with guidance, with assisted decoding, without a KV cache, "
        "or in a second generate(); capture with join=None for a list, or with mask='attention', "
        "where acts.positions() gives the sequence and position of each row"
    ]


def test_forwards_that_continue_each_other_join_by_position_in_silence(llama, ids):
    with capture(llama, LAYER, join="pos") as acts:
        for options in ({}, {"prefill_chunk_size": 3}, {"cache_implementation": "static"}):
            llama.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY, **options)
            assert acts.tensor.shape == (3, 9, 32)
            acts.clear()
        for part in ids.split(3, dim=1):  # no cache, and nobody says that there should be one
            llama(part)
    assert acts.tensor.shape == (3, 7, 32)


@pytest.mark.thorough
def test_generate_batch_is_said_to_run_elsewhere():
    if not hasattr(transformers.GenerationMixin, "generate_batch") and not hasattr(
        transformers.PreTrainedModel, "generate_batch"
    ):
        pytest.skip("this transformers has no generate_batch")
    model = huggingface("LlamaForCausalLM", attention="sdpa", bos_token_id=1, eos_token_id=2)
    options = transformers.GenerationConfig(
        max_new_tokens=2, eos_token_id=2, pad_token_id=0, do_sample=False
    )
    with pytest.raises(NeverFiredError) as caught, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with capture(model, "model.layers.*"):
            model.generate_batch(inputs=[[5, 6, 7], [8, 9]], generation_config=options)
    assert str(caught.value) == (
        "no forward of LlamaForCausalLM was captured: generate_batch() runs them in its own "
        "thread, and a capture only sees those of the thread that opened it; call generate(), or "
        "the model itself"
    )
