"""Masks that do not lie on a site as they are: caches, and sound."""

import pytest
import torch
import transformers
from configs import SIZES, SPEECH, TWO_SIDED, VISION
from masked import LAYER, LEFT, RIGHT
from models import VOCAB, hooked, tokens

from actctx import SelectionError, Site, capture

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
    expected = hooked(llama, "model.layers.1", ids)  # right padding changes nothing before it
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
    sizes = TWO_SIDED if kind == "LED" else {**SIZES, "vocab_size": VOCAB, "pad_token_id": 0}
    config = getattr(transformers, f"{kind}Config")(**sizes, attention_window=4)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}Model")(config).eval()
    name = "encoder.layers.0" if kind == "LED" else "encoder.layer.0"
    more = {"decoder_input_ids": ids} if kind == "LED" else {}
    with capture(model, Site(name, axes="batch pos d_model"), mask="attention") as acts:
        model(ids * RIGHT, attention_mask=RIGHT, **more)
    assert acts.positions(name).tolist() == RIGHT.nonzero().tolist()
    whole = hooked(model, name, ids * RIGHT, attention_mask=RIGHT, **more)
    assert whole.shape[1] == 8
    assert torch.equal(acts.tensor, whole[:, :7][RIGHT.bool()])


# Sound: a mask of samples, and sites of frames.


@pytest.mark.parametrize("kind", ["Wav2Vec2", "Hubert", "UniSpeech"])
def test_frames_are_counted_as_the_model_counts_them(kind):
    config = getattr(transformers, f"{kind}Config")(**SPEECH)
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
    whole = hooked(model, "encoder.layers.1", sound, attention_mask=mask)
    assert torch.equal(acts.tensor, torch.cat([whole[i, :n] for i, n in enumerate(frames)]))


def test_frames_before_the_last_convolution_are_refused():
    torch.manual_seed(0)
    model = transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(**SPEECH)).eval()
    site = Site("feature_extractor.conv_layers.0", axes="batch channel pos")
    with (
        pytest.raises(SelectionError, match="199 positions, but the forward's mask has 1000"),
        capture(model, site, mask="attention"),
    ):
        model(torch.randn(3, 1000), attention_mask=torch.ones(3, 1000).long())


def test_frames_of_whisper_are_counted_as_it_counts_them():
    config = transformers.WhisperConfig(
        **TWO_SIDED, num_mel_bins=8, max_source_positions=10, max_target_positions=16
    )
    torch.manual_seed(0)
    model = transformers.WhisperForConditionalGeneration(config).eval()
    mask = torch.tensor([[i < n for i in range(20)] for n in (20, 11)]).long()
    site = Site("model.encoder.layers.1", axes="batch pos d_model")
    with capture(model, site, mask="attention") as acts:
        model(torch.randn(2, 8, 20), attention_mask=mask, decoder_input_ids=torch.ones(2, 3).long())
    assert acts.positions("model.encoder.layers.1")[:, 0].bincount().tolist() == [10, 6]


def test_a_tower_for_pictures_is_not_masked_by_the_mask_of_tokens():
    text = {**SIZES, "vocab_size": VOCAB, "max_position_embeddings": 16}
    config = transformers.CLIPConfig(
        text_config={**text, "eos_token_id": 2}, vision_config=VISION, projection_dim=16
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


def test_a_tower_with_as_many_patches_as_there_are_tokens_is_refused():
    config = transformers.GitConfig(vision_config=VISION, vocab_size=VOCAB, **SIZES)
    torch.manual_seed(0)
    model = transformers.GitForCausalLM(config).eval()
    mask = torch.tensor([[1, 1, 1, 0, 0], [1] * 5])
    tower = "git.image_encoder.vision_model.encoder.layers.0"
    with (
        pytest.raises(SelectionError, match="runs on images or sound"),
        capture(model, tower, mask="attention"),
    ):
        model(tokens(2, 5), attention_mask=mask, pixel_values=torch.randn(2, 3, 16, 16))
