"""What only TransformerLens 2 and 3 have, and hooked modules of one's own."""

import pytest
import torch
from models import (
    BATCH,
    GENERATION,
    POS,
    VOCAB,
    hooked_config,
    hooks_of,
    plainly_hooked,
    tiny_transformer,
    tokens,
)
from torch import nn

from actctx import HooksRemovedError, NeverFiredError, SeveralFiringsError, Site, Stopped, capture
from actctx._capture.cache_size import count_cache_bytes, estimate_cache_bytes
from actctx._model.axes import axis_sizes

hooked = pytest.mark.skipif(GENERATION >= 4, reason="TransformerLens 4.0 removed these models")
LLAMA = {
    "n_key_value_heads": 2,
    "gated_mlp": True,
    "act_fn": "silu",
    "positional_embedding_type": "rotary",
    "rotary_dim": 8,
    "normalization_type": "RMS",
}
FLAGS = {
    "use_attn_result": True,
    "use_hook_mlp_in": True,
    "use_split_qkv_input": True,
}


UNGROUPED = {**LLAMA, "ungroup_grouped_query_attention": True}
EXPERTS = {"num_experts": 4, "experts_per_token": 2}
DECODER_POS = 5


def _agrees(model, ids, **kwargs):
    """Assert that every hook point that fires is captured as a plain hook sees it."""
    before = hooks_of(model)
    expected = plainly_hooked(model, ids, **kwargs)
    with capture(model, "**") as acts:
        model(ids, **kwargs)
    assert set(acts) == set(expected)
    for name, firings in expected.items():
        assert len(acts.firings(name)) == len(firings)
        for found, wanted in zip(acts.firings(name), firings, strict=True):
            assert torch.equal(found, wanted), name
    assert hooks_of(model) == before
    return acts


def _names_all_axes(model, acts, *, beside=()):
    """Assert that the axes of what was captured have the sizes of the input and the config."""
    sizes = {axis: {size} for axis, size in axis_sizes(model).items()}
    sizes |= {axis: {POS, *beside} for axis in ("pos", "query", "key")}
    sizes |= {"batch": {BATCH}, "1": {1}, "d_vocab": {VOCAB}, "d_mlp": {model.cfg.d_mlp}}
    sizes |= {"expert": {4}, "choice": {2}}
    for name in acts:
        axes, shape = acts.axes(name), acts.firings(name)[0].shape
        assert len(axes) == len(shape)
        for axis, size in zip(axes, shape, strict=True):
            assert axis == "token" or size in sizes[axis], (name, axes, shape)


def _initialised(model):
    """Draw the parameters, which the hooked encoders leave as they found their memory."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.eval()


@hooked
@pytest.mark.parametrize(
    "options",
    [
        {},
        LLAMA,
        FLAGS,
        {**LLAMA, **FLAGS},
        {"use_attn_in": True},
        UNGROUPED,
        {**UNGROUPED, **FLAGS},
        {**UNGROUPED, "use_attn_in": True},
        EXPERTS,
        {"parallel_attn_mlp": True},
        {"attn_only": True},
        {"act_fn": "solu_ln"},
    ],
)
def test_a_hooked_transformer_is_captured_bit_for_bit(ids, options):
    model = tiny_transformer(**options)
    _names_all_axes(model, _agrees(model, ids))


@hooked
@pytest.mark.parametrize("options", [{}, LLAMA, FLAGS, {**LLAMA, **FLAGS}])
def test_what_a_cache_would_hold_is_estimated_from_the_axes(ids, options):
    model = tiny_transformer(**options)
    counted = count_cache_bytes(model, lambda: model(ids))
    assert 0.85 < estimate_cache_bytes(model, *ids.shape) / counted < 1.05


@hooked
@pytest.mark.parametrize("options", [{}, LLAMA])
def test_a_hooked_transformer_stops_anywhere(ids, options):
    model = tiny_transformer(**options)
    expected = plainly_hooked(model, ids)
    for name, firings in expected.items():
        with capture(model, name, stop=True, join=None) as acts:
            assert isinstance(model(ids), Stopped)
        assert torch.equal(acts[name][0], firings[0]), name
    last = "ln_final.hook_normalized"
    assert torch.equal(plainly_hooked(model, ids)[last][0], expected[last][0])


@hooked
def test_a_norm_that_is_split_fires_three_times(ids):
    model = tiny_transformer(use_split_qkv_input=True)
    name = "blocks.0.ln1.hook_normalized"
    with capture(model, name) as acts:
        model(ids)
    with pytest.raises(SeveralFiringsError):
        acts[name]
    assert [part.shape for part in acts.firings(name)] == [(3, 7, 4, 32)] * 3
    assert acts.axes(name) == ("batch", "pos", "head", "d_model")
    with capture(model, {"query": Site(name, firing=0), "value": Site(name, firing=-1)}) as acts:
        model(ids)
    assert acts["query"].shape == acts["value"].shape == (3, 7, 4, 32)


@hooked
def test_grouped_heads_are_told_apart(ids):
    model = tiny_transformer(**LLAMA)
    with capture(model, ["blocks.0.attn.hook_q", "blocks.0.attn.hook_k"]) as acts:
        model(ids)
    assert acts.axes("blocks.0.attn.hook_k") == ("batch", "pos", "kv_head", "d_head")
    assert acts["blocks.0.attn.hook_k"].shape == (3, 7, 2, 8)
    with pytest.raises(LookupError, match="has no axis 'head'"):
        capture(model, "blocks.0.attn.hook_k", slice={"head": 3})


@hooked
def test_ungrouped_heads_are_selected_as_heads(ids):
    model = tiny_transformer(**UNGROUPED)
    name = "blocks.0.attn.hook_k"
    with capture(model, name, slice={"head": 3}) as acts:
        model(ids)
    assert acts.axes(name) == ("batch", "pos", "d_head")
    assert torch.equal(acts.tensor, plainly_hooked(model, ids, name)[name][0][:, :, 3])


@hooked
def test_a_router_and_its_experts_have_a_row_a_token(ids):
    model = tiny_transformer(**EXPERTS)
    with capture(model, "blocks.0.mlp.**") as acts:
        model(ids)
    assert acts.axes("blocks.0.mlp.hook_expert_weights") == ("token", "expert")
    assert acts.axes("blocks.0.mlp.hook_expert_indices") == ("token", "choice")
    chosen = acts["blocks.0.mlp.hook_expert_indices"]
    for expert in range(4):
        name = f"blocks.0.mlp.experts.{expert}.hook_post"
        assert acts.axes(name) == ("token", "d_mlp")
        assert len(acts[name]) == (chosen == expert).sum()


@hooked
def test_no_stale_hook_is_left_in_the_list_of_a_hook_point(ids):
    model = tiny_transformer()
    point = model.hook_dict["blocks.0.hook_resid_post"]
    with capture(model, "blocks.0.hook_resid_post"):
        model(ids)
        assert len(point.fwd_hooks) == 1
    assert point.fwd_hooks == []
    assert not point._forward_hooks


@hooked
def test_reset_hooks_is_noticed(ids):
    model = tiny_transformer()
    with pytest.raises(HooksRemovedError), capture(model, "blocks.0.hook_resid_post"):
        model.reset_hooks()
        model(ids)


@hooked
def test_a_hooked_encoder_is_captured_bit_for_bit(ids):
    from transformer_lens import HookedEncoder

    config = hooked_config(attention_dir="bidirectional", normalization_type="LN")
    model = _initialised(HookedEncoder(config))
    acts = _agrees(model, ids)
    _names_all_axes(model, acts)
    assert acts.axes("blocks.0.attn.hook_pattern") == ("batch", "head", "query", "key")


@hooked
def test_a_hooked_encoder_decoder_is_captured_bit_for_bit(ids):
    from transformer_lens import HookedEncoderDecoder

    config = hooked_config(
        act_fn="relu",
        attention_dir="bidirectional",
        normalization_type="RMS",
        positional_embedding_type="relative_positional_bias",
        use_attn_scale=False,
        tie_word_embeddings=False,
        relative_attention_max_distance=128,
        relative_attention_num_buckets=32,
    )
    model = _initialised(HookedEncoderDecoder(config))

    acts = _agrees(model, ids, decoder_input=tokens(3, DECODER_POS))
    _names_all_axes(model, acts, beside=(DECODER_POS,))
    assert acts.axes("decoder.0.hook_resid_mid_cross") == ("batch", "pos", "d_model")


def test_a_hooked_module_of_ones_own_is_captured(ids):
    from transformer_lens.hook_points import HookPoint

    try:
        from transformer_lens.HookedRootModule import HookedRootModule
    except ModuleNotFoundError:  # before 3.0
        from transformer_lens.hook_points import HookedRootModule

    class Toy(HookedRootModule):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(50, 8)
            self.hook_middle = HookPoint()
            self.head = nn.Linear(8, 2)
            self.setup()

        def forward(self, ids):
            return self.head(self.hook_middle(self.embed(ids)))

    acts = _agrees(Toy(), ids)
    assert acts.axes("hook_middle") == ("_", "_", "_")


# What is switched off.


@hooked
@pytest.mark.parametrize("name", ["hook_result", "hook_q_input", "hook_attn_in", "hook_mlp_in"])
@pytest.mark.parametrize("options", [{}, LLAMA, {"attn_only": True, "d_mlp": None}])
def test_what_is_advised_for_what_is_off_works_when_followed(name, options, ids):
    model = tiny_transformer(**options)
    with pytest.raises(NeverFiredError) as caught:
        capture(model, name).__enter__()
    said = str(caught.value)
    if options and name == ("hook_attn_in" if options is LLAMA else "hook_mlp_in"):
        flag = {"hook_attn_in": "use_attn_in", "hook_mlp_in": "use_hook_mlp_in"}[name]
        assert f"{flag} is off, and " in said
        with pytest.raises(AssertionError):
            getattr(model, f"set_{flag}")(True)  # noqa: FBT003  as TransformerLens has it
        return
    call = said.partition(": call model.")[2].removesuffix("(True) first")
    getattr(model, call)(True)  # noqa: FBT003
    with capture(model, name) as acts:
        model(ids)
    assert len(acts) == 2


# The norm before attention, which TransformerLens 3 runs for queries, keys and values one by one.


@hooked
@pytest.mark.parametrize("part", ["hook_scale", "hook_normalized"])
@pytest.mark.parametrize("options", [{}, {"join": None}, {"capacity": 6}])
def test_a_norm_of_one_input_is_one_tensor(part, options, ids):
    model = tiny_transformer()
    name = f"blocks.1.ln1.{part}"
    expected = [plainly_hooked(model, each, name)[name][0] for each in (ids, ids + 1)]
    with capture(model, name, **options) as acts:
        model(ids)
        model(ids + 1)
    found = acts[name]
    assert torch.equal(torch.cat(found) if isinstance(found, list) else found, torch.cat(expected))
    assert acts.axes(name)[:2] == ("batch", "pos")


@hooked
def test_norms_of_layers_are_stacked(ids):
    model = tiny_transformer()
    with capture(model, "ln1.hook_normalized", slice=-1) as acts:
        model(ids)
    assert acts.stack("ln1.hook_normalized").shape == (2, 3, 32)


@hooked
def test_a_norm_whose_firings_differ_stays_several(ids):
    model = tiny_transformer()
    fired = []

    def edit_the_second(activation, hook):  # noqa: ARG001
        fired.append(activation)
        return activation + (len(fired) == 2)

    name = "blocks.1.ln1.hook_normalized"
    model.hook_dict[name].add_hook(edit_the_second)
    with capture(model, name) as acts:
        model(ids)
    with pytest.raises(SeveralFiringsError):
        acts[name]
    assert len(acts.firings(name)) == 3


@hooked
def test_a_norm_with_a_graph_stays_several_since_each_has_its_gradients(ids):
    model = tiny_transformer()
    with capture(model, "blocks.1.ln1.hook_normalized", grad=True) as acts:
        model(ids)
    with pytest.raises(SeveralFiringsError):
        acts["blocks.1.ln1.hook_normalized"]
