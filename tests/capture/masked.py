"""Masks, and forwards that they are tried on."""

import warnings

import torch

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


# Encoder and decoder.
OTHER = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [1] * 7, [1, 1, 1, 1, 1, 0, 0]])
