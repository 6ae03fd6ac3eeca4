"""The measured models, and their inputs."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

BRIDGE, PLAIN, NNSIGHT, TORCHLENS, HOOKED = "bridge", "plain", "nnsight", "torchlens", "hooked"
"""A bridge, which computes attention eagerly; a Hugging Face model with sdpa, alone and for
libraries that wrap it; and TransformerLens' `HookedTransformer`, from before bridges."""

WITHOUT = {kind for kind in (NNSIGHT, TORCHLENS) if find_spec(kind) is None}
"""The libraries that are not installed, whose ways are skipped."""

PROJECTIONS = ("c_proj", "o_proj", "out_proj", "dense")
"""Hugging Face's names of the projection of the heads' outputs."""


@dataclass(frozen=True)
class Setup:
    """The model, its input and how it runs. Shapes are those of GPT-2 small by default."""

    batch: int = 8
    batches: int = 1
    tokens: int = 256
    layers: int = 12
    heads: int = 12
    d_model: int = 768
    vocab: int = 50257
    context: int = 1024
    threads: int = 2
    seed: int = 0
    device: str = "cpu"
    model: str = ""  # a name or a path to load it from; random weights of these shapes without


def of_model(setup: Setup) -> Setup:
    """Replace the sizes by those of the loaded model."""
    if not setup.model:
        return setup
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(setup.model)
    return replace(
        setup,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        d_model=config.hidden_size,
        vocab=config.vocab_size,
        context=config.max_position_embeddings,
    )


def build(setup: Setup, kind: str = BRIDGE) -> Any:
    """Build or load a model: one with the same weights for each kind."""
    torch.manual_seed(setup.seed)
    if kind == HOOKED:
        return _build_hooked(setup)
    attention = "eager" if kind == BRIDGE else "sdpa"
    module = _load(setup, attention) if setup.model else _build_gpt2(setup, attention)
    module = module.eval().to(setup.device)
    if kind == BRIDGE:
        from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

        config = module.config
        return build_bridge_from_module(
            module, config.architectures[0], hf_config=config, device=setup.device
        )
    if kind == NNSIGHT:
        from nnsight import NNsight

        return NNsight(module)
    return module


def _load(setup: Setup, attention: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        setup.model, attn_implementation=attention, dtype=torch.float32
    )


def _build_gpt2(setup: Setup, attention: str) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=setup.vocab,
        n_positions=setup.context,
        n_embd=setup.d_model,
        n_layer=setup.layers,
        n_head=setup.heads,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    config.architectures = ["GPT2LMHeadModel"]
    config._attn_implementation = attention
    return GPT2LMHeadModel(config)


def _build_hooked(setup: Setup) -> Any:
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights

    if setup.model:
        return HookedTransformer.from_pretrained_no_processing(setup.model, device=setup.device)
    module = _build_gpt2(setup, "eager")  # first, so that the others get its weights
    config = HookedTransformerConfig(
        n_layers=setup.layers,
        d_model=setup.d_model,
        n_ctx=setup.context,
        d_head=setup.d_model // setup.heads,
        n_heads=setup.heads,
        d_vocab=setup.vocab,
        act_fn="gelu_new",
        seed=setup.seed,
        device=setup.device,
        default_prepend_bos=False,
    )
    model = HookedTransformer(config).eval()
    weights = convert_gpt2_weights(module, config)
    model.load_state_dict(weights, strict=False)  # only causal masks are missing
    return model


def make_tokens(setup: Setup) -> Tensor:
    """Draw the tokens of all batches: the same ones for each model."""
    chance = torch.Generator().manual_seed(setup.seed)
    shape = (setup.batch * setup.batches, setup.tokens)
    return torch.randint(setup.vocab, shape, generator=chance).to(setup.device)


def depth(model: Any) -> int:
    """Count the layers of a model of any kind."""
    cfg = model.cfg.n_layers if hasattr(model, "cfg") else model.config.num_hidden_layers
    return int(cfg)


def middle(model: Any) -> int:
    """Return the requested layer."""
    return depth(model) // 2


def resid_name(layer: int) -> str:
    """Return TransformerLens' name of the requested activation."""
    return f"blocks.{layer}.hook_resid_post"


def heads_name(layer: int) -> str:
    """Return its name of the outputs of the heads."""
    return f"blocks.{layer}.attn.hook_z"


def neurons_name(layer: int) -> str:
    """Return its name of the neurons, which are four times as wide as the requested activation."""
    return f"blocks.{layer}.mlp.hook_post"


def block_path(module: nn.Module, layer: int) -> str:
    """Find a layer of a plain model: in the list with as many modules as layers."""
    layers = depth(module)
    return next(
        f"{path}.{layer}"
        for path, each in module.named_modules()
        if isinstance(each, nn.ModuleList) and len(each) == layers
    )


def projection_path(module: nn.Module, layer: int) -> str:
    """Find the module of a plain model whose input is the outputs of the layer's heads."""
    block = block_path(module, layer)
    return next(
        f"{block}.{path}"
        for path, _ in module.get_submodule(block).named_modules()
        if path.split(".")[-1] in PROJECTIONS and "mlp" not in path
    )


def neurons_path(module: nn.Module, layer: int) -> str:
    """Find the module of a plain model whose input is the layer's neurons: its last linear one."""
    block = block_path(module, layer)
    *_, last = (
        path
        for path, each in module.get_submodule(block).named_modules()
        if getattr(each, "weight", None) is not None and each.weight.dim() > 1
    )
    return f"{block}.{last}"


Register = Callable[[Callable[..., None]], Any]
"""Registers a bare torch hook, and returns its handle."""


def at_resid(model: Any, layer: int) -> Register:
    """Find where a bare hook sees a layer's `resid_post`, in a bridge or a plain model."""
    if hasattr(model, "hook_dict"):
        return _at_hook_point(model, resid_name(layer))
    register: Register = model.get_submodule(block_path(model, layer)).register_forward_hook
    return register


def at_heads(model: Any, layer: int) -> Register:
    """Find where it sees the outputs of the layer's heads."""
    if hasattr(model, "hook_dict"):
        return _at_hook_point(model, heads_name(layer))
    return _at_input(model, projection_path(model, layer))


def at_neurons(model: Any, layer: int) -> Register:
    """Find where it sees the layer's neurons."""
    if hasattr(model, "hook_dict"):
        return _at_hook_point(model, neurons_name(layer))
    return _at_input(model, neurons_path(model, layer))


def _at_hook_point(model: Any, name: str) -> Register:
    register: Register = model.hook_dict[name].register_forward_hook
    return register


def _at_input(model: nn.Module, path: str) -> Register:
    return model.get_submodule(path).register_forward_pre_hook


def seen(args: tuple[Any, ...], output: tuple[Tensor, ...]) -> Tensor:
    """Return the value that a hook saw: the output of a module, or its input."""
    activation: Tensor = output[0] if output else args[0]
    return activation
