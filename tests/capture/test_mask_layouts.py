"""Masks and sites that are laid out in other ways: `pos batch`, added to scores, frames."""

import warnings

import pytest
import torch
import transformers
from configs import PROPHET, SIZES, SPEECH, TWO_SIDED
from masked import LEFT, LENGTHS, RIGHT, opened
from models import VOCAB, hooked, huggingface, tokens
from torch import nn

from actctx import OptionError, SelectionError, Site, capture
from actctx.dataset import ActivationDataset
from actctx.extract import extract

_LOWEST = torch.finfo(torch.float32).min


def _captured(model, name, *args, at=None, mask=None, **kwargs):
    """Run a forward under a capture, and return its buffer and what it warned of."""
    return opened(model, name, slice=at, mask=mask)(*args, **kwargs)


# Sites whose positions come before their sequences, as in torch's own layers.


class _PositionsFirst(nn.Module):
    """A custom model of torch's layers, as they are by default: `pos batch d_model`."""

    def __init__(self, layer):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, 8)
        self.layer = layer(8)

    def forward(self, ids, attention_mask=None):  # noqa: ARG002
        hidden = self.layer(self.embed(ids).transpose(0, 1))
        return (hidden[0] if isinstance(hidden, tuple) else hidden).transpose(0, 1)


def _attending(size):
    return nn.TransformerEncoderLayer(size, 2, 16, dropout=0.0)


LAYERS = [_attending, lambda size: nn.LSTM(size, size), lambda size: nn.Linear(size, size)]


@pytest.mark.parametrize("mask", [RIGHT, LEFT])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_mask_keeps_real_tokens_of_a_site_whose_positions_come_first(layer, mask):
    model, ids = _PositionsFirst(layer).eval(), tokens(3, 7)
    whole = hooked(model, "layer", ids, mask).transpose(0, 1)
    acts, _ = _captured(model, "layer", ids, mask, mask="attention")
    assert acts.axes("layer") == ("token", "_")
    assert torch.equal(acts.tensor, whole[mask.bool()])
    assert acts.positions("layer").tolist() == mask.nonzero().tolist()


@pytest.mark.parametrize("mask", [RIGHT, LEFT])
def test_the_last_real_tokens_of_a_site_whose_positions_come_first(mask):
    model, ids = _PositionsFirst(_attending).eval(), tokens(3, 7)
    whole = hooked(model, "layer", ids, mask).transpose(0, 1)
    acts, _ = _captured(model, "layer", ids, mask, at={"pos": -1}, mask="attention")
    last = [int(row.nonzero().max()) for row in mask]
    assert acts.axes("layer") == ("batch", "_")
    assert torch.equal(acts.tensor, whole[torch.arange(3), last])


def test_slices_along_other_axes_of_a_site_whose_positions_come_first():
    site = Site("layer", axes="pos batch d_model", slice={"d_model": 3, "pos": [0, -1]})
    model, ids = _PositionsFirst(_attending).eval(), tokens(3, 7)
    whole = hooked(model, "layer", ids).transpose(0, 1)
    acts, _ = _captured(model, site, ids, RIGHT, mask="attention")
    places = [(row, column) for row, n in enumerate(LENGTHS) for column in (0, n - 1)]
    assert torch.equal(acts.tensor, torch.stack([whole[place][3] for place in places]))


def test_a_slice_that_takes_padding_of_a_site_whose_positions_come_first_is_told_of():
    model, ids = _PositionsFirst(_attending).eval(), tokens(3, 7)
    for mask, count in [(RIGHT, 1), (torch.ones_like(RIGHT), 0)]:
        _, said = _captured(model, "layer", ids, mask, at={"pos": -1})
        assert len(said) == count


def test_a_data_set_of_a_site_whose_positions_come_first(tmp_path):
    model = _PositionsFirst(lambda size: nn.LSTM(size, size)).eval()
    texts = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
    extract(model, texts, "layer", tmp_path / "acts", batch_size=2, progress=False)
    rows = ActivationDataset(tmp_path / "acts")[:]
    for number, text in enumerate(texts):
        alone = hooked(model, "layer", torch.tensor([text]))[:, 0]
        assert torch.allclose(rows["layer"][rows["sequence"] == number], alone, atol=1e-6)


# Masks that are added to attention scores.


class _Plain(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.layer = nn.Embedding(VOCAB, 8), nn.Linear(8, 8)

    def forward(self, ids, attention_mask=None):  # noqa: ARG002
        return self.layer(self.embed(ids))


@pytest.mark.parametrize("lowest", [_LOWEST, -torch.inf, -1e4])
def test_a_mask_that_is_added_to_scores_is_0_for_real_tokens(lowest):
    model, ids = _Plain(), tokens(3, 7)
    for real in (RIGHT, torch.ones_like(RIGHT)):
        added = torch.zeros(3, 7).masked_fill(real == 0, lowest)
        acts, _ = _captured(model, "layer", ids, added, mask="attention")
        assert acts.positions("layer").tolist() == real.nonzero().tolist()
        _, said = _captured(model, "layer", ids, added, at={"pos": -1})
        assert len(said) == int(real is RIGHT)


def test_a_mask_of_ones_and_zeros_may_be_of_floats():
    acts, _ = _captured(_Plain(), "layer", tokens(3, 7), RIGHT.half(), mask="attention")
    assert acts.positions("layer").tolist() == RIGHT.nonzero().tolist()


def test_a_mask_of_ones_own_that_would_be_added_to_scores_is_refused():
    with pytest.raises(OptionError) as refused:
        capture(_Plain(), "layer", mask=torch.tensor([[0.0, -1e4]]))
    assert str(refused.value) == (
        "the mask has negative values, like a mask that is added to attention scores; give one "
        "that is true where there are real tokens, such as mask == 0"
    )


@pytest.mark.parametrize("as_bool", [True, False])
def test_padding_to_which_a_mask_of_four_axes_opens_all_keys_is_padding(as_bool):
    model, ids = _Plain(), tokens(3, 7)
    sees = torch.ones(7, 7).tril().bool() & LEFT[:, None, None].bool()
    opened = sees | ~sees.any(-1, keepdim=True)
    given = opened if as_bool else torch.zeros(opened.shape).masked_fill(~opened, _LOWEST)
    acts, _ = _captured(model, "layer", ids, given, mask="attention")
    assert acts.positions("layer").tolist() == LEFT.nonzero().tolist()


def test_tokens_that_see_all_others_are_real_if_others_see_them():
    model, ids = _Plain(), tokens(1, 7)
    near = (torch.arange(7)[:, None] - torch.arange(7)).abs() < 2
    near[0], near[:, 0] = True, True  # as a global token, beside a window
    acts, _ = _captured(model, "layer", ids, near[None, None], mask="attention")
    assert len(acts.tensor) == 7


# Sound that is sliced without a mask.


def _parakeet():
    config = transformers.ParakeetEncoderConfig(
        **SIZES,
        vocab_size=VOCAB,
        num_key_value_heads=4,
        num_mel_bins=16,
        subsampling_conv_channels=8,
    )
    return transformers.ParakeetEncoder(config)


def _moonshine():
    config = transformers.MoonshineConfig(
        hidden_size=32,
        intermediate_size=64,
        encoder_num_hidden_layers=1,
        decoder_num_hidden_layers=1,
        encoder_num_attention_heads=4,
        decoder_num_attention_heads=4,
        vocab_size=VOCAB,
    )
    return transformers.MoonshineModel(config)


# A model, a site of frames, one of its sound, and how long that is.
_MODELS = {
    "UniSpeech": (
        lambda: transformers.UniSpeechModel(transformers.UniSpeechConfig(**SPEECH)),
        ("encoder.layers.1", "feature_extractor.conv_layers.0"),
        (3, 1000),
    ),
    "Parakeet": (_parakeet, ("layers.1", "subsampling.layers.0"), (3, 96, 16)),
    "Moonshine": (_moonshine, ("encoder.layers.0", "encoder.conv1"), (3, 9000)),
}


@pytest.mark.parametrize("kind", _MODELS)
def test_a_slice_that_takes_padding_of_sound_is_told_of(kind):
    make, names, shape = _MODELS[kind]
    torch.manual_seed(0)
    model, sound = make().eval(), torch.randn(shape)
    mask = torch.ones(shape[:2]).long()
    padded = mask.clone()
    padded[1, shape[1] // 2 :] = 0
    given = {"decoder_input_ids": tokens(3, 4)} if kind == "Moonshine" else {}
    for name in names:
        for chosen, real, count in [(-1, padded, 1), (0, padded, 0), (-1, mask, 0)]:
            _, said = _captured(
                model, name, sound, attention_mask=real, at={"pos": chosen}, **given
            )
            assert [each[:35] for each in said] == ["a slice along 'pos' selects padding"] * count


def test_frames_that_a_model_calls_subsampled_are_counted_as_it_counts_them():
    torch.manual_seed(0)
    model, lengths = _parakeet().eval(), [96, 60, 33]
    mask = torch.tensor([[i < n for i in range(96)] for n in lengths]).long()
    sound = torch.randn(3, 96, 16)
    acts, _ = _captured(model, "layers.1", sound, attention_mask=mask, mask="attention")
    whole = hooked(model, "layers.1", sound, attention_mask=mask)
    frames = model._get_subsampling_output_length(torch.tensor(lengths)).tolist()
    assert torch.equal(acts.tensor, torch.cat([whole[i, :n] for i, n in enumerate(frames)]))


# Encoders that are called by themselves.


@pytest.mark.parametrize("by_generate", [True, False])
@pytest.mark.parametrize(("kind", "counts"), [("Pegasus", True), ("T5", False)])
def test_left_padding_that_an_encoder_counts_by_itself_is_told_of(kind, counts, by_generate):
    model, name = _two_sided(kind)
    ids = tokens(3, 7)
    for mask, count in [(LEFT, int(counts)), (RIGHT, 0)]:
        given = ids * mask
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with capture(model, name, mask="attention"):
                if by_generate:
                    model.generate(given, attention_mask=mask, max_new_tokens=2, do_sample=False)
                else:
                    encoded = model.get_encoder()(given, mask)
                    model(
                        encoder_outputs=encoded,
                        attention_mask=mask,
                        decoder_input_ids=ids,
                        decoder_attention_mask=torch.ones_like(ids),
                    )
        assert len([each for each in caught if "padded on the left" in str(each.message)]) == count


def _two_sided(kind):
    if kind == "T5":
        return huggingface("T5ForConditionalGeneration"), "decoder.block.1"
    config = transformers.PegasusConfig(**TWO_SIDED, max_position_embeddings=64)
    torch.manual_seed(0)
    return transformers.PegasusForConditionalGeneration(config).eval(), "model.decoder.layers.1"


class _Bare(nn.Module):
    """A custom model with a table of positions that is a parameter or a buffer."""

    def __init__(self, *, name, is_buffer, turns=False):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.layer = nn.Embedding(VOCAB, 8), nn.Linear(8, 8)
        self.name, table = name, torch.randn(1, 16, 4 if turns else 8)
        if is_buffer:
            self.register_buffer(name, table)
        else:
            self.register_parameter(name, nn.Parameter(table))

    def forward(self, ids, attention_mask=None):  # noqa: ARG002
        table = getattr(self, self.name)[:, : ids.shape[1]]
        return self.layer(self.embed(ids) + torch.cat([table] * (8 // table.shape[-1]), -1))


@pytest.mark.parametrize(
    ("name", "options", "counts"),
    [
        ("pos_emb", {"is_buffer": False}, 1),
        ("position_embeddings", {"is_buffer": False}, 1),
        ("pe", {"is_buffer": True}, 1),
        ("W_pos", {"is_buffer": False}, 1),
        ("embed_positions", {"is_buffer": False}, 1),
        ("sin_table", {"is_buffer": True}, 1),
        ("timing_signal", {"is_buffer": True}, 1),
        ("relative_positions", {"is_buffer": False}, 0),
        ("embed", {"is_buffer": False}, 0),
        ("pos_emb", {"is_buffer": True, "turns": True}, 0),  # as wide as a part of a head
    ],
)
def test_left_padding_is_told_of_where_a_table_of_positions_is_no_module(name, options, counts):
    model = _Plain() if name == "embed" else _Bare(name=name, **options)
    ids = tokens(3, 7)
    for mask, count in [(LEFT, counts), (RIGHT, 0)]:
        _, said = _captured(model, "layer", ids, mask, mask="attention")
        assert len(said) == count


class _Read(nn.Module):
    """A custom model that reads the weight of its table of positions."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.wpe, self.layer = (
            nn.Embedding(VOCAB, 8),
            nn.Embedding(16, 8),
            nn.Linear(8, 8),
        )

    def forward(self, ids, attention_mask=None):  # noqa: ARG002
        return self.layer(self.embed(ids) + self.wpe.weight[: ids.shape[1]])


@pytest.mark.parametrize(("mask", "count"), [(LEFT, 1), (RIGHT, 0)])
def test_left_padding_is_told_of_where_the_weight_of_a_table_is_read(mask, count):
    _, said = _captured(_Read(), "layer", tokens(3, 7), mask, mask="attention")
    assert len(said) == count


def test_what_fires_once_for_all_sequences_of_generate_is_refused():
    config = transformers.ProphetNetConfig(**PROPHET, max_position_embeddings=64)
    torch.manual_seed(0)
    model = transformers.ProphetNetForConditionalGeneration(config).eval()
    name, greedy = "prophetnet.decoder.position_embeddings", {"do_sample": False}
    with (
        pytest.raises(SelectionError, match="fired once for all 3 sequences"),
        capture(model, name, mask="attention"),
    ):
        model.generate(tokens(3, 7), max_new_tokens=3, min_new_tokens=3, **greedy)
