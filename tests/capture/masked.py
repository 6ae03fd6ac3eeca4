"""Masks, and forwards that they are tried on."""

import warnings

import torch
import transformers
from models import VOCAB

from actctx import Site, capture

LENGTHS = (4, 7, 2)
RIGHT = torch.tensor([[i < n for i in range(7)] for n in LENGTHS]).long()
LEFT = RIGHT.flip(1)


def opened(model, names, **options):
    """Run a forward under a capture, and give back its buffer and what was warned of."""

    def run(*args, **kwargs):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with capture(model, names, **options) as acts:
                model(*args, **kwargs)
        return acts, [str(each.message) for each in caught]

    return run


LAYER = Site("model.layers.1", axes="batch pos d_model")


TWO_SIDED = {
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


def bart():
    config = transformers.BartConfig(**TWO_SIDED, max_position_embeddings=64)
    config.architectures = ["BartForConditionalGeneration"]
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    return transformers.BartForConditionalGeneration(config).eval()


# Encoder and decoder.
OTHER = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [1] * 7, [1, 1, 1, 1, 1, 0, 0]])
