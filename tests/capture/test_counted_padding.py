"""Padding that a model counts, or attends to, where no table of positions shows it."""

import warnings

import pytest
import torch
import transformers
from configs import LLAMA_WITH_HEAD_DIM
from models import VOCAB, huggingface, tokens

from actctx import SelectionError, Site, capture

_SIZES = {**LLAMA_WITH_HEAD_DIM, "intermediate_size": 48, "pad_token_id": 0}
_TURNED = {
    "NanoChat": ("self_attn.q_norm", {}),
    "HunYuanDenseV1": ("self_attn.query_layernorm", {}),
    "HunYuanMoEV1": ("self_attn.key_layernorm", {"num_experts": 4, "moe_topk": 2}),
    "Llama4": ("self_attn.qk_norm", {"intermediate_size_mlp": 48, "num_local_experts": 4}),
}
LENGTHS = (5, 2, 7)
MASK = torch.arange(7).flip(0) < torch.tensor(LENGTHS)[:, None]


def built(family, **options):
    config = getattr(transformers, f"{family}Config", None)
    config = transformers.Llama4TextConfig if family == "Llama4" else config
    options = {**_SIZES, **_TURNED.get(family, ("", {}))[1], **options}
    torch.manual_seed(0)
    name = f"{family}ForCausalLM"
    return getattr(transformers, name)(config(**options)).eval()


def padded_left(ids):
    moved = torch.zeros_like(ids)
    for row, length in enumerate(LENGTHS):
        moved[row, 7 - length :] = ids[row, :length]
    return moved


def alone(model, site, ids):
    with capture(model, site, join=None) as acts:
        for row, length in enumerate(LENGTHS):
            model(ids[row : row + 1, :length])
    dim = acts[site.name][0].shape.index(LENGTHS[0])
    return torch.cat([each.movedim(dim, 1)[0] for each in acts[site.name]])


@pytest.mark.parametrize("family", _TURNED)
def test_norms_behind_rotary_embeddings_warn_of_padding_on_the_left(family):
    model, name = built(family), f"model.layers.0.{_TURNED[family][0]}"
    site, ids = Site(name, firing=0), tokens(3)
    given = {"input_ids": padded_left(ids), "attention_mask": MASK.long()}
    with (
        pytest.warns(UserWarning, match=r"padded on the left.*pass position_ids"),
        capture(model, site, mask="attention"),
    ):
        model(**given)
    given["position_ids"] = (MASK.long().cumsum(1) - 1).clamp(min=0)
    with capture(model, site, mask="attention") as acts:
        model(**given)
    torch.testing.assert_close(acts.tensor, alone(model, site, ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", _TURNED)
def test_other_sites_of_such_models_do_not_warn(family):
    model, ids = built(family), tokens(3)
    site = Site("model.layers.1")
    with capture(model, site, mask="attention") as acts:
        model(padded_left(ids), attention_mask=MASK.long())
    torch.testing.assert_close(acts.tensor, alone(model, site, ids), atol=1e-5, rtol=1e-5)


def test_a_site_that_was_captured_first_does_not_hide_the_norm_behind_it():
    model, norm = built("NanoChat"), "model.layers.0.self_attn.q_norm"
    with (
        pytest.warns(UserWarning, match="padded on the left"),
        capture(model, ["model.layers.0.input_layernorm", norm], mask="attention"),
    ):
        model(padded_left(tokens(3)), attention_mask=MASK.long())


@pytest.mark.parametrize("family", ["HunYuanDenseV1", "HunYuanMoEV1"])
def test_norms_behind_rotary_embeddings_that_weigh_make_the_whole_model_count(family):
    model, ids, site = built(family), tokens(3), Site("model.layers.1")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("query_layernorm.weight", "key_layernorm.weight")):
                weight.normal_()
    given = {"input_ids": padded_left(ids), "attention_mask": MASK.long()}
    with (
        pytest.warns(UserWarning, match=r"padded on the left.*pass position_ids"),
        capture(model, site, mask="attention"),
    ):
        model(**given)
    given["position_ids"] = (MASK.long().cumsum(1) - 1).clamp(min=0)
    with capture(model, site, mask="attention") as acts:
        model(**given)
    torch.testing.assert_close(acts.tensor, alone(model, site, ids), atol=1e-5, rtol=1e-5)


def test_scores_that_are_scaled_by_positions_count_padding():
    config = transformers.MistralLarge4TextConfig(
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
        index_topk=16,
        index_head_dim=8,
        index_n_heads=2,
        vocab_size=VOCAB,
    )
    torch.manual_seed(0)
    model, site = transformers.MistralLarge4TextModel(config).eval(), Site("layers.0")
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.2)
    ids = tokens(3)
    given = {"input_ids": padded_left(ids), "attention_mask": MASK.long()}
    with (
        pytest.warns(UserWarning, match=r"padded on the left.*pass position_ids"),
        capture(model, site, mask="attention"),
    ):
        model(**given)
    given["position_ids"] = (MASK.long().cumsum(1) - 1).clamp(min=0)
    with capture(model, site, mask="attention") as acts:
        model(**given)
    torch.testing.assert_close(acts.tensor, alone(model, site, ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("turned", [True, False])
def test_values_that_a_rotary_embedding_turns_count_padding(recwarn, turned):
    config = transformers.RoFormerConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        vocab_size=VOCAB,
        rotary_value=turned,
    )
    torch.manual_seed(0)
    model = transformers.RoFormerModel(config).eval()
    with capture(model, "encoder.layer.1", mask="attention") as acts:
        model(padded_left(tokens(3)), attention_mask=MASK.long())
    assert len(recwarn) == int(turned)
    if not turned:
        wanted = alone(model, Site("encoder.layer.1"), tokens(3))
        torch.testing.assert_close(acts.tensor, wanted, atol=1e-5, rtol=1e-5)


def test_a_decoder_whose_wrapper_says_what_its_encoder_reads_is_masked_as_tokens():
    config = transformers.WhisperConfig(
        d_model=32,
        vocab_size=VOCAB,
        decoder_layers=2,
        decoder_attention_heads=4,
        decoder_ffn_dim=48,
        encoder_layers=1,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    torch.manual_seed(0)
    model, ids, site = transformers.WhisperForCausalLM(config).eval(), tokens(3), "model.decoder"
    with capture(model, site, mask="attention") as acts:
        model(ids, attention_mask=MASK.flip(1).long())
    wanted = alone(model, Site(site), ids)
    torch.testing.assert_close(acts.tensor, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("norm", ["q_norm", "k_norm"])
def test_norms_before_rotary_embeddings_do_not_warn(norm):
    model, ids = huggingface("Qwen3ForCausalLM"), tokens(3)
    site = Site(f"model.layers.0.self_attn.{norm}")
    with capture(model, site, mask="attention") as acts:
        model(padded_left(ids), attention_mask=MASK.long())
    torch.testing.assert_close(acts.tensor, alone(model, site, ids), atol=1e-5, rtol=1e-5)


def test_rotary_tables_of_each_sequence_warn_of_padding_on_the_left():
    rotary = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    sizes = {name: size for name, size in _SIZES.items() if name != "pad_token_id"}
    config = transformers.Qwen3VLTextConfig(**sizes, rope_parameters=rotary)
    model = transformers.Qwen3VLTextModel(config).eval()
    with (
        pytest.warns(UserWarning, match="padded on the left"),
        capture(model, "rotary_emb", mask="attention"),
    ):
        model(padded_left(tokens(3)), attention_mask=MASK.long())


@pytest.fixture
def fsmt():
    sides = {"layers": 2, "attention_heads": 4, "ffn_dim": 48}
    sizes = {f"{of}_{name}": sides[name] for of in ("encoder", "decoder") for name in sides}
    config = transformers.FSMTConfig(
        langs=["en", "de"],
        src_vocab_size=VOCAB,
        tgt_vocab_size=VOCAB,
        d_model=32,
        max_position_embeddings=64,
        **sizes,
    )
    torch.manual_seed(0)
    return transformers.FSMTForConditionalGeneration(config).eval()


def translating(**options):
    target = torch.arange(5) < torch.tensor([3, 5, 2])[:, None]
    given = {"input_ids": tokens(3), "attention_mask": torch.ones(3, 7).long()}
    given |= {"decoder_input_ids": tokens(3, 5, seed=1), "decoder_attention_mask": target.long()}
    return {**given, **options}


def test_the_decoder_of_fsmt_warns_where_it_attends_to_padding(fsmt):
    with (
        pytest.warns(UserWarning, match="the decoder of FSMT attends to all tokens"),
        capture(fsmt, "model.decoder.layers.1", mask="attention"),
    ):
        fsmt(**translating())


def test_the_decoder_of_fsmt_is_right_without_a_cache(fsmt):
    given, name = translating(use_cache=False), "model.decoder.layers.1"
    with capture(fsmt, name, mask="attention") as acts:
        fsmt(**given)
    ids, decoder_ids = given["input_ids"], given["decoder_input_ids"]
    with capture(fsmt, name, join=None) as of_each:
        for row, length in enumerate((3, 5, 2)):
            target = decoder_ids[row : row + 1, :length]
            fsmt(ids[row : row + 1], decoder_input_ids=target, use_cache=False)
    wanted = torch.cat([each.reshape(-1, 32) for each in of_each[name]])
    torch.testing.assert_close(acts.tensor, wanted, atol=1e-5, rtol=1e-5)


def test_the_encoder_of_fsmt_does_not_warn(fsmt):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with capture(fsmt, "model.encoder.layers.1", mask="attention"):
            fsmt(**translating())


def test_a_decoder_of_fsmt_that_makes_its_own_tokens_does_not_warn(fsmt):
    given = {name: value for name, value in translating().items() if name != "decoder_input_ids"}
    given["decoder_attention_mask"] = torch.ones(3, 7).long()
    with capture(fsmt, "model.decoder.layers.1", mask="attention") as acts:
        fsmt(**given)
    assert len(acts.tensor) == 3 * 7


@pytest.fixture
def cpmant():
    config = transformers.CpmAntConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_attention_heads=4,
        dim_head=8,
        dim_ff=48,
        num_hidden_layers=2,
        prompt_length=3,
    )
    torch.manual_seed(0)
    return transformers.CpmAntForCausalLM(config).eval()


def test_cpm_ant_warns_of_padding_on_the_right(cpmant):
    right = MASK.flip(1)
    with (
        pytest.warns(UserWarning, match="CPM-Ant assumes padding on the left"),
        capture(cpmant, "lm_head", mask="attention"),
    ):
        cpmant(input_ids=tokens(3) * right, attention_mask=right.long())


def test_cpm_ant_is_right_with_padding_on_the_left(cpmant):
    ids = tokens(3)
    with capture(cpmant, "lm_head", mask="attention") as acts:
        cpmant(input_ids=padded_left(ids), attention_mask=MASK.long())
    wanted = alone(cpmant, Site("lm_head"), ids)
    torch.testing.assert_close(acts.tensor, wanted, atol=1e-5, rtol=1e-5)


def test_the_prompts_of_cpm_ant_are_not_masked_as_tokens(cpmant):
    with (
        pytest.raises(SelectionError, match="has 10 positions, but the forward's mask has 7"),
        capture(cpmant, "cpmant.encoder.layers.1", mask="attention"),
    ):
        cpmant(input_ids=padded_left(tokens(3)), attention_mask=MASK.long())
