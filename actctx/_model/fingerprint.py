"""A fingerprint of a model's weights, so that data of two models are not mixed.

# NOTE [What it covers]
For every parameter: its name, shape and dtype, the sum of its bits as integers, and a few of its
elements in their places. Integers sum up alike on every device and in every order, and as fast as
memory is read. A change of any one element changes it, and so does another dtype. It tells models
apart that differ by accident; somebody who wants two models to look alike can manage it.

Buffers are left out: some, such as rotary frequencies, are made anew by each device, a little
different. A model that was compiled, or in parts, has the fingerprint that it had before.
"""

import hashlib
from importlib.metadata import PackageNotFoundError, version

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from actctx._model.offloaded import weights_of
from actctx._model.places import uncompiled

_SAMPLED = 16
_COMPILED = "_orig_mod."
"""What `torch.compile` puts before the names of a module that it wraps."""
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

ANEW = (
    "a model of which a part is initialised at random when it is loaded, such as a head that was "
    "not saved, is another each time, so call torch.manual_seed() before loading it; a model in "
    "another dtype is another, too"
)
"""What to do where a model is the same and its fingerprint is not."""


def describe_model(model: nn.Module) -> dict[str, str]:
    """Return what a data set says of the model: its name, its class, its fingerprint."""
    model = uncompiled(model)
    configs = [getattr(model, name, None) for name in ("cfg", "config")]
    names = [
        getattr(config, name, None)
        for config in configs
        for name in ("model_name", "_name_or_path")
    ]
    name = next((name for name in names if isinstance(name, str) and name), "")
    return {"name": name, "class": type(model).__name__, "fingerprint": fingerprint(model)}


def fingerprint(model: nn.Module) -> str:
    """Digest the weights of a model; see the note above.

    Raises:
        OptionError: It has none, as on the meta device.

    """
    digest = hashlib.sha256()
    for name, weights in weights_of(model):
        facts = f"{name.replace(_COMPILED, '')} {tuple(weights.shape)} {weights.dtype}"
        digest.update(f"{facts} {_bits(weights)}\n".encode())
    return digest.hexdigest()[:16]


def _bits(weights: Shaped[Tensor, "..."]) -> list[int]:
    flat = weights.contiguous().reshape(-1)
    if not flat.numel():
        return []
    words = torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat
    words = words.view(_WORDS[words.element_size()])
    places = torch.linspace(0, len(words) - 1, _SAMPLED, dtype=torch.float64).long()
    sampled = words[places.to(words.device)].long()
    return torch.cat([_sum(words), sampled]).tolist()


def _sum(words: Shaped[Tensor, " _"]) -> Shaped[Tensor, " 1"]:
    """Sum up integers, in wider ones where they divide evenly; an overflow wraps around."""
    per_long = 8 // words.element_size()
    if len(words) % per_long == 0:
        aligned = words.storage_offset() % per_long == 0
        words = (words if aligned else words.clone()).view(torch.int64)
    return words.sum(dtype=torch.int64).reshape(1)


def versions() -> dict[str, str]:
    """Return the versions of what a data set depends on."""
    found = {}
    for package in ("actctx", "torch", "transformer_lens", "transformers", "pylance"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
