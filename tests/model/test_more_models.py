"""Axes and sides of models that take other inputs than token ids of one kind."""

import pytest
import torch
import transformers
from models import VOCAB, tokens
from torch import nn

from actctx import ActctxError, OptionError, SelectionError, Site, capture

_VISION = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "projection_dim": 24,
}
_STAGES = {
    "hidden_sizes": [8, 12, 16, 24],
    "num_attention_heads": [1, 2, 2, 4],
    "depths": [1, 1, 1, 1],
    "decoder_hidden_size": 16,
}


def _hooked(model, name, **given):
    kept = []
    handle = model.get_submodule(name).register_forward_hook(lambda _m, _a, out: kept.append(out))
    with torch.no_grad():
        model(**given)
    handle.remove()
    return kept[0][0] if isinstance(kept[0], tuple) else kept[0]


def _clip():
    # As many patches as the image is high, as with 256 pixels and patches of 16.
    config = transformers.CLIPVisionConfig(**_VISION, image_size=16, patch_size=4)
    return transformers.CLIPVisionModel(config), "encoder.layers.0", (3, 16, 16)


def _segformer():
    model = transformers.SegformerModel(transformers.SegformerConfig(**_STAGES))
    return model, "stages.0.blocks.0", (3, 32, 64)


@pytest.mark.parametrize("make", [_clip, _segformer])
def test_patches_are_positions_whatever_the_size_of_the_image(make):
    torch.manual_seed(0)
    model, name, shape = make()
    name = next(each for each, _ in model.named_modules() if each.endswith(name))
    given = {"pixel_values": torch.randn(3, *shape)}
    whole = _hooked(model.eval(), name, **given)
    with capture(model, name, slice={"pos": [0, -1]}) as acts:
        model(**given)
    assert acts.axes(name) == ("batch", "pos", "_")
    assert torch.equal(acts.tensor, whole[:, [0, -1]])


class _Custom(nn.Module):
    """A custom model with an encoder and a decoder, whose names only partly tell them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(VOCAB, 8), nn.Linear(8, VOCAB)
        self.reads = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.writes = nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

    def forward(
        self, input_ids, decoder_input_ids, attention_mask=None, decoder_attention_mask=None
    ):
        del decoder_attention_mask  # for the capture alone
        padding = None if attention_mask is None else attention_mask == 0
        memory = self.reads(self.embed(input_ids), src_key_padding_mask=padding)
        written = self.writes(
            self.embed(decoder_input_ids), memory, memory_key_padding_mask=padding
        )
        return self.head(written)


_SOURCE = torch.tensor([[i < n for i in range(7)] for n in (4, 7, 2)]).long()
_TARGET = torch.tensor([[i < n for i in range(7)] for n in (6, 1, 3)]).long()


@pytest.mark.parametrize(
    ("name", "mask"), [("reads", _SOURCE), ("writes", _TARGET), ("head", _TARGET)]
)
def test_sides_of_a_custom_model_are_told_by_whose_positions_they_grow_with(name, mask):
    model = _Custom().eval()
    given = {"input_ids": tokens(3, 7), "decoder_input_ids": tokens(3, 7, seed=1)}
    masks = {"attention_mask": _SOURCE, "decoder_attention_mask": _TARGET}
    with capture(model, name, mask="attention") as acts:
        model(**given, **masks)
    assert acts.positions(name).tolist() == mask.nonzero().tolist()
    assert torch.allclose(acts.tensor, _hooked(model, name, **given, **masks)[mask.bool()])


@pytest.mark.parametrize("name", ["writes", "head"])
def test_a_decoder_of_a_custom_model_is_not_masked_by_the_mask_of_its_encoder(name):
    model = _Custom().eval()
    with (
        pytest.raises((OptionError, SelectionError), match="decoder_attention_mask"),
        capture(model, name, mask="attention"),
    ):
        model(tokens(3, 7), tokens(3, 7), attention_mask=_SOURCE)


def test_a_target_by_another_name_is_not_masked_by_the_mask_of_the_source():
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.decoder = nn.Embedding(VOCAB, 8), nn.Linear(8, 8)

        def forward(self, src, tgt, attention_mask):
            hidden = self.embed(src) * attention_mask[..., None]
            return self.decoder(self.embed(tgt)) + hidden.mean(1, keepdim=True)

    site = Site("decoder", axes="batch pos d_model")
    model = Other()
    with (
        pytest.raises(OptionError, match="decoder_attention_mask"),
        capture(model, site, mask="attention"),
    ):
        model(tokens(3, 7), tokens(3, 7), _SOURCE)


class _Packed(nn.Module):
    """A custom model that packs its sequences, whose lengths are values."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.rnn = nn.Embedding(VOCAB, 8), nn.LSTM(8, 6, batch_first=True)
        self.head = nn.Linear(6, 5)

    def forward(self, ids, attention_mask):
        lengths = attention_mask.sum(1)
        packed = nn.utils.rnn.pack_padded_sequence(
            self.embed(ids), lengths, batch_first=True, enforce_sorted=False
        )
        hidden, _ = nn.utils.rnn.pad_packed_sequence(
            self.rnn(packed)[0], batch_first=True, total_length=ids.shape[1]
        )
        return self.head(hidden)


def test_positions_behind_packed_sequences_are_told():
    model, ids = _Packed().eval(), tokens(3, 7)
    whole = _hooked(model, "head", ids=ids, attention_mask=_SOURCE)
    with capture(model, "head", mask="attention", slice={"pos": -1}) as acts:
        model(ids, _SOURCE)
    assert torch.equal(acts.tensor, whole[torch.arange(3), _SOURCE.sum(1) - 1])


def test_rows_of_packed_sequences_are_not_taken_for_positions():
    model, ids = _Packed().eval(), tokens(3, 7)
    for options in ({"slice": {"pos": -1}}, {"mask": "attention"}):
        with pytest.raises(ActctxError), capture(model, "rnn", **options):
            model(ids, _SOURCE)
