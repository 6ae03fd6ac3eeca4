"""From names to places."""

import pytest
import torch
from models import Mlp, bridge, huggingface
from torch import nn

from actctx import AxisError, HookNameError, OptionError, Site, capture, hook_names
from actctx._model.globs import matches

RESID = "blocks.1.hook_resid_post"


def _captured(model, names, ids):
    with capture(model, names) as acts:
        model(ids)
    return acts


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("blocks.*.hook_out", "blocks.3.hook_out", True),
        ("blocks.*.hook_out", "blocks.3.attn.hook_out", False),
        ("blocks.**.hook_out", "blocks.3.attn.q.hook_out", True),
        ("blocks.**.hook_out", "blocks.hook_out", True),
        ("blocks.[0-3].hook_out", "blocks.3.hook_out", True),
        ("blocks.[0-3].hook_out", "blocks.4.hook_out", False),
        ("blocks.?.hook_out", "blocks.10.hook_out", False),
        ("*resid_post", "blocks.3.hook_resid_post", True),
        ("hook_*", "blocks.3.attn.hook_q", True),
        ("*", "blocks.3.attn.hook_q", True),
        ("**", "blocks.3.attn.hook_q", True),
        ("**.hook_q", "blocks.3.attn.hook_q", True),
        ("*.hook_q", "blocks.3.attn.hook_q", False),
        ("blocks.**", "blocks.3.attn.hook_q", True),
        ("blocks.3.hook_out", "blocks.3.hook_out", True),
        ("HOOK_Q", "blocks.3.attn.hook_q", False),
    ],
)
def test_a_glob_stays_within_a_component_unless_it_says_otherwise(pattern, name, expected):
    assert matches(name, pattern) is expected


def test_an_alias_and_its_canonical_name_are_captured_once(gpt2, ids):
    acts = _captured(gpt2, ["blocks.1.hook_out", RESID], ids)
    assert list(acts) == ["blocks.1.hook_out"]
    assert acts[RESID] is acts["blocks.1.hook_out"]


def test_a_glob_names_what_it_matched(gpt2, ids):
    acts = _captured(gpt2, "blocks.*.hook_resid_post", ids)
    assert list(acts) == ["blocks.0.hook_resid_post", RESID]


def test_a_predicate_chooses_names(gpt2, ids):
    acts = _captured(gpt2, lambda name: name.endswith("hook_z"), ids)
    assert list(acts) == ["blocks.0.attn.hook_z", "blocks.1.attn.hook_z"]


def test_an_iterable_mixes_names_globs_sites_and_predicates(gpt2, ids):
    names = [RESID, "*hook_q", Site("blocks.0.hook_out"), lambda name: name == "ln_final.hook_in"]
    acts = _captured(gpt2, names, ids)
    assert list(acts) == [
        "blocks.0.attn.hook_q",
        "blocks.0.hook_out",
        "blocks.1.attn.hook_q",
        RESID,
        "ln_final.hook_in",
    ]


def test_a_mapping_gives_aliases(gpt2, ids):
    acts = _captured(gpt2, {"resid": RESID}, ids)
    assert torch.equal(acts.resid, acts[RESID])
    assert list(acts) == ["resid"]


def test_a_glob_and_a_name_of_one_place_are_one_site(gpt2, ids):
    acts = _captured(gpt2, ["blocks.*.hook_resid_post", RESID], ids)
    assert list(acts) == ["blocks.0.hook_resid_post", RESID]


def test_a_site_with_a_glob_gives_its_options_to_all_that_match(gpt2, ids):
    acts = _captured(gpt2, Site("*hook_pattern", slice={"head": 0}), ids)
    assert [acts[name].shape for name in acts] == [(3, 7, 7)] * 2


def test_a_glob_that_matches_no_hook_point_matches_modules(gpt2, ids):
    assert list(_captured(gpt2, "blocks.*", ids)) == ["blocks.0", "blocks.1"]


def test_modules_of_a_plain_model_match_globs(llama, ids):
    assert list(_captured(llama, "model.layers.*", ids)) == ["model.layers.0", "model.layers.1"]


def test_the_model_itself_is_captured_by_its_empty_name(mlp, ids):
    with capture(mlp, "") as acts:
        output = mlp(ids)
    assert torch.equal(acts.tensor, output)


def test_a_shared_module_is_one_place_under_both_names(ids):
    model = Mlp()
    model.again = model.block
    acts = _captured(model, ["block", "again"], ids)
    assert list(acts) == ["block"]
    assert acts["again"] is acts["block"]


def test_hook_points_inside_a_plain_module_are_hook_points(ids):
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = bridge()

        def forward(self, ids):
            return self.inner(ids)

    acts = _captured(Wrapper(), "inner.blocks.0.attn.q.hook_out", ids)
    assert acts.tensor.shape == (3, 7, 4, 8)


def test_equal_slices_that_hold_tensors_do_not_confuse(gpt2, ids):
    index = torch.tensor([0, 1])
    sites = [Site(RESID, slice=index), Site("blocks.1.hook_out", slice=index)]
    assert list(_captured(gpt2, sites, ids)) == [RESID]


@pytest.mark.parametrize("names", ["blocks.9.hook_out", ["blocks.0.hook_out", "blocks.9.hook_out"]])
def test_an_unknown_name_is_refused_before_the_model_is_touched(gpt2, names):
    with pytest.raises(HookNameError):
        capture(gpt2, names)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("names", [3, None, [3], {"a": None}, torch.zeros(2)])
def test_what_names_nothing_is_refused(gpt2, names):
    with pytest.raises((OptionError, HookNameError)):
        capture(gpt2, names)


@pytest.mark.parametrize("names", [[], {}, lambda _: False])
def test_names_that_ask_for_nothing_are_refused(gpt2, names):
    with pytest.raises(HookNameError, match="no hook point was requested"):
        capture(gpt2, names)


# Listing.


def test_hook_points_are_listed_as_they_run(gpt2):
    resid = [name for name in hook_names(gpt2) if "resid" in name]
    assert resid == [
        f"blocks.{layer}.hook_resid_{part}" for layer in (0, 1) for part in ("pre", "mid", "post")
    ]


@pytest.mark.parametrize(
    "architecture", ["GPT2LMHeadModel", "LlamaForCausalLM", "Gemma3ForCausalLM", "PhiForCausalLM"]
)
def test_all_names_of_a_bridge_are_listed_once_in_running_order(architecture, ids):
    model = bridge(architecture)
    ran = []
    for point in {id(point): point for point in model.hook_dict.values()}.values():
        point.add_hook(lambda activation, hook: ran.append(hook.name))  # noqa: ARG005
    model(ids)
    listed = hook_names(model)
    assert sorted(listed) == sorted(model.hook_dict)
    assert [name for name in listed if name in ran] == ran


def test_an_alias_is_listed_behind_its_canonical_name(gpt2):
    listed = hook_names(gpt2, "blocks.0.*")
    assert listed[:2] == ["blocks.0.hook_in", "blocks.0.hook_resid_pre"]


def test_layer_ten_is_listed_behind_layer_two(ids):
    import transformers
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    config = transformers.GPT2Config(n_embd=8, n_layer=11, n_head=2, vocab_size=50)
    model = build_bridge_from_module(
        transformers.GPT2LMHeadModel(config), "GPT2LMHeadModel", hf_config=config
    )
    listed = hook_names(model, "blocks.*.hook_resid_post")
    assert listed == [f"blocks.{layer}.hook_resid_post" for layer in range(11)]
    acts = _captured(model, "blocks.*.hook_resid_post", ids)
    assert list(acts) == listed
    assert acts.stack("hook_resid_post").shape == (11, 3, 7, 8)


def test_modules_of_a_plain_model_are_listed():
    names = hook_names(huggingface("LlamaForCausalLM"), "model.layers.0.*")
    assert names == [
        "model.layers.0.self_attn",
        "model.layers.0.mlp",
        "model.layers.0.input_layernorm",
        "model.layers.0.post_attention_layernorm",
    ]


def test_what_is_listed_may_be_chosen_by_a_predicate():
    names = hook_names(huggingface("LlamaForCausalLM"), lambda name: name.endswith("0.mlp"))
    assert names == ["model.layers.0.mlp"]


@pytest.mark.parametrize("name", ["blocks.9.hook_resid_post", "blocks.-1.hook_resid_post"])
def test_a_layer_that_is_not_there_is_told_of_those_that_are(gpt2, llama, name):
    for model in (gpt2, llama):
        with pytest.raises(HookNameError, match="; it has layers 0 to 1 "):
            capture(model, name)


def test_a_name_without_a_layer_is_told_of_none(gpt2):
    with pytest.raises(HookNameError) as refused:
        capture(gpt2, "blocks.0.hook_resid_pst")
    assert "layers" not in str(refused.value)


def test_heads_of_grouped_queries_are_named(llama):
    with pytest.raises(AxisError, match="select along 'kv_head', which several heads share"):
        capture(llama, "blocks.0.attn.hook_k", slice={"head": 0})
