"""Every hook point of every architecture, against plain hooks."""

import pytest
import torch
from models import ARCHITECTURES, BATCH, POS, VOCAB, bridge, hooks_of, plainly_hooked, tokens

from actctx import Site, Stopped, capture, hook_names
from actctx._capture.cache_size import count_cache_bytes, estimate_cache_bytes
from actctx._model.axes import axis_sizes

pytestmark = pytest.mark.thorough

# Where the activations have no batch axis of their own, or one row a token.
BROADCAST = ("hook_cos", "hook_sin", "pos_embed.hook_in")
FREE = {"batch": BATCH, "pos": POS, "query": POS, "key": POS, "1": 1, "d_vocab": VOCAB}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request):
    return bridge(request.param)


def test_every_hook_point_is_captured_bit_for_bit(model):
    expected = plainly_hooked(model, tokens())
    with capture(model, "**") as acts:
        model(tokens())
    assert set(acts) == set(expected)
    for name, firings in expected.items():
        assert len(firings) == 1
        assert acts[name].dtype == firings[0].dtype
        assert torch.equal(acts[name], firings[0]), name


def test_sites_are_listed_in_the_order_in_which_they_ran(model):
    expected = plainly_hooked(model, tokens())
    with capture(model, "**") as acts:
        model(tokens())
    assert list(acts) == list(expected)


def test_what_never_fires_is_listed_as_missing(model):
    expected = plainly_hooked(model, tokens())
    with capture(model, "**") as acts:
        model(tokens())
    names = {point.name for point in model.hook_dict.values()}
    assert set(acts.missing) == names - set(expected)


def test_axes_agree_with_the_shapes_and_the_config(model):
    with capture(model, "**") as acts:
        model(tokens())
    sizes = {**FREE, **axis_sizes(model)}
    for name in acts:
        axes, shape = acts.axes(name), acts[name].shape
        assert len(axes) == len(shape)
        assert "_" not in axes, name
        for axis, size in zip(axes, shape, strict=True):
            if axis == "batch" and name.endswith(BROADCAST):
                assert size in {1, BATCH}
            else:
                assert sizes.get(axis, size) == size, (name, axes, shape)


# The axes of hook points by the ends of their names, those of a bridge and those of the models
# before it; a key or value of grouped heads has fewer of them.
AXES = {
    "hook_embed embed.hook_out": "batch pos d_model",
    "hook_resid_pre hook_resid_mid hook_resid_post": "batch pos d_model",
    "blocks.0.hook_in blocks.0.hook_out ln2.hook_in": "batch pos d_model",
    "hook_attn_out hook_mlp_out hook_mlp_in attn.hook_out": "batch pos d_model",
    "ln1.hook_scale ln2.hook_scale ln_final.hook_scale": "batch pos 1",
    "ln1.hook_normalized ln2.hook_normalized ln_final.hook_normalized": "batch pos d_model",
    "attn.hook_q attn.q.hook_out attn.hook_z attn.o.hook_in": "batch pos head d_head",
    "attn.hook_k attn.k.hook_out attn.hook_v attn.v.hook_out": "batch pos kv_head d_head",
    "attn.hook_rot_q": "batch pos head d_head",
    "attn.hook_rot_k": "batch pos kv_head d_head",
    "attn.hook_attn_scores attn.hook_pattern": "batch head query key",
    "mlp.hook_pre mlp.hook_post mlp.in.hook_out mlp.out.hook_in": "batch pos d_mlp",
    "unembed.hook_in": "batch pos d_model",
    "unembed.hook_out": "batch pos d_vocab",
}
ENDS = {f".{end}": axes for ends, axes in AXES.items() for end in ends.split()}


def _means_another(name, point):
    """Tell where TransformerLens aliases what an experts' MLP or T5's positions do not have."""
    pair = (name.rpartition(".")[2], ".".join(point.name.rsplit(".", 2)[-2:]))
    return pair in {
        ("hook_pre", "mlp.hook_in"),
        ("hook_post", "mlp.hook_out"),
        ("hook_pos_embed", "pos_embed.hook_out"),
    }


def test_hook_points_have_the_axes_that_their_names_tell(model):
    with capture(model, "**") as acts:
        model(tokens())
    checked = 0
    for name, point in model.hook_dict.items():
        for end, axes in ENDS.items():
            if f".{name}".endswith(end) and point.name in acts and not _means_another(name, point):
                flattened = axes.replace("batch pos", "token")  # as the MLP of OPT runs
                assert " ".join(acts.axes(point.name)) in {axes, flattened}, name
                checked += 1
    assert checked > 20


def test_a_spec_holds_for_what_it_is_of_and_has_the_sizes_of_the_config(model):
    sizes = axis_sizes(model)
    with capture(model, "**") as acts:
        model(tokens())
    for name in acts:
        spec = acts.spec(name)
        assert isinstance(acts[name], spec), (name, spec)
        fixed = {axis for axis in acts.axes(name) if axis in sizes}
        assert all(f"{axis}={sizes[axis]}" in spec.dim_str.split() for axis in fixed), name


def test_what_a_cache_would_hold_is_estimated_from_the_axes(model):
    if hasattr(model, "encoder_blocks"):  # encoder and decoder read sequences of two lengths
        assert estimate_cache_bytes(model, 4, 48) is None
        return
    ids = tokens(4, 48)
    counted = count_cache_bytes(model, lambda: model(ids))
    assert 0.97 < estimate_cache_bytes(model, 4, 48) / counted < 1.25


def test_the_router_of_every_generation_has_a_row_a_token():
    model = bridge("MixtralForCausalLM")
    with capture(model, "blocks.0.mlp.gate.*") as acts:
        model(tokens())
    assert acts.axes("blocks.0.mlp.gate.hook_in") == ("token", "d_model")
    assert acts.axes("blocks.0.mlp.gate.hook_out") == ("token", "expert")
    assert acts["blocks.0.mlp.gate.hook_out"].shape == (BATCH * POS, 4)


def test_an_alias_reads_what_its_canonical_name_reads(model):
    with capture(model, "**") as acts:
        model(tokens())
    aliases = {alias: point.name for alias, point in model.hook_dict.items() if point.name in acts}
    for alias, name in aliases.items():
        assert acts[alias] is acts[name]


@pytest.mark.usefixtures("unchecked")  # checking the types of each call would take minutes
def test_a_stop_at_any_hook_point_leaves_the_next_forward_right(model):
    expected = plainly_hooked(model, tokens())
    before = hooks_of(model)
    for name, firings in expected.items():
        with capture(model, name, stop=True, join=None) as acts:
            assert isinstance(model(tokens()), Stopped)
            assert isinstance(model(tokens()), Stopped)
        assert all(torch.equal(found, firings[0]) for found in acts[name]), name
    assert hooks_of(model) == before
    again = plainly_hooked(model, tokens())
    for name, firings in expected.items():
        assert torch.equal(again[name][0], firings[0]), name


def test_a_stopped_forward_runs_nothing_after_its_last_site(model):
    fired = list(plainly_hooked(model, tokens()))
    for position in range(0, len(fired), 9):
        ran = []
        found = model.hook_dict
        points = {name: found[name] for name in fired}
        for name, point in points.items():
            point.add_hook(lambda activation, hook, name=name, ran=ran: ran.append(name))  # noqa: ARG005
        with capture(model, [fired[position], fired[0]], stop=True):
            model(tokens())
        for point in points.values():
            point.remove_hooks()
        assert ran == fired[: position + 1]


def test_slices_select_what_indexing_selects(model):
    expected = plainly_hooked(model, tokens())
    names = [name for name in expected if name in hook_names(model)]
    with capture(model, {name: Site(name, slice=(..., 0)) for name in names}) as acts:
        model(tokens())
    for name in names:
        assert torch.equal(acts[name], expected[name][0][..., 0]), name
