"""TransformerLens' names on plain models whose layers, heads or outputs are unlike others."""

import copy
import re

import pytest
import torch
import transformers
from families import (
    FAMILIES,
    GATED,
    GEMMA4,
    TEXT,
    VISION,
    WRONG,
    build,
    build_bridge,
    config_of,
    run,
)
from models import GENERATION, VOCAB, hooks_of, tokens
from torch import nn
from torch.nn import functional
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from actctx import HookNameError, OutputError, Site, capture, hook_names
from actctx._model.heads import Heads
from actctx._model.places import Places

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.skipif(GENERATION < 4, reason="their adapters came with TransformerLens 4"),
]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


def test_every_name_is_captured_as_on_a_bridge(family):
    model, whole = build(family), build_bridge(family)
    before = hooks_of(model)
    with capture(model, "**.hook_*", check=False) as acts:
        run(model)
    with capture(whole, "**.hook_*", check=False) as expected:
        run(whole, whole.original_model)
    assert hooks_of(model) == before
    canonical = {name: point.name for name, point in whole.hook_dict.items()}
    assert {name for names in Places(model).listed_translated() for name in names} <= {*canonical}
    wrong = re.compile(WRONG.get(family, "none"))
    compared = 0
    for name in acts:
        if canonical[name] in expected and not wrong.fullmatch(name):
            found, wanted = acts.firings(name)[0], expected.firings(canonical[name])[0]
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4, msg=name)
            compared += 1
    assert compared > 20


def test_aliases_are_those_of_a_bridge(family):
    point_of = {name: point.name for name, point in build_bridge(family).hook_dict.items()}
    for name, target in Places(build(family)).translation.aliases.items():
        assert point_of[name] == point_of[target], name


def test_what_is_listed_fires(family):
    model = build(family)
    with capture(model, "**.hook_*", check=False) as acts:
        run(model)
    assert acts.missing == ()


@pytest.fixture
def attended():
    """What attention of any model is given and gives, module by module, as `attn` runs it."""
    seen = {}

    def attend(module, query, key, value, _mask, **_kwargs):
        repeated = [
            each.repeat_interleave(query.shape[1] // each.shape[1], 1) for each in (key, value)
        ]
        output = functional.scaled_dot_product_attention(query, *repeated).transpose(1, 2)
        seen[module] = (query, key, value, output)
        return output, None

    ALL_ATTENTION_FUNCTIONS.register("noted", attend)
    yield seen
    ALL_ATTENTION_FUNCTIONS._global_mapping.pop("noted")


_ATTENDING = [
    "Gemma4ForConditionalGeneration",
    "Qwen3NextForCausalLM",
    "Qwen3_5ForCausalLM",
    "OlmoHybridForCausalLM",
    "ViTModel",
    "HubertModel",
]


@pytest.mark.parametrize("name", _ATTENDING)
def test_heads_are_those_that_a_layer_attends_with(name, attended):
    model = build(name)
    for module in model.modules():
        if "config" in vars(module):
            module.config._attn_implementation_internal = "noted"
    points = Places(model).translation.points
    names = [
        each for each in points if re.search(r"attn\.(q|k|v)\.hook_out|attn\.o\.hook_in", each)
    ]
    assert names
    with capture(model, names, check=False) as acts:
        run(model)
    assert attended
    for each in names:
        path, _, key = each.rpartition(".attn.")
        module = model.get_submodule(points[f"{path}.attn.hook_in"][0])
        query, keys, values, output = attended[module]
        found = acts[each]
        if key == "o.hook_in":
            assert found.shape == output.shape
            if not name.startswith("Qwen3"):  # which gate it after attention
                torch.testing.assert_close(found, output)
            continue
        given = {"q": query, "k": keys, "v": values}[key[0]].transpose(1, 2)
        norm = getattr(module, f"{key[0]}_norm", None)
        if norm is not None:
            flat = name == "OlmoHybridForCausalLM"
            found = norm(found.flatten(2)).unflatten(2, found.shape[2:]) if flat else norm(found)
        assert found.shape == given.shape
        # Rotary embeddings turn queries and keys, and leave them as long as they are.
        torch.testing.assert_close(found.norm(dim=-1), given.norm(dim=-1), atol=1e-5, rtol=1e-5)


def _shapes(model, *names):
    with capture(model, list(names), check=False) as acts:
        run(model)
    return [tuple(acts[name].shape) for name in names]


def test_heads_are_as_large_as_those_of_their_layer():
    model = build("Gemma4ForConditionalGeneration")
    names = [f"blocks.{layer}.attn.hook_{key}" for layer in (0, 1) for key in "qkz"]
    small, large = (3, 7, 4, 8), (3, 7, 4, 16)
    assert _shapes(model, *names) == [small, (3, 7, 1, 8), small, large, (3, 7, 1, 16), large]


def test_heads_of_a_text_model_whose_config_has_values_by_layer_are_its_layers():
    config = transformers.Gemma4TextConfig(**GEMMA4)
    config._attn_implementation = "eager"
    points = Places(transformers.Gemma4ForCausalLM(config)).translation.points
    sizes = [points[f"blocks.{layer}.attn.q.hook_out"][1].part.d_head for layer in (0, 1)]
    assert sizes == [8, 16]


@pytest.mark.parametrize("name", ["Qwen3NextForCausalLM", "Qwen3_5ForCausalLM"])
def test_gates_are_no_heads(name):
    model = build(name)
    joint = "model.layers.1.self_attn.q_proj"
    with capture(model, [joint, "blocks.1.attn.hook_q"], check=False) as acts:
        run(model)
    both = acts[joint].unflatten(-1, (4, 16))
    assert torch.equal(acts["blocks.1.attn.hook_q"], both[..., :8])


def test_gates_of_a_composite_are_no_heads():
    config = transformers.Qwen3_5Config(
        text_config=GATED,
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 4,
            "out_hidden_size": 32,
            "patch_size": 4,
        },
    )
    config.text_config.rope_parameters["mrope_section"] = [1, 0, 0]
    torch.manual_seed(0)
    model = transformers.Qwen3_5ForConditionalGeneration(config).eval()
    joint = "model.language_model.layers.1.self_attn.q_proj"
    with capture(model, [joint, "blocks.1.attn.hook_q"], check=False) as acts:
        run(model)
    assert torch.equal(acts["blocks.1.attn.hook_q"], acts[joint].unflatten(-1, (4, 16))[..., :8])


def test_what_latent_attention_mixes_has_the_heads_of_its_values():
    assert _shapes(build("DeepseekV3ForCausalLM"), "blocks.0.attn.hook_z") == [(3, 7, 4, 16)]


def _refused(model, name):
    with pytest.raises(HookNameError) as caught:
        capture(model, name)
    return str(caught.value)


def test_heads_that_do_not_add_up_are_refused():
    model = build("GptOssForCausalLM")
    for layer in model.model.layers:
        layer.self_attn.head_dim = 12
    for key, projection, verb, io in (
        ("q", "q_proj", "returns", ""),
        ("z", "o_proj", "is given", ", io='in'"),
    ):
        where = f"model.layers.0.self_attn.{projection}"
        assert _refused(model, f"blocks.0.attn.hook_{key}") == (
            f"no hook point matches 'blocks.0.attn.hook_{key}': what {where!r} {verb} cannot be "
            "reliably split into heads (the GptOssAttention says neither the number nor the size "
            f"of its heads); capture it whole, with Site({where!r}{io})"
        )


def test_an_adapter_that_changes_keys_by_layer_is_asked_for_each():
    model = build("OlmoHybridForCausalLM")
    names = [f"blocks.{layer}.hook_{end}" for layer in (0, 1) for end in ("attn_out", "resid_mid")]
    with (
        capture(model, names) as acts,
        capture(
            model,
            {
                "linear": "model.layers.0.linear_attn",
                "pre": Site("model.layers.0.post_attention_layernorm", io="in"),
                "post": "model.layers.1.post_attention_layernorm",
                "mlp": Site("model.layers.1.mlp", io="in"),
            },
        ) as own,
    ):
        run(model)
    for name, expected in zip(names, (own.linear, own.pre, own.post, own.mlp), strict=True):
        assert torch.equal(acts[name], expected), name


def test_the_parts_of_a_merged_pattern_are_told_apart():
    model = build("T5Gemma2ForConditionalGeneration")
    ours, theirs = (
        f"decoder_blocks.0.self_attn.hook_{part}" for part in ("pattern", "cross_pattern")
    )
    with capture(model, [ours, theirs], check=False) as acts:
        run(model)
    assert acts[ours].shape == (3, 4, 5, 5)
    assert acts[theirs].shape == (3, 4, 5, 7)
    sums = acts[ours].sum(-1) + acts[theirs].sum(-1)
    torch.testing.assert_close(sums, torch.ones(3, 4, 5))


def test_a_pattern_with_sinks_is_one():
    model = build("GptOssForCausalLM")
    with capture(model, "blocks.0.attn.hook_pattern") as acts:
        run(model)
    rows = acts.tensor.sum(-1)
    assert (rows < 1).all()
    assert (rows > 0).all()


def test_a_position_bias_is_no_pattern():
    config = transformers.T5Config(
        d_model=32, d_ff=48, d_kv=8, num_layers=1, num_heads=4, vocab_size=VOCAB
    )
    config._attn_implementation = "eager"
    model = transformers.T5ForConditionalGeneration(config).eval()
    with capture(model, "encoder_blocks.0.attn.hook_pattern") as acts, torch.no_grad():
        model(input_ids=tokens(), decoder_input_ids=tokens())
    torch.testing.assert_close(acts.tensor.sum(-1), torch.ones(3, 4, 7))


def test_what_is_returned_in_place_of_a_pattern_is_refused():
    model = build("DeepseekV3ForCausalLM")
    attention = model.model.layers[0].self_attn

    def scores(_module, _args, output):
        return output[0], output[1] - 0.5

    attention.register_forward_hook(scores)
    with (
        pytest.raises(OutputError) as caught,
        capture(model, "blocks.0.attn.hook_pattern"),
    ):
        run(model)
    assert str(caught.value) == (
        "'blocks.0.attn.hook_pattern' is looked for among what 'model.layers.0.self_attn' returns, "
        "but of its tensors ((3, 7, 32), (3, 4, 7, 7)) none is an attention pattern, whose rows "
        "sum to 1; capture it from a TransformerBridge of the model"
    )
    with capture(model, "blocks.*.attn.hook_pattern") as acts:
        run(model)
    assert acts.missing == ("blocks.0.attn.hook_pattern",)


def test_a_pattern_in_training_is_captured_with_what_it_drops():
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{**TEXT, "attention_dropout": 0.5}, attn_implementation="eager")
    )
    model.train()
    with capture(model, "blocks.0.attn.hook_pattern") as acts:
        model(tokens())
    assert (acts.tensor.sum(-1) > 1.1).any()


def test_attention_that_returns_another_pattern_is_told():
    said = _refused(build("LongT5ForConditionalGeneration"), "encoder_blocks.0.attn.hook_pattern")
    assert said == (
        "no hook point matches 'encoder_blocks.0.attn.hook_pattern': "
        "'encoder.block.0.layer.0.LocalSelfAttention' returns no attention pattern of the shape "
        "batch head query key; capture what it returns by that name, or capture from a "
        "TransformerBridge of the model"
    )


def test_towers_that_attend_in_different_ways_have_patterns_each_for_itself():
    text = {**TEXT, "num_key_value_heads": 4, "model_type": "llama"}
    vision = {**VISION, "model_type": "clip_vision_model", "num_hidden_layers": 3}
    config = transformers.LlavaConfig(
        text_config=text, vision_config=vision, image_token_index=VOCAB - 1
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    model.set_attn_implementation({"text_config": "eager", "vision_config": "sdpa"})
    assert hook_names(model, "blocks.0.attn.hook_pattern")
    assert "is 'sdpa', which does not compute patterns" in _refused(
        model, "vision_encoder.encoder_layers.0.attn.hook_pattern"
    )
    model.set_attn_implementation({"text_config": "sdpa", "vision_config": "eager"})
    assert not hook_names(model, "blocks.0.attn.hook_pattern")
    assert hook_names(model, "vision_encoder.encoder_layers.0.attn.hook_pattern")


@pytest.mark.parametrize(
    ("family_name", "point", "module"),
    [
        ("MambaForCausalLM", "blocks.0.mixer.conv1d.hook_out", "backbone.layers.0.mixer.conv1d"),
        ("MambaForCausalLM", "blocks.1.mixer.dt_proj.hook_in", "backbone.layers.1.mixer.dt_proj"),
        ("LongT5ForConditionalGeneration", "hook_embed", "shared"),
    ],
)
def test_what_no_forward_calls_is_told(family_name, point, module):
    model = build(family_name)
    assert point not in hook_names(model, "**.hook_*")
    assert _refused(model, point) == (
        f"no hook point matches {point!r}: no forward of this {family_name} calls {module!r} (it "
        "may take its weights alone); capture the module around it, or capture from a "
        "TransformerBridge of the model"
    )


def test_what_is_given_no_tensor_is_told():
    assert _refused(build("PegasusForConditionalGeneration"), "pos_embed.hook_in") == (
        "no hook point matches 'pos_embed.hook_in': what 'model.encoder.embed_positions' is given "
        "first is not a tensor; capture what it returns, by its own name"
    )


def test_a_head_that_an_adapter_refuses_leaves_the_names_of_the_body():
    torch.manual_seed(0)
    config = transformers.DeiTConfig(**VISION)
    for kind in ("DeiTForImageClassificationWithTeacher", "DeiTForMaskedImageModeling"):
        model = getattr(transformers, kind)(config).eval()
        with capture(model, ["blocks.1.hook_resid_post", "deit.layers.1"]) as acts:
            run(model)
        assert torch.equal(acts["blocks.1.hook_resid_post"], acts["deit.layers.1"])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("BertForSequenceClassification", "BertConfig"),
        ("BertModel", "BertConfig"),
        ("RobertaForTokenClassification", "RobertaConfig"),
        ("LlamaForSequenceClassification", "LlamaConfig"),
        ("LlamaModel", "LlamaConfig"),
        ("Gemma3Model", "Gemma3Config"),
        ("T5EncoderModel", "T5Config"),
        ("PhimoeForCausalLM", "PhimoeConfig"),
    ],
)
def test_classes_beside_those_of_language_models_have_names(name, kind):
    sizes = {name: size for name, size in TEXT.items() if name != "head_dim"}
    if kind == "T5Config":
        sizes = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4}
    if kind == "Gemma3Config":
        sizes = {
            "text_config": TEXT,
            "vision_config": {**VISION, "model_type": "siglip_vision_model"},
        }
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, kind)(**sizes)).eval()
    prefix = "encoder_blocks" if kind == "T5Config" else "blocks"
    post = f"{prefix}.1.hook_resid_post"
    point = Places(model).translation.points[f"{prefix}.1.hook_out"][0]
    with capture(model, [post, point], check=False) as acts, torch.no_grad():
        model(input_ids=tokens())
    assert torch.equal(acts[post], acts[point])
    assert re.search(r"(layers?|block)\.1$", point)


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("ViTForImageClassification", "classifier"),
        ("ASTForAudioClassification", "classifier.dense"),
        ("HubertForCTC", "lm_head"),
        ("Wav2Vec2ForCTC", "lm_head"),
    ],
)
def test_heads_that_an_adapter_adds_for_a_model_have_names(name, head):
    model = build(name)
    with capture(model, ["unembed.hook_out", head], check=False) as acts:
        run(model)
    assert torch.equal(acts["unembed.hook_out"], acts[head])


def test_a_subclass_of_a_model_has_its_names():
    class Own(transformers.LlamaForCausalLM):
        pass

    model = Own(transformers.LlamaConfig(**TEXT)).eval()
    assert hook_names(model, "blocks.1.hook_resid_post") == ["blocks.1.hook_resid_post"]


def test_asking_for_names_leaves_a_model_as_it_is():
    model = build("Qwen3_5ForCausalLM")
    fired = []
    model.model.layers[0].register_forward_hook(lambda *_: fired.append(1))
    model.train()
    modules = dict(model.named_modules())
    config, state = model.config.to_dict(), copy.deepcopy(model.state_dict())
    attributes = {name: [*vars(module)] for name, module in modules.items()}
    torch.manual_seed(5)
    random = torch.get_rng_state()
    assert hook_names(model, "**.hook_*")
    assert torch.equal(torch.get_rng_state(), random)
    assert fired == []
    assert model.training
    assert dict(model.named_modules()) == modules
    assert model.config.to_dict() == config
    assert {name: [*vars(module)] for name, module in modules.items()} == attributes
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())


def test_names_are_found_where_no_weight_has_a_value():
    config = config_of("Qwen3_5ForCausalLM")
    with torch.device("meta"):
        model = transformers.Qwen3_5ForCausalLM(config)
    part = Places(model).translation.points["blocks.1.attn.q.hook_out"][1].part
    assert isinstance(part, Heads)
    assert part.d_head == 8


class _Strange(nn.Module):
    def forward(self, hidden):
        return torch.cat([hidden, hidden], -1)


def test_a_model_that_does_not_run_without_values_has_its_names(capfd):
    config = transformers.LlamaConfig(**TEXT)
    model = transformers.LlamaForCausalLM(config).eval()
    model.model.layers[0].mlp.down_proj = _Strange()
    assert len(hook_names(model, "blocks.*.hook_resid_post")) == 2
    assert capfd.readouterr() == ("", "")


def test_windows_of_attention_are_no_pattern():
    config = transformers.LEDConfig(
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        attention_window=4,
        vocab_size=VOCAB,
    )
    config._attn_implementation = "eager"
    model = transformers.LEDForConditionalGeneration(config).eval()
    windows = "encoder_blocks.0.attn.hook_pattern"
    given = {"input_ids": tokens(pos=8), "decoder_input_ids": tokens(), "output_attentions": True}
    with pytest.raises(OutputError, match="none is an attention pattern"), capture(model, windows):
        model(**given)
    with capture(model, "**.self_attn.hook_pattern") as acts:
        model(**given)
    assert [acts[name].shape for name in acts] == [(3, 4, 7, 7)] * 2
