"""User code that is written once and runs on every generation of TransformerLens.

Nothing in this file asks which generation is installed: `tiny_transformer` builds a
`HookedTransformer` with TransformerLens 2 and 3, and a `TransformerBridge` with 4.
"""

import pytest
import torch
from models import OLD_CACHE, hooks_of, plainly_hooked, tiny_transformer, tokens

from actctx import Activations, NeverFiredError, Site, Stopped, capture, captures, hook_names
from actctx._model.axes import axis_sizes

NAMES = [
    "hook_embed",
    "blocks.0.hook_resid_pre",
    "blocks.0.attn.hook_q",
    "blocks.0.attn.hook_k",
    "blocks.0.attn.hook_v",
    "blocks.0.attn.hook_attn_scores",
    "blocks.0.attn.hook_pattern",
    "blocks.0.attn.hook_z",
    "blocks.0.hook_attn_out",
    "blocks.0.hook_resid_mid",
    "blocks.0.ln2.hook_scale",
    "blocks.0.ln2.hook_normalized",
    "blocks.0.mlp.hook_pre",
    "blocks.0.mlp.hook_post",
    "blocks.0.hook_mlp_out",
    "blocks.1.hook_resid_post",
    "ln_final.hook_normalized",
]
RESID = "blocks.1.hook_resid_post"


@pytest.fixture
def model():
    return tiny_transformer()


def test_every_name_is_captured_bit_for_bit(model, ids):
    expected = plainly_hooked(model, ids, *NAMES)
    with capture(model, NAMES) as acts:
        model(ids)
    for name in NAMES:
        assert torch.equal(acts[name], expected[name][0]), name


def test_names_have_their_axes(model, ids):
    with capture(model, NAMES) as acts:
        model(ids)
    sizes = {"batch": 3, "pos": 7, "query": 7, "key": 7, "1": 1, **axis_sizes(model)}
    for name in NAMES:
        for axis, size in zip(acts.axes(name), acts[name].shape, strict=True):
            assert sizes.get(axis, size) == size, name


def test_what_run_with_cache_holds_is_captured(model, ids):
    _, cache = model.run_with_cache(ids)
    with capture(model, NAMES) as acts:
        model(ids)
    for name in NAMES:
        assert torch.equal(acts[name], cache[name].detach()), name


def test_names_are_listed(model):
    assert set(NAMES) <= set(hook_names(model))
    assert hook_names(model, "blocks.*.hook_resid_post") == [
        "blocks.0.hook_resid_post",
        "blocks.1.hook_resid_post",
    ]


def test_slices_select(model, ids):
    sites = {
        "last": Site(RESID, slice=-1),
        "heads": Site("blocks.0.attn.hook_z", slice={"head": [0, 3], "pos": slice(1, 3)}),
        "pattern": Site("blocks.0.attn.hook_pattern", slice={"pos": -1, "head": 0}),
    }
    with capture(model, sites, dtype=torch.float16) as acts:
        model(ids)
    assert acts.last.shape == (3, 32)
    assert acts.heads.shape == (3, 2, 2, 8)
    assert acts.pattern.shape == (3, 7)
    assert acts.pattern.dtype == torch.float16


def test_forwards_stop_and_the_loop_goes_on(model, ids):
    model(ids)  # a bridge puts hooks of its own on at its first forward
    before = hooks_of(model)
    with capture(model, "blocks.0.hook_resid_post", stop=True) as acts:
        assert all(isinstance(model(ids), Stopped) for _ in range(3))
    assert acts.tensor.shape == (9, 7, 32)
    assert hooks_of(model) == before
    assert model(ids).shape == (3, 7, 50)


def test_hooks_go_when_the_forward_raises(model):
    before = hooks_of(model)
    with pytest.raises(IndexError), capture(model, NAMES):
        model(torch.tensor([[10_000]]))
    assert hooks_of(model) == before


def test_the_hooks_of_others_stay(model, ids):
    ran = []
    model.add_hook(RESID, lambda activation, hook: ran.append(hook.name))  # noqa: ARG005
    with capture(model, RESID):
        model(ids)
    model(ids)
    assert len(ran) == 2
    assert len(model.hook_dict[RESID].fwd_hooks) == 1
    model.reset_hooks()


def test_run_with_hooks_and_run_with_cache_inside_the_block_leave_the_capture_alone(model, ids):
    with capture(model, RESID) as acts:
        model.run_with_hooks(ids, fwd_hooks=[("hook_embed", lambda x, hook: x * 0)])  # noqa: ARG005
        model.run_with_cache(ids)
        model(ids)
    assert acts.forwards == 3
    assert not torch.equal(acts.tensor[:3], acts.tensor[3:6])
    assert torch.equal(acts.tensor[3:6], acts.tensor[6:])


def test_a_switched_off_hook_point_is_refused_until_it_is_switched_on(model, ids):
    name = "blocks.0.attn.hook_result"
    with pytest.raises(NeverFiredError, match=r"set_use_attn_result\(True\)"):
        capture(model, name).__enter__()
    model.set_use_attn_result(True)
    with capture(model, name) as acts:
        model(ids)
    assert acts.tensor.shape == (3, 7, 4, 32)
    assert acts.axes(name) == ("batch", "pos", "head", "d_model")


@pytest.mark.filterwarnings("ignore:.*loses the KV cache")  # with transformers 5.24
def test_generate_with_a_cache_is_captured_step_by_step(model, ids):
    kept = []
    model.add_hook(RESID, lambda activation, hook: kept.append(activation.clone()))  # noqa: ARG005
    with capture(model, RESID, join="pos") as acts:
        model.generate(ids, max_new_tokens=5, do_sample=False, stop_at_eos=False, verbose=False)
    model.reset_hooks()
    assert [part.shape[1] for part in kept] == [7, 1, 1, 1, 1]
    assert torch.equal(acts.tensor, torch.cat(kept, dim=1))
    assert not acts.tensor.is_inference()
    torch.nn.Linear(32, 1)(acts.tensor).sum().backward()


def test_generate_without_a_cache_runs_everything_again_at_each_step(model, ids):
    with capture(model, RESID, join=None) as acts:
        model.generate(
            ids,
            max_new_tokens=3,
            do_sample=False,
            stop_at_eos=False,
            verbose=False,
            use_past_kv_cache=False,
        )
    assert [part.shape[1] for part in acts[RESID]] == [7, 8, 9]
    assert torch.allclose(acts[RESID][2][:, :7], acts[RESID][0], atol=1e-5)


@pytest.mark.skipif(not OLD_CACHE, reason="bridges do not run right with this transformers")
def test_the_patterns_of_generate_grow(model, ids):
    name = "blocks.0.attn.hook_pattern"
    with capture(model, name, join=None) as acts:
        model.generate(ids, max_new_tokens=3, do_sample=False, stop_at_eos=False, verbose=False)
    assert [tuple(part.shape[2:]) for part in acts[name]] == [(7, 7), (1, 8), (1, 9)]


def test_functions_are_decorated(model, ids):
    @captures("blocks.*.hook_resid_post", slice=-1, stop=True)
    def norms(acts: Activations, model, ids):
        model(ids)
        return acts.stack("hook_resid_post").norm(dim=-1)

    assert norms(model, ids).shape == (2, 3)


def test_gradients_flow_where_they_are_asked_for(model, ids):
    with capture(model, RESID, grad=True) as acts:
        model(ids)
    acts.tensor.sum().backward()
    assert any(parameter.grad is not None for parameter in model.parameters())


def test_real_tokens_are_kept(model):
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    with capture(model, RESID, mask="attention", slice=-1) as acts:
        model(tokens(2, 5), attention_mask=mask)
    with capture(model, RESID) as whole:
        model(tokens(2, 5), attention_mask=mask)
    assert torch.equal(acts.tensor, torch.stack([whole.tensor[0, 3], whole.tensor[1, 4]]))
