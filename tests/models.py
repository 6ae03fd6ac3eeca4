"""Tiny models of every architecture, built from their configs, with fixed weights."""

import functools
import types
from importlib.metadata import version

import torch
import transformers
from configs import LLAMA, LLAMA_WITH_HEAD_DIM, TWO_SIDED, VOCAB
from torch import Tensor, nn

BATCH, POS = 3, 7

_WITHOUT_GROUPS = {name: size for name, size in LLAMA.items() if name != "num_key_value_heads"}

_CONFIGS = {
    "GPT2LMHeadModel": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "LlamaForCausalLM": ("LlamaConfig", LLAMA_WITH_HEAD_DIM),
    "MistralForCausalLM": ("MistralConfig", LLAMA_WITH_HEAD_DIM),
    "Qwen2ForCausalLM": ("Qwen2Config", LLAMA),
    "Qwen3ForCausalLM": ("Qwen3Config", LLAMA_WITH_HEAD_DIM),
    "Gemma2ForCausalLM": ("Gemma2Config", LLAMA_WITH_HEAD_DIM),
    "Gemma3ForCausalLM": ("Gemma3TextConfig", LLAMA_WITH_HEAD_DIM),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", _WITHOUT_GROUPS),
    "PhiForCausalLM": ("PhiConfig", _WITHOUT_GROUPS),
    "OPTForCausalLM": (
        "OPTConfig",
        {**_WITHOUT_GROUPS, "ffn_dim": 64, "word_embed_proj_dim": 32},
    ),
    "BloomForCausalLM": ("BloomConfig", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "MixtralForCausalLM": (
        "MixtralConfig",
        {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "BertForMaskedLM": ("BertConfig", _WITHOUT_GROUPS),
    "T5ForConditionalGeneration": (
        "T5Config",
        {
            "d_model": 32,
            "d_ff": 64,
            "d_kv": 8,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
    ),
}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
# Beside the architectures that everything is tested on: some that project queries, keys and values
# jointly, each in another way.
JOINT = ("CodeGenForCausalLM", "FalconForCausalLM", "GPTBigCodeForCausalLM", "Phi3ForCausalLM")
_JOINT_CONFIGS = {
    "CodeGenForCausalLM": ("CodeGenConfig", {**_GPT, "rotary_dim": 4}),
    "FalconForCausalLM": (
        "FalconConfig",
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    ),
    "GPTBigCodeForCausalLM": ("GPTBigCodeConfig", _GPT),
    "Phi3ForCausalLM": ("Phi3Config", LLAMA),
}
# Some whose layers differ, or that scale outside of their modules what a bridge shows scaled.
UNEVEN = (
    "DeepseekV3ForCausalLM",
    "Llama4ForCausalLM",
    "JambaForCausalLM",
    "GraniteForCausalLM",
    "GraniteMoeForCausalLM",
)
_MIXTURE = {**LLAMA, "num_experts_per_tok": 2}
_SCALED = {"embedding_multiplier": 12.0, "residual_multiplier": 0.5}
_UNEVEN_CONFIGS = {
    "DeepseekV3ForCausalLM": (
        "DeepseekV3Config",
        {
            **_MIXTURE,
            "num_key_value_heads": 4,
            "first_k_dense_replace": 1,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "moe_intermediate_size": 16,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
        },
    ),
    "Llama4ForCausalLM": (
        "Llama4TextConfig",
        {
            **LLAMA_WITH_HEAD_DIM,
            "interleave_moe_layer_step": 2,
            "num_local_experts": 4,
            "intermediate_size_mlp": 64,
        },
    ),
    "JambaForCausalLM": (
        "JambaConfig",
        {
            **_MIXTURE,
            "num_experts": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "use_mamba_kernels": False,
        },
    ),
    "GraniteForCausalLM": ("GraniteConfig", {**LLAMA, **_SCALED}),
    "GraniteMoeForCausalLM": (
        "GraniteMoeConfig",
        {**_MIXTURE, **_SCALED, "num_local_experts": 4},
    ),
    "OpenAIGPTLMHeadModel": ("OpenAIGPTConfig", _GPT),
}
GENERATION = int(version("transformer_lens").split(".")[0])
# The T5 bridge of TransformerLens 3.9 does not run on transformers 5.
HAS_T5 = GENERATION >= 4
# What bridges up to TransformerLens 4.3 run right with: with 5.24 they lose the KV cache, which it
# renamed, and CodeGen's do not run at all.
OLD_CACHE = tuple(map(int, version("transformers").split(".")[:2])) < (5, 24)
ARCHITECTURES = tuple(name for name in _CONFIGS if HAS_T5 or not name.startswith("T5"))


def huggingface(
    architecture: str, attention: str = "eager", seed: int = 0, **options: object
) -> nn.Module:
    """Build a tiny Hugging Face model of an architecture, with options of its config."""
    name, sizes = (_CONFIGS | _JOINT_CONFIGS | _UNEVEN_CONFIGS)[architecture]
    common = {"vocab_size": VOCAB, "pad_token_id": 0}
    config = getattr(transformers, name)(**{**sizes, **common, **options})
    config.architectures = [architecture]
    config._attn_implementation = attention
    torch.manual_seed(seed)
    return getattr(transformers, architecture)(config).eval()


def bridge(architecture: str = "GPT2LMHeadModel", seed: int = 0) -> nn.Module:
    """Build a tiny `TransformerBridge` of an architecture."""
    return bridge_of(huggingface(architecture, seed=seed))


@functools.cache
def shared(architecture: str = "GPT2LMHeadModel") -> nn.Module:
    """Build a bridge once for all tests of a process; each must leave it as it was."""
    return bridge(architecture)


def bridge_of(model: nn.Module, architecture: str | None = None) -> nn.Module:
    """Build a `TransformerBridge` of a Hugging Face model, whose modules it takes over."""
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    name = architecture or type(model).__name__
    return build_bridge_from_module(model, name, hf_config=model.config)


def tiny_transformer(**options: object) -> nn.Module:
    """Build a small GPT-2, or a `HookedTransformer` with options, of the installed generation."""
    if GENERATION >= 4:  # 4.0 removed HookedTransformer
        return bridge("GPT2LMHeadModel")
    from transformer_lens import HookedTransformer

    model = HookedTransformer(hooked_config(**options)).eval()
    if GENERATION == 2:
        # It does not generate without one, whether it needs it or not.
        model.tokenizer = types.SimpleNamespace(padding_side="right", pad_token_id=0)
    return model


def hooked_config(**options: object) -> object:
    """Build the config of a small hooked model, where TransformerLens still has them."""
    from transformer_lens import HookedTransformerConfig

    sizes = {"n_layers": 2, "d_model": 32, "n_ctx": 64, "d_head": 8, "n_heads": 4, "d_mlp": 64}
    common = {"d_vocab": VOCAB, "act_fn": "gelu", "seed": 0, "device": "cpu"}
    return HookedTransformerConfig(**{**sizes, **common, **options})


def tokens(batch: int = BATCH, pos: int = POS, seed: int = 0) -> Tensor:
    """Draw tokens, none of which is padding."""
    return torch.randint(1, VOCAB, (batch, pos), generator=torch.Generator().manual_seed(seed))


class Mlp(nn.Module):
    """A plain torch module, whose block is used twice where `twice` is set."""

    def __init__(self, *, twice: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, 8)
        self.block = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        self.head = nn.Linear(8, 4)
        self.twice = twice

    def forward(self, ids: Tensor) -> Tensor:
        """Map token ids `batch pos` to `batch pos 4`."""
        hidden = self.block(self.embed(ids))
        return self.head(self.block(hidden) if self.twice else hidden)


def plainly_hooked(
    model: nn.Module, ids: Tensor, *names: str, **kwargs: Tensor
) -> dict[str, list[Tensor]]:
    """Read hook points the plain way: what `capture` must agree with, bit for bit."""
    fired: dict[str, list[Tensor]] = {}

    def keep(name: str, activation: Tensor, hook: object) -> None:  # noqa: ARG001
        fired.setdefault(name, []).append(activation.detach().clone())

    found = model.hook_dict  # a bridge makes it anew each time
    names = names or tuple(dict.fromkeys(point.name for point in found.values()))
    points = {name: found[name] for name in names}
    for name, point in points.items():
        point.add_hook(functools.partial(keep, name))
    try:
        with torch.no_grad():
            model(ids, **kwargs)
    finally:
        for point in points.values():
            point.remove_hooks()
    return fired


def hooked(model, name, *args, **kwargs):
    """Read what a module returns the plain way, of all its forwards, joined along the batch."""
    kept = []
    handle = model.get_submodule(name).register_forward_hook(
        lambda _module, _given, out: kept.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        model(*args, **kwargs)
    handle.remove()
    return torch.cat(kept)


def hooks_of(model: nn.Module) -> list[tuple[str, list[int], list[int], int]]:
    """List what hooks a model carries, and whether its `forward` is shadowed."""
    return [
        (
            name,
            list(module._forward_hooks),
            list(module._forward_pre_hooks),
            len(getattr(module, "fwd_hooks", ())),
        )
        for name, module in model.named_modules()
    ] + [("forward", [id(model.__dict__.get("forward"))], [], 0)]


def other_weights():
    model = bridge()
    with torch.no_grad():
        next(model.parameters())[3, 5] += 1
    return model


def bart():
    """Build a tiny BART, whose logits are as long as what its encoder is given."""
    config = transformers.BartConfig(**TWO_SIDED, max_position_embeddings=64)
    config.architectures = ["BartForConditionalGeneration"]
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    return transformers.BartForConditionalGeneration(config).eval()


class Poisoned(nn.Module):
    """Yields something that is no number for one token."""

    def __init__(self, value):
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        with torch.no_grad():
            self.embed.weight[7] = value

    def forward(self, ids):
        return self.embed(ids)
