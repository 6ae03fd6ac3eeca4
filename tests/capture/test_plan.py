"""A plan is what the capture then leaves, byte for byte, and nothing has run for it."""

import copy

import numpy as np
import pytest
import torch
from jaxtyping import Float
from models import BATCH, POS, Mlp, hooks_of, huggingface, tokens
from torch import Tensor, nn

from actctx import (
    NeverFiredError,
    NotCapturedError,
    Plan,
    PlanError,
    Schema,
    SelectionError,
    Site,
    StoppedError,
    capture,
    site,
)
from actctx._capture.cache_size import count_cache_bytes

RESID = "blocks.*.hook_resid_post"
PADDED = torch.ones(BATCH, POS, dtype=torch.long)
PADDED[1, -2:] = PADDED[2, -3:] = 0


def left(acts):
    """What a capture has left, as a plan says it."""
    found = {}
    for key, column in zip(acts, acts.columns, strict=True):
        firing = column.read(0)
        first = firing[0] if isinstance(firing, list) else firing
        found[key] = (
            acts.axes(key),
            tuple(first.shape),
            first.dtype,
            first.device,
            column.nbytes,
            len(column.firings),
        )
    return found, acts.nbytes, set(acts.missing)


def planned(plan):
    sites = {
        name: (each.axes, each.shape, each.dtype, each.device, each.nbytes, each.firings)
        for name, each in plan.items()
    }
    return sites, plan.nbytes, set(plan.missing)


def plan_is_left(model, names, *args, of=None, options=None, **kwargs):
    """Plan a capture of a forward, run it, and compare."""
    capturing = capture(of or model, names, **(options or {}))
    plan = capturing.plan(*args, **kwargs)
    with capturing as acts:
        model(*args, **kwargs)
    assert planned(plan) == left(acts)
    assert [*plan] == [*acts]
    return plan


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"slice": -1},
        {"slice": {"pos": slice(1, 4), "d_model": range(0, 32, 3)}},
        {"slice": {"pos": torch.arange(POS) % 2 == 0}},
        {"slice": np.s_[1, ::-1, [0, 3]]},
        {"dtype": torch.bfloat16, "stop": True},
        {"device": "cpu", "grad": True},
        {"join": None},
        {"capacity": 10},
        {"mask": PADDED, "slice": slice(1, None)},
        {"mask": PADDED, "slice": -1},
        {"mask": PADDED, "join": "pos", "dtype": torch.float16},
        {"mask": PADDED, "capacity": 100},
    ],
    ids=str,
)
def test_a_plan_is_what_the_capture_leaves(gpt2, ids, options):
    plan_is_left(gpt2, RESID, ids, options=options)


@pytest.mark.parametrize(
    "names",
    [
        "**",
        "blocks.0.attn.hook_z",
        {"last": "blocks.1.hook_resid_post", "all": "blocks.*.mlp.**"},
        [Site("ln_final.hook_in", dtype=torch.float16), Site("blocks.1", io="in"), "unembed"],
        Site("blocks.0.attn.hook_pattern", slice={"head": [0, 2], "pos": 0}),
        lambda name: "attn" in name,
    ],
    ids=["all", "one", "aliases", "sites", "pattern", "predicate"],
)
def test_every_way_to_name_sites_is_planned(gpt2, ids, names):
    plan_is_left(gpt2, names, ids)


@pytest.mark.parametrize("options", [{}, {"slice": 0}, {"slice": slice(0, 3), "stop": True}])
def test_the_mask_of_a_forward_is_counted(llama, ids, options):
    plan = plan_is_left(
        llama,
        "model.layers.*",
        input_ids=ids,
        attention_mask=PADDED,
        options={"mask": "attention", **options},
    )
    assert not plan["model.layers.0"].is_upper_bound


def test_hook_names_of_a_plain_model_are_planned(llama, ids):
    plan_is_left(llama, ["blocks.*.attn.hook_q", "hook_resid_post"], ids, options={"slice": -1})


def test_a_plan_of_a_schema_is_of_its_fields(gpt2, ids):
    class Acts(Schema):
        last: Float[Tensor, "batch d_model"] = site("blocks.1.hook_resid_post", slice=-1)

    assert capture(gpt2, Acts).plan(ids)["last"].shape == (BATCH, 32)


@pytest.mark.parametrize("options", [{}, {"stop": True}, {"capacity": 5}])
@pytest.mark.parametrize("firing", [None, 0, 1, -1, -2])
def test_firings_are_planned(ids, options, firing):
    if (options.get("stop") and (firing or 0) < 0) or (options.get("capacity") and firing == -2):
        pytest.skip("such a capture is refused")
    plan_is_left(Mlp(twice=True), Site("block", firing=firing), ids, options=options)


def test_a_module_of_features_is_planned(linear):
    plan_is_left(linear, "0", torch.ones(3, 4))


def test_the_module_itself_is_planned(mlp, ids):
    plan_is_left(mlp, Site(mlp, io="out"), ids)


# What caching everything would hold.


@pytest.mark.parametrize("stop", [False, True])
def test_the_cache_of_a_bridge_is_what_run_with_cache_holds(gpt2, ids, stop):
    plan = capture(gpt2, "blocks.0.hook_resid_post", stop=stop).plan(ids)
    assert plan.cache_nbytes == count_cache_bytes(gpt2, lambda: gpt2(ids))


@pytest.mark.parametrize("stop", [False, True])
def test_the_cache_of_any_module_is_what_its_modules_return(stop):
    model, given, held = Mlp(twice=True), tokens(), []
    handles = [
        module.register_forward_hook(lambda _module, _args, output: held.append(output))
        for module in model.modules()
    ]
    with torch.no_grad():
        model(given)
    for handle in handles:
        handle.remove()
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage() for each in held}
    plan = capture(model, "embed", stop=stop).plan(given)
    assert plan.cache_nbytes == sum(storage.nbytes() for storage in storages.values())


def test_what_stops_before_what_depends_on_values_is_planned(ids):
    plan = capture(Chooser("nonzero"), "0.embed", stop=True).plan(ids)
    assert plan["0.embed"].shape == (BATCH, POS, 8)
    assert plan.cache_nbytes is None


# Without values.


def test_inputs_may_be_on_the_meta_device(gpt2, ids):
    capturing = capture(gpt2, "blocks.1.**", dtype=torch.float16)
    assert planned(capturing.plan(ids.to("meta"))) == planned(capturing.plan(ids))


def test_weights_may_be_on_the_meta_device(ids):
    real, outlined = huggingface("LlamaForCausalLM"), huggingface("LlamaForCausalLM").to("meta")
    plans = [capture(model, "model.layers.1.**").plan(ids) for model in (real, outlined)]
    assert planned(plans[0]) == planned(plans[1])
    assert plans[0].cache_nbytes == plans[1].cache_nbytes
    assert all(parameter.is_meta for parameter in outlined.parameters())


def test_a_mask_without_values_makes_an_upper_bound_and_says_so(llama, ids):
    capturing = capture(llama, {"a": "model.layers.0"}, mask="attention")
    plan = capturing.plan(input_ids=ids, attention_mask=PADDED.to("meta"))
    assert plan["a"].shape == (BATCH * POS, 32)
    assert plan["a"].is_upper_bound
    title, _, row = repr(plan).splitlines()
    assert title.startswith("Plan: 1 site, at most 2.6 KiB of ")
    assert "at most (21, 32)" in row
    last = capture(llama, "model.layers.0", mask="attention", slice=-1)
    one_a_sequence = last.plan(input_ids=ids, attention_mask=PADDED.to("meta"))["model.layers.0"]
    assert (one_a_sequence.shape, one_a_sequence.is_upper_bound) == ((BATCH, 32), False)


def test_ids_without_values_make_an_upper_bound_where_the_mask_is_made_of_them(ids):
    class Masking(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = huggingface("LlamaForCausalLM")

        def forward(self, input_ids, attention_mask=None):
            return self.inner(input_ids, attention_mask=attention_mask)

    model = Masking()
    capturing = capture(model, "inner.model.layers.0", mask="attention")
    # By position, where a mask is not recognised by its name alone.
    plan = capturing.plan(ids, PADDED.to("meta"))
    assert plan["inner.model.layers.0"].is_upper_bound


# What depends on values.


class Chooser(nn.Module):
    """Chooses by values of its activations what it computes."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.add_module("0", Mlp())
        self.wide, self.narrow = nn.Linear(4, 6), nn.Linear(4, 2)

    def forward(self, ids):
        hidden = self.get_submodule("0")(ids)
        if self.how == "nonzero":
            return self.wide(hidden[hidden > 0][:4])
        if self.how == "raise" and hidden.isnan().any():
            raise ValueError("not a number")
        if self.how == "same" and hidden.isinf().any():
            hidden = hidden.clamp(-1, 1)
        if self.how == "other" and hidden.sum() > 0:
            return self.narrow(hidden)
        return self.wide(hidden)


@pytest.mark.parametrize("how", ["same", "raise"])
def test_questions_about_values_that_change_no_shape_are_planned(ids, how):
    plan_is_left(Chooser(how), "**", ids)


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("other", "what it leaves depends on values of its activations"),
        (
            "nonzero",
            "it depends on values of its activations, which a plan does not compute "
            "(aten.nonzero.default)",
        ),
    ],
)
def test_what_depends_on_values_is_refused(ids, how, why):
    with pytest.raises(PlanError) as caught:
        capture(Chooser(how), "**").plan(ids)
    assert str(caught.value) == (
        f"a forward of Chooser cannot be planned: {why}; capture a small forward, and read "
        "acts.nbytes"
    )


def test_what_follows_from_inputs_alone_is_known(ids):
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(50, 8)

        def forward(self, ids):
            kept = torch.zeros_like(ids)
            kept[:, 1:] += ids[:, 1:] > 20
            if kept.any():
                ids = ids[kept.bool()]
            return self.embed(ids.clamp(max=int(ids.max())))

    plan_is_left(Packed(), "embed", ids)


def test_what_is_written_without_values_is_not_taken_for_known(ids):
    class Written(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.out = nn.Embedding(50, 8), nn.Linear(8, 2)

        def forward(self, ids):
            hidden = self.embed(ids)
            kept = torch.zeros(hidden.shape)
            kept[:, 0] = hidden[:, 0]
            return self.out(hidden[kept.sum(-1) != 0])

    with pytest.raises(PlanError, match="depends on values"):
        capture(Written(), "out").plan(ids)


def test_a_model_that_has_returned_hidden_states_is_planned(ids):
    llama = huggingface("LlamaForCausalLM")  # hidden states leave hooks on it

    class Reading(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.out = llama, nn.Linear(32, 2)

        def forward(self, ids):
            return self.out(self.inner(ids, output_hidden_states=True).hidden_states[1])

    model = Reading()
    plan_is_left(model, "out", ids)
    plan_is_left(model, "out", ids)  # transformers has added hooks of its own by now


def test_what_is_inside_of_experts_that_run_one_by_one_is_refused(ids):
    model = huggingface("MixtralForCausalLM", experts_implementation="eager")
    plan_is_left(model, "model.layers.*.mlp.experts", ids)
    with pytest.raises(PlanError) as caught:
        capture(model, "model.layers.0.mlp.experts.act_fn").plan(ids)
    assert str(caught.value) == (
        "'model.layers.0.mlp.experts.act_fn' cannot be planned: it runs once for each expert, on "
        "the tokens that are routed to it, whose number depends on values; leave it out of the plan"
    )


def test_inputs_that_the_model_cannot_take_are_refused(gpt2, mlp):
    with pytest.raises(PlanError, match=r"it raised IndexError: index out of range in self;"):
        capture(gpt2, RESID).plan(torch.ones(1, 65, dtype=torch.long))
    with pytest.raises(PlanError, match=r"it raised TypeError: .*missing 1 required"):
        capture(mlp, "head").plan()


def test_what_a_capture_refuses_a_plan_refuses(gpt2, ids, llama):
    with pytest.raises(NeverFiredError, match="would never fire"):
        capture(gpt2, "blocks.0.attn.hook_result").plan(ids)
    with pytest.raises(SelectionError, match="there is no position 9"):
        capture(gpt2, RESID, slice=9).plan(ids)
    cache = llama(ids[:, :3], use_cache=True).past_key_values
    with pytest.raises(StoppedError, match="past_key_values"):
        capture(llama, "model.layers.0", stop=True).plan(ids[:, 3:], past_key_values=cache)


# What is left as it was.


def test_nothing_of_the_model_changes():
    class Trained(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.drop, self.calls = nn.BatchNorm1d(4), nn.Dropout(0.5), 0
            self.register_buffer("seen", torch.zeros(4))

        def forward(self, x):
            self.calls += 1
            self.seen += x.sum(0)
            return self.drop(self.norm(x)) + torch.randn(4)

    model = Trained().train()
    state, hooks, drawn = copy.deepcopy(model.state_dict()), hooks_of(model), torch.get_rng_state()
    capture(model, "norm", grad=True).plan(torch.randn(3, 4, generator=torch.Generator()))
    assert all(map(torch.equal, state.values(), model.state_dict().values()))
    assert (model.calls, hooks_of(model)) == (0, hooks)
    assert torch.equal(drawn, torch.get_rng_state())


def test_nobody_elses_hooks_fire(mlp, ids):
    fired = []
    mlp.block.register_forward_hook(lambda *_: fired.append(1))
    with capture(mlp, "head") as acts:
        capture(mlp, "block").plan(ids)
        assert not acts.forwards
        mlp(ids)
        fired.clear()
        capture(mlp, "block").plan(ids)
    assert (acts.forwards, fired) == (1, [])


def test_a_cache_that_is_given_stays_as_it_is(llama, ids):
    cache = llama(ids[:, :3], use_cache=True).past_key_values
    held = [layer.keys.clone() for layer in cache.layers]
    capturing = capture(llama, "model.layers.*", mask="attention")
    plan = capturing.plan(ids[:, 3:], attention_mask=PADDED, past_key_values=cache)
    assert cache.get_seq_length() == 3
    assert all(
        torch.equal(each, layer.keys) for each, layer in zip(held, cache.layers, strict=True)
    )
    with capturing as acts:
        llama(ids[:, 3:], attention_mask=PADDED, past_key_values=cache)
    assert planned(plan) == left(acts)


def test_a_plan_can_be_made_in_a_captured_forward_and_an_open_capture(gpt2, ids):
    inner = capture(gpt2, RESID)
    plans = []
    point = gpt2.hook_dict["blocks.0.hook_resid_post"]
    point.add_hook(lambda value, hook: plans.append(inner.plan(ids)))  # noqa: ARG005
    with inner as acts:
        gpt2(ids)
    point.remove_hooks()
    assert planned(plans[0]) == left(acts)


# How it is shown and read.


def test_a_plan_is_a_table(gpt2, ids):
    plan = capture(gpt2, {"last": "blocks.1.hook_resid_post"}, slice=-1).plan(ids)
    assert repr(plan) == (
        "Plan: 1 site, 384 B of 130.3 KiB that caching everything would hold\n"
        "  site  axes           shape    dtype    device  bytes\n"
        "  last  batch d_model  (3, 32)  float32  cpu     384 B"
    )
    assert "<td" in plan._repr_html_()
    assert isinstance(plan, Plan)


def test_a_plan_is_read_by_every_name_that_acts_has(gpt2, ids):
    plan = capture(gpt2, ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]).plan(ids)
    first = plan["blocks.0.hook_resid_post"]
    assert plan["blocks.0.hook_out"] is plan["0.hook_resid_post"] is first
    assert "hook_z" not in plan
    assert len(plan) == 2
    with pytest.raises(NotCapturedError) as caught:
        plan["hook_resid_post"]
    assert str(caught.value) == (
        "the plan has no one site 'hook_resid_post': it means 2 of its sites, so read one of "
        "'blocks.0.hook_resid_post', 'blocks.1.hook_resid_post'"
    )
    with pytest.raises(NotCapturedError) as caught:
        plan["hook_z"]
    assert str(caught.value) == (
        "the plan has no one site 'hook_z': it has 'blocks.0.hook_resid_post', "
        "'blocks.1.hook_resid_post'"
    )
