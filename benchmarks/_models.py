"""The models that are measured, and what they run on."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BRIDGE, PLAIN, NNSIGHT = "bridge", "plain", "nnsight"
"""A bridge, which computes attention eagerly; Hugging Face's model with sdpa; nnsight's of it."""


@dataclass(frozen=True)
class Setup:
    """The model, its input and how it runs. Shapes are those of GPT-2 small by default."""

    batch: int = 8
    tokens: int = 256
    layers: int = 12
    heads: int = 12
    d_model: int = 768
    vocab: int = 50257
    context: int = 1024
    threads: int = 2
    seed: int = 0
    device: str = "cpu"


def build(setup: Setup, kind: str = BRIDGE) -> Any:
    """Build a model with random weights: the same ones for each kind."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(setup.seed)
    config = GPT2Config(
        vocab_size=setup.vocab,
        n_positions=setup.context,
        n_embd=setup.d_model,
        n_layer=setup.layers,
        n_head=setup.heads,
    )
    config.architectures = ["GPT2LMHeadModel"]
    config._attn_implementation = "eager" if kind == BRIDGE else "sdpa"
    module = GPT2LMHeadModel(config).eval().to(setup.device)
    if kind == PLAIN:
        return module
    if kind == NNSIGHT:
        from nnsight import NNsight

        return NNsight(module)
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    return build_bridge_from_module(module, "GPT2LMHeadModel", hf_config=config)


def make_tokens(setup: Setup) -> Tensor:
    """Draw the tokens: the same ones for each model."""
    chance = torch.Generator().manual_seed(setup.seed)
    return torch.randint(setup.vocab, (setup.batch, setup.tokens), generator=chance).to(
        setup.device
    )
