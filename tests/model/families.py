"""Tiny models whose layers, heads or outputs are unlike others, and their bridges."""

import warnings

import configs
import torch
import transformers
from configs import LLAMA_WITH_HEAD_DIM, SPECIAL, TWO_SIDED, VOCAB
from models import bridge_of, tokens

# Where a bridge is wrong: it splits by the sizes of the config what a layer splits otherwise.
WRONG = {
    "DeepseekV2ForCausalLM": r".*\.o\.hook_in",
    "DeepseekV3ForCausalLM": r".*\.o\.hook_in",
    "Qwen3NextForCausalLM": r".*\.attn\.q\.hook_out",
    "Qwen3_5ForCausalLM": r".*\.attn\.q\.hook_out",
    # A bridge reads it off what the whole MLP is given.
    "RwkvForCausalLM": r".*\.channel_mix\.in\.hook_in",
}
TEXT = {**LLAMA_WITH_HEAD_DIM, **SPECIAL, "intermediate_size": 48}
GEMMA4 = {
    **TEXT,
    "num_key_value_heads": 1,
    "layer_types": ["sliding_attention", "full_attention"],
    "global_head_dim": 16,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": VOCAB,
    "num_kv_shared_layers": 0,
}
GATED = {
    **TEXT,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
LATENT = {
    **{name: size for name, size in TEXT.items() if name != "head_dim"},
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}
SIDE = {name: size for name, size in TEXT.items() if not name.endswith("token_id")}
VISION = {**configs.VISION, "intermediate_size": 48}
SPEECH = {**VISION, **configs.SPEECH, "conv_kernel": [4, 2], "conv_stride": [4, 2]}
FAMILIES = {
    "Gemma4ForConditionalGeneration": (
        "Gemma4Config",
        {"text_config": GEMMA4, "vision_config": None, "audio_config": None},
    ),
    "Qwen3NextForCausalLM": ("Qwen3NextConfig", {**GATED, **EXPERTS}),
    "Qwen3_5ForCausalLM": ("Qwen3_5TextConfig", GATED),
    "OlmoHybridForCausalLM": (
        "OlmoHybridConfig",
        {name: size for name, size in GATED.items() if name != "head_dim"},
    ),
    "T5Gemma2ForConditionalGeneration": (
        "T5Gemma2Config",
        {
            "encoder": {
                "text_config": TEXT,
                "vision_config": {**VISION, "model_type": "siglip_vision_model"},
            },
            "decoder": TEXT,
            "image_token_index": VOCAB - 1,
        },
    ),
    "DeepseekV2ForCausalLM": (
        "DeepseekV2Config",
        {**LATENT, "topk_method": "greedy", "mlp_bias": False},
    ),
    "DeepseekV3ForCausalLM": ("DeepseekV3Config", LATENT),
    "GptOssForCausalLM": (
        "GptOssConfig",
        {**TEXT, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "MambaForCausalLM": (
        "MambaConfig",
        {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": VOCAB, "state_size": 4},
    ),
    "LongT5ForConditionalGeneration": (
        "LongT5Config",
        {
            "d_model": 32,
            "d_ff": 48,
            "d_kv": 8,
            "num_layers": 2,
            "num_heads": 4,
            "vocab_size": VOCAB,
            "decoder_start_token_id": 0,
        },
    ),
    "PegasusForConditionalGeneration": (
        "PegasusConfig",
        {**TWO_SIDED, "max_position_embeddings": 64},
    ),
    "RwkvForCausalLM": (
        "RwkvConfig",
        {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": VOCAB, "context_length": 64},
    ),
    "BitNetForCausalLM": (
        "BitNetConfig",
        {name: size for name, size in TEXT.items() if name != "head_dim"},
    ),
    "ViTModel": ("ViTConfig", VISION),
    "ViTForImageClassification": ("ViTConfig", VISION),
    "DeiTModel": ("DeiTConfig", VISION),
    "DeiTForImageClassification": ("DeiTConfig", VISION),
    "ASTForAudioClassification": (
        "ASTConfig",
        {
            **{name: size for name, size in VISION.items() if name != "image_size"},
            "max_length": 24,
            "num_mel_bins": 16,
            "time_stride": 8,
            "frequency_stride": 8,
        },
    ),
    "HubertModel": ("HubertConfig", SPEECH),
    "HubertForCTC": ("HubertConfig", SPEECH),
    "Wav2Vec2Model": ("Wav2Vec2Config", SPEECH),
    "Wav2Vec2ForCTC": ("Wav2Vec2Config", SPEECH),
}


def config_of(name, **options):
    kind, sizes = FAMILIES[name]
    config = getattr(transformers, kind)(**{**sizes, **options})
    config.architectures = [name]
    config._attn_implementation = "eager"
    return config


def build(name, seed=0):
    """Build a tiny model, with weights that let every part of it matter."""
    torch.manual_seed(seed)
    model = getattr(transformers, name)(config_of(name)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(std=weight.shape[-1] ** -0.5)
            else:
                weight.add_(torch.randn_like(weight), alpha=0.1)
    return model


def inputs(model):
    config = model.config
    draw = torch.Generator().manual_seed(0)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=draw)}
    if config.model_type == "audio-spectrogram-transformer":
        return {"input_values": torch.randn(2, 24, 16, generator=draw)}
    if model.main_input_name == "input_values":
        return {"input_values": torch.randn(2, 80, generator=draw)}
    if config.is_encoder_decoder:
        return {"input_ids": tokens(), "decoder_input_ids": tokens(pos=5, seed=1)}
    return {"input_ids": tokens()}


def run(model, inner=None):
    given = inputs(inner or model)
    first = next(iter(given))
    with torch.no_grad():
        if inner is None:
            model(**given)
        else:
            model(given.pop(first), **given)


def build_bridge(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it says of models that it cannot do all with
        return bridge_of(build(name))
