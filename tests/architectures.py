"""Tiny models of the architectures that TransformerLens' factory lists, built from their configs.

Nothing is downloaded: a config is the architecture's own default with every size made small. No two
kinds of axis have one size where that can be, so that a wrong axis shows.
"""

import importlib.util
import re
import warnings

import torch
import transformers
from models import VOCAB, bridge_of
from torch import Tensor, nn

BATCH, POS, HEADS = 3, 7, 4
PICTURE = 4  # tokens
# Token ids below are never padding, nor do they stand for pictures or sound.
_FIRST, _LAST, _PICTURE, _FILM = 4, 40, 45, 46

_SIZES = {
    "hidden_size d_model n_embd dim out_hidden_size output_hidden_size pooler_output_size "
    "word_embed_proj_dim attention_hidden_size lru_width projection_dim projector_input_dim "
    "projector_output_dim projector_hidden_size vision_output_dim": 32,
    "num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads "
    "decoder_attention_heads conf_num_attention_heads mamba_n_heads mamba_num_heads "
    "linear_num_value_heads": HEADS,
    "num_key_value_heads num_kv_heads num_experts_per_tok moe_k n_group n_groups index_n_heads "
    "linear_num_key_heads": 2,
    "topk_group n_shared_experts": 1,
    "head_dim d_kv kv_channels qk_head_dim index_head_dim v_head_dim chunk_size mamba_chunk_size "
    "linear_key_head_dim linear_value_head_dim": 8,
    "intermediate_size ffn_dim d_ff encoder_ffn_dim decoder_ffn_dim ffn_hidden_size "
    "intermediate_size_mlp": 48,
    "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size "
    "moe_shared_expert_intermediate_size": 24,
    "num_experts num_local_experts n_routed_experts moe_num_experts": 6,
    "q_lora_rank kv_lora_rank o_lora_rank adapter_rank laurel_rank": 16,
    "mamba_d_head mamba_head_dim mamba_headdim image_size num_mel_bins max_source_positions": 16,
    "qk_rope_head_dim qk_nope_head_dim rotary_dim time_step_rank mamba_dt_rank patch_size "
    "index_topk": 4,
    "max_position_embeddings n_positions n_ctx context_length max_seq_len sliding_window "
    "max_encoder_position_embeddings max_decoder_position_embeddings window_size "
    "original_max_position_embeddings attention_window_size attention_chunk_size "
    "num_position_embeddings mamba_d_ssm": 64,
    "vocab_size decoder_vocab_size vocab_size_per_layer_input": VOCAB,
    "state_size mamba_d_state ssm_state_size": 10,
    "hidden_size_per_layer_input": 12,
    "pad_token_id": 0,
    "bos_token_id decoder_start_token_id": 1,
    "eos_token_id": 2,
    "image_token_id image_token_index audio_token_id audio_token_index": _PICTURE,
    "video_token_id video_token_index": _FILM,
}
_SIZE = {name: size for names, size in _SIZES.items() for name in names.split()}
_LAYERS = [
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "encoder_layers",
    "decoder_layers",
    "depth",
    "num_decoder_layers",
    "conf_num_hidden_layers",
]

_LATENT = {"head_dim": 4, "num_key_value_heads": HEADS, "num_experts_per_tok": 2}
_ROTARY = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
_SPEECH = {
    "conv_dim": [32, 32],
    "conv_kernel": [4, 2],
    "conv_stride": [4, 2],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "codevector_dim": 16,
    "proj_codevector_dim": 16,
    "num_codevectors_per_group": 8,
    "classifier_proj_size": 16,
}
# What the sizes alone do not make right, by the architectures.
_OPTIONS = {
    "ASTForAudioClassification": {"frequency_stride": 4, "time_stride": 4, "max_length": 20},
    "BambaForCausalLM": {"attn_layer_indices": [1]},
    "Emu3ForConditionalGeneration": {
        "vocabulary_map": {"<image>": _PICTURE},
        "vq_config": {"codebook_size": 8, "base_channels": 32, "channel_multiplier": [1, 1]},
    },
    "DeepseekV2ForCausalLM DeepseekV3ForCausalLM GlmMoeDsaForCausalLM Glm4MoeLiteForCausalLM "
    "YoutuForCausalLM": _LATENT,
    "Florence2ForConditionalGeneration": {
        "vision_config": {
            "depths": [1, 1],
            "patch_size": [7, 3],
            "patch_stride": [4, 2],
            "patch_padding": [3, 1],
            "patch_prenorm": [False, True],
            "embed_dim": [16, 32],
            "num_heads": [2, 4],
            "num_groups": [2, 4],
            "window_size": 2,
        }
    },
    "Gemma4ForCausalLM": {"global_head_dim": 16},
    "Gemma4ForConditionalGeneration Gemma4UnifiedForConditionalGeneration": {
        "text_config": {"global_head_dim": 16}
    },
    "GraniteMoeHybridForCausalLM": {
        "layer_types": ["mamba", "attention"],
        "position_embedding_type": "rope",
    },
    "Glm4vForConditionalGeneration Qwen2_5_VLForConditionalGeneration": {
        "text_config": {"rope_parameters": _ROTARY}
    },
    "HubertForCTC HubertModel Wav2Vec2ForCTC Wav2Vec2ForPreTraining Wav2Vec2Model": _SPEECH,
    "HunYuanDenseV1ForCausalLM": {"head_dim": 8, "num_key_value_heads": 2},
    "JambaForCausalLM": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "LEDForConditionalGeneration": {"attention_window": 4},
    "Lfm2MoeForCausalLM": {
        "layer_types": ["conv", "full_attention"],
        "num_hidden_layers": 2,
        "num_dense_layers": 1,
    },
    "Llama4ForCausalLM": {"interleave_moe_layer_step": 2},
    "Llama4ForConditionalGeneration": {"text_config": {"interleave_moe_layer_step": 2}},
    "LongT5ForConditionalGeneration": {"local_radius": 2},
    "Mamba2ForCausalLM": {"num_heads": 8, "head_dim": 8},
    "NemotronForCausalLM": {"num_key_value_heads": 2},
    "RecurrentGemmaForCausalLM": {"num_hidden_layers": 3},
    "Zamba2ForCausalLM": {
        "n_mamba_heads": 4,
        "mamba_ngroups": 1,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "FalconForCausalLM/grouped": {"new_decoder_architecture": True, "multi_query": False},
    "GPTNeoXForCausalLM/sequential": {"use_parallel_residual": False},
    "OPTForCausalLM/projected": {"word_embed_proj_dim": 16, "do_layer_norm_before": False},
    "PhiForCausalLM/normed": {"qk_layernorm": True},
    "StableLmForCausalLM/normed": {"qk_layernorm": True},
    "T5ForConditionalGeneration/gated": {"feed_forward_proj": "gated-gelu"},
    # With a picture, whose four embeddings take the place of the first tokens.
    "LlavaForConditionalGeneration/pictures": {"vision_config": {"image_size": 8}},
    "Gemma3ForConditionalGeneration/pictures": {
        "vision_config": {"image_size": 16},
        "mm_tokens_per_image": 4,
    },
    "FalconForCausalLM/alibi": {"alibi": True, "multi_query": False, "num_kv_heads": HEADS},
}
_OPTION = {name: options for names, options in _OPTIONS.items() for name in names.split()}

# Other names that the factory has for a class of Hugging Face's.
_NATIVE = "TransformerLensNative"
_ALIASES = {
    "Gemma1ForCausalLM": "GemmaForCausalLM",
    "JetMoEForCausalLM": "JetMoeForCausalLM",
    "MPTForCausalLM": "MptForCausalLM",
    "NeoForCausalLM": "GPTNeoForCausalLM",
    "NeoXForCausalLM": "GPTNeoXForCausalLM",
    "PhiMoEForCausalLM": "PhimoeForCausalLM",
    "T5WithLMHeadModel": "T5ForConditionalGeneration",
}
# What no model of the factory's list can be built of here, by the reason.
_REMOTE = "its model is code of a repository on the Hub, not of transformers"
_OWN = "no model of the architecture is in any library; TransformerLens wraps what users write"
_NOT_BUILT = {
    "BaiChuanForCausalLM BaichuanForCausalLM BD3LM DreamModel ExaoneForCausalLM "
    "GiddForDiffusionLM GPT2LMHeadCustomModel HyenaDNAForCausalLM InternLM2ForCausalLM "
    "LLaDA2MoeModelLM LLaDAModelLM OpenELMForCausalLM OuroForCausalLM QwenForCausalLM "
    "RavenForCausalLM RWKV7ForCausalLM": _REMOTE,
    "MinGPTForCausalLM NanoGPTForCausalLM NeelSoluOldForCausalLM TransformerLensPretrain": _OWN,
}
_NO_BRIDGE = {
    "BloomModel": "TransformerLens' adapter looks for its parts under `transformer`",
    "PhiForCausalLM/normed": "TransformerLens' adapter knows no norms of queries and keys",
    "Wav2Vec2ForPreTraining": "TransformerLens refuses to wrap it, and says so",
}
# Architectures that a library is missing for: of the first the model, of the others the bridge.
_LIBRARIES = {
    "timm": ("Gemma3nForConditionalGeneration",),
    "torchvision": (
        "Glm4vForConditionalGeneration",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLMoeForConditionalGeneration",
        "Qwen3_5ForConditionalGeneration",
        "Qwen3_5MoeForConditionalGeneration",
    ),
}


def _lacking(library: str) -> dict[str, str]:
    if importlib.util.find_spec(library) is not None:
        return {}
    return dict.fromkeys(_LIBRARIES[library], f"{library} is not installed")


NOT_BUILT = {name: why for names, why in _NOT_BUILT.items() for name in names.split()} | _lacking(
    "timm"
)
"""Why no model of an architecture of the factory's list can be built, by its name."""

NO_BRIDGE = NOT_BUILT | _NO_BRIDGE | _lacking("torchvision")
"""Why no bridge of an architecture can be built, by its name."""


def listed() -> tuple[str, ...]:
    """List what TransformerLens' factory lists, and the variants that are built beside."""
    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES

    return (*SUPPORTED_ARCHITECTURES, *(name for name in _OPTION if "/" in name))


def built(kind: str) -> tuple[str, ...]:
    """List the architectures of which a model (`"plain"`) or a bridge (`"bridge"`) can be built."""
    without = {"plain": NOT_BUILT | {_NATIVE: ""}, "bridge": NO_BRIDGE}[kind]
    return tuple(name for name in listed() if name not in without)


def plain(name: str, seed: int = 0) -> nn.Module:
    """Build a tiny Hugging Face model of an architecture, or of a variant (`name/variant`)."""
    architecture = name.partition("/")[0]
    kind = getattr(transformers, _ALIASES.get(architecture, architecture))
    config = _shrunk(kind.config_class, **_OPTION.get(name, _OPTION.get(architecture, {})))
    config.architectures = [architecture]
    config._attn_implementation = "eager"
    if name.endswith("/pictures"):
        config._picture = config.vision_config.image_size
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such as of kernels that are not installed
        return _with_telling_weights(kind(config).float()).eval()


def bridge(name: str, seed: int = 0) -> nn.Module:
    """Build a tiny `TransformerBridge` of an architecture, or of a variant of one."""
    if name == _NATIVE:
        return _native(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return bridge_of(plain(name, seed), name.partition("/")[0])


def _native(seed: int) -> nn.Module:
    from transformer_lens.model_bridge.sources.native import boot

    sizes = {"n_layers": 2, "d_model": 32, "n_ctx": 64, "d_head": 8, "n_heads": HEADS, "d_mlp": 48}
    torch.manual_seed(seed)
    model = boot({**sizes, "d_vocab": VOCAB, "act_fn": "gelu", "seed": seed})
    _with_telling_weights(model)
    return model.eval()


def inputs(
    model: nn.Module, batch: int = BATCH, pos: int = POS, seed: int = 0
) -> dict[str, Tensor]:
    """Draw what a model's forward takes: `pos` tokens, or what makes about as many positions.

    A decoder gets two tokens more than its encoder. Pictures and the frames of an audio spectrogram
    have the one size that the config says.
    """
    inner = getattr(model, "original_model", model)
    draw = torch.Generator().manual_seed(seed)
    config, name = getattr(inner, "config", None), getattr(inner, "main_input_name", "input_ids")
    if name == "pixel_values":
        return {name: torch.randn(batch, 3, config.image_size, config.image_size, generator=draw)}
    if getattr(config, "model_type", None) == "audio-spectrogram-transformer":
        return {name: torch.randn(batch, config.max_length, config.num_mel_bins, generator=draw)}
    if name == "input_values":
        return {name: torch.randn(batch, 8 * pos + 4, generator=draw)}
    found = {"input_ids": torch.randint(_FIRST, _LAST, (batch, pos), generator=draw)}
    if config is not None and (size := getattr(config, "_picture", None)):
        found["input_ids"][:, :PICTURE] = _PICTURE
        found["pixel_values"] = torch.randn(batch, 3, size, size, generator=draw)
    if getattr(config, "is_encoder_decoder", False):
        found["decoder_input_ids"] = torch.randint(_FIRST, _LAST, (batch, pos + 2), generator=draw)
    return found


def run(model: nn.Module, given: dict[str, Tensor]) -> object:
    """Run a plain model or a bridge on what `inputs` drew, without gradients."""
    with torch.no_grad():
        if not hasattr(model, "hook_dict"):
            return model(**given)
        rest = dict(given)
        return model(rest.pop(next(iter(rest))), **rest)


@torch.no_grad()
def _with_telling_weights(model: nn.Module) -> nn.Module:
    """Draw weights that make every part matter: initial ones are near 0, and biases are 0."""
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.normal_(std=weight.shape[-1] ** -0.5)
        else:
            weight.add_(torch.randn_like(weight), alpha=0.1)
    return model


def _shrunk(kind: type, **options: object) -> transformers.PreTrainedConfig:
    """Make a tiny config, with a layer of each kind that the default's lists tell of."""
    default = kind()
    fields = default.to_dict()
    count = next((fields[name] for name in _LAYERS if name in fields), 0)
    lists = [name for name, value in fields.items() if _is_by_layer(value, count)]
    layers = _first_of_each_kind([fields[name] for name in lists])
    sizes: dict[str, object] = {}
    for name, value in fields.items():
        part = default.__dict__.get(name)
        if isinstance(part, transformers.PreTrainedConfig):
            sizes[name] = _shrunk(type(part), **options.get(name, {}))
        elif name in options or value is None:
            continue
        elif name in _LAYERS:
            sizes[name] = len(layers)
        elif name in lists:
            sizes[name] = [value[layer] for layer in layers]
        elif isinstance(value, int) and name in _SIZE:
            sizes[name] = _SIZE[name]
        elif isinstance(value, int) and re.search("_token_(id|index)$", name):
            sizes[name] = min(value, VOCAB - 1)
    return kind(**{**options, **sizes})


def _is_by_layer(value: object, count: int) -> bool:
    few = 6
    return isinstance(value, (list, tuple)) and len(value) == count > 2 and len(set(value)) < few


def _first_of_each_kind(lists: list[list[object]]) -> list[int]:
    kinds: dict[tuple[object, ...], int] = {}
    for layer, kind in enumerate(zip(*lists, strict=True)):
        kinds.setdefault(kind, layer)
    layers = list(kinds.values())
    return layers if len(layers) > 1 else [0, 1]


# Parts of the names where a bridge is wrong itself, as docs/known-wrong-bridges.md says.
WRONG = {
    "FalconForCausalLM/grouped": "",  # all of them
    # Queries and their gates, as twice as many heads.
    "Qwen3NextForCausalLM": "attn.q.hook_out",
    "Qwen3_5ForCausalLM": "attn.q.hook_out",
    "Qwen3_5MoeForCausalLM": "attn.q.hook_out",
    "RwkvForCausalLM": "channel_mix.in.hook_in",
    "SwitchTransformersForConditionalGeneration": "hook_pattern",
}


def apart(one: Tensor, other: Tensor) -> float:
    """How far two tensors are apart, of the size of the other's largest element."""
    if other.numel() == 0:
        return 0.0
    one, other = (value.double().nan_to_num(0, 0, 0) for value in (one, other))
    if one.numel() == other.numel():
        one = one.reshape(other.shape)
    return float((one - other).abs().max() / other.abs().max().clamp(min=1))
