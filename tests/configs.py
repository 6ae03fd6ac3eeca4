"""Sizes of tiny configs, for `models.py` and for the models that tests build themselves."""

VOCAB = 50
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {
    **SIZES,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
}
LLAMA_WITH_HEAD_DIM = {**LLAMA, "head_dim": 8}
# Encoder and decoder, as BART's family names them.
TWO_SIDED = {
    **SPECIAL,
    "vocab_size": VOCAB,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}
# The same, as ProphetNet names them.
PROPHET = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "num_encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}
# Samples of sound, and the convolutions that make frames of them.
SPEECH = {
    **SIZES,
    "vocab_size": VOCAB,
    "conv_dim": [16, 16],
    "conv_kernel": [10, 3],
    "conv_stride": [5, 2],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
}
VISION = {**SIZES, "image_size": 16, "patch_size": 8}
