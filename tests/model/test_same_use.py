"""How a model is used: modes, adapters, hooks and batch sizes are compared when it is resumed."""

import functools
import warnings

import pytest
import torch
from compared import RESID, SITE, Scale, differing, mlp, refused, resumed
from extracted import Read, refusal
from models import bridge, bridge_of, huggingface, tokens
from torch import nn

from actctx import DataError, Site, capture
from actctx.extract import extract

# How it is run.


def test_autocast_is_named(out):
    extract(mlp(), [tokens()], SITE, out)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        message = refusal(DataError, mlp(), [tokens(), tokens(seed=1)], SITE, out)
    assert "its autocast is None, not 'torch.bfloat16'; give the same" in message


def test_the_precision_of_products_is_named(out):
    extract(mlp(), [tokens()], SITE, out)
    torch.set_float32_matmul_precision("high")
    try:
        message = refusal(DataError, mlp(), [tokens(), tokens(seed=1)], SITE, out)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert "its float32 matmul precision is 'highest', not 'high'; give" in message


class Noisy(nn.Module):
    def forward(self, x):
        return x + 1 if self.training else x


def test_training_mode_counts_where_a_forward_asks_for_it(out):
    first, second = mlp(Noisy()), mlp(Noisy())
    second.train()
    assert refused(first, second, out) == "modules in training mode is [], not ['block.1']"
    assert not differing(mlp(), mlp().train())


def test_a_method_that_somebody_replaced_is_named(out):
    other = mlp()
    other.block[1].forward = lambda x: x * 2
    assert refused(mlp(), other, out).startswith("function 'block.1.forward' is None, not '")


# Adapters.


def adapted(*, on="first", scale=2, merged=False):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], init_lora_weights=False)
    model = huggingface("LlamaForCausalLM")
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what peft asks transformers for
        model = peft.get_peft_model(model, config, adapter_name="first")
        model.add_adapter("second", config)
    model.set_adapter(on)
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling = dict.fromkeys(module.scaling, float(scale))
    if merged:
        model.merge_adapter()
    return model.eval()


LAYER = "base_model.model.model.layers.1"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"on": "second"}, "setting 'active_adapter' (1 of 4 differences) is 'first', not 'sec"),
        ({"scale": 1}, "scaling' (1 of 2 differences) is {'first': 2.0, 'second': 2.0}, not "),
        ({"merged": True}, "base_layer.weight' (1 of 4 differences) is 'float32 (32, 32) "),
    ],
)
def test_adapters_are_told_apart(out, options, said):
    found = refused(adapted(), adapted(**options), out, LAYER)
    assert said in found


def test_adapters_that_are_off_are_told_apart(out):
    extract(adapted(), [tokens()], LAYER, out)
    model = adapted()
    with model.disable_adapter():
        message = refusal(DataError, model, [tokens(), tokens(seed=1)], LAYER, out)
    assert "its setting '_adapters_disabled' (1 of 3 differences) is False, not True;" in message
    extract(model, [tokens(), tokens(seed=1)], LAYER, out)


# Hooks of others.


def double(module, args, output):  # noqa: ARG001
    return output * 2


def double_linear(module, args, output):  # noqa: ARG001
    return output * 2 if isinstance(module, nn.Linear) else None


def add(module, args, output, by):  # noqa: ARG001
    return output + by


def add_in_place(module, args, output):  # noqa: ARG001
    output += 1


def double_input(module, args):  # noqa: ARG001
    return (args[0] * 2,)


def double_kwargs(module, args, kwargs):  # noqa: ARG001
    return (args[0] * 2,), kwargs


def looking(seen):
    return lambda module, args, output: seen.append(output)  # noqa: ARG005


def hooked(hook, *, put="register_forward_hook", **options):
    model = mlp()
    getattr(model.block[0], put)(hook, **options)
    return model


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (lambda: hooked(double), "hooks on the output of 'block.0' is [], not ['double "),
        (lambda: hooked(add_in_place), "hooks on the output of 'block.0' is [], not ['add_in_"),
        (
            lambda: hooked(double_input, put="register_forward_pre_hook"),
            "hooks on the input of 'block.0' is [], not ['double_input ",
        ),
        (
            lambda: hooked(double_kwargs, put="register_forward_pre_hook", with_kwargs=True),
            "hooks on the input of 'block.0' is [], not ['double_kwargs ",
        ),
    ],
)
def test_hooks_that_change_values_are_named(out, model, said):
    assert refused(mlp(), model(), out).startswith(said)
    other = out.with_name("other.lance")
    resumed(model(), model(), other)
    assert "hooks on the" in refusal(DataError, mlp(), [tokens(), tokens(seed=2)], SITE, other)


def test_hooks_are_told_apart_by_what_they_compute_with(out):
    def lambdas(by):
        return lambda module, args, output: output + by  # noqa: ARG005

    vectors = [torch.linspace(0, last, 8) for last in (1, 1, 2)]
    for number, make in enumerate((lambdas, lambda by: functools.partial(add, by=by))):
        first, same, other = (hooked(make(vector)) for vector in vectors)
        path = out.with_name(f"{number}.lance")
        resumed(first, same, path)
        message = refusal(DataError, other, [tokens(), tokens(seed=1)] * 2, SITE, path)
        assert "its hooks on the output of 'block.0' is ['" in message


def test_hooks_that_only_look_are_no_difference(out):
    seen = []
    resumed(mlp(), hooked(looking(seen)), out)
    assert seen
    resumed(hooked(looking(seen)), mlp(), out.with_name("other.lance"))


def test_hooks_of_every_module_are_told_apart(out):
    extract(mlp(), [tokens()], SITE, out)
    handle = nn.modules.module.register_module_forward_hook(double_linear)
    try:
        message = refusal(DataError, mlp(), [tokens(), tokens(seed=1)], SITE, out)
    finally:
        handle.remove()
    assert "its hooks on the output of every module is [], not ['double_linear " in message
    assert not nn.modules.module._global_forward_hooks


def test_looking_at_hooks_leaves_them_as_they_were(out):
    model = hooked(looking([]))
    before = [*model.block[0]._forward_hooks.items()]
    extract(model, [tokens()], SITE, out)
    assert [*model.block[0]._forward_hooks.items()] == before


def zeroed(value, hook):  # noqa: ARG001
    return value * 0


def test_hooks_on_hook_points_are_told_apart(out, gpt2):
    extract(gpt2, [tokens()], RESID, out)
    point = gpt2.hook_dict["blocks.0.hook_out"]
    point.add_hook(zeroed)
    try:
        message = refusal(DataError, gpt2, [tokens(), tokens(seed=1)], RESID, out)
    finally:
        point.remove_hooks()
    assert "its hooks on the output of 'blocks.0.hook_out' is [], not ['zeroed " in message


def test_a_capture_around_an_extraction_is_no_difference(out):
    model = mlp()
    extract(model, [tokens()], SITE, out)
    with capture(model, "block.0"):
        extract(model, [tokens(), tokens(seed=1)], SITE, out)


# Sites that are added.


def flagged(flag="use_attn_result", *, on=True):
    model = bridge()
    getattr(model, f"set_{flag}")(on)
    return model


def test_flags_of_a_bridge_are_named(out):
    assert refused(bridge(), flagged(), out, RESID) == (
        "setting 'cfg.use_attn_result' is False, not True"
    )


def test_flags_that_an_added_site_needs_may_be_on(out):
    extract(bridge(), [tokens()], RESID, out)
    extract(flagged(), [tokens()], "blocks.0.attn.hook_result", out, add=True)
    message = refusal(DataError, flagged(), [tokens()], "blocks.0.hook_resid_pre", out, add=True)
    assert "its setting 'cfg.use_attn_result' is False, not True; give the same" in message


def test_a_module_that_is_compiled_in_place_is_the_same(out):
    model = mlp(Scale())
    model.block[1].compile(backend="eager")
    resumed(mlp(Scale()), model, out)


def test_sites_of_a_hooked_model_are_not_added_to_those_of_another(out):
    extract(mlp(), [tokens()], SITE, out)
    site = {"y": Site("head", axes="batch pos d")}
    message = refusal(DataError, hooked(double), [tokens()], site, out, add=True)
    assert "its hooks on the output of 'block.0' is [], not ['double " in message
    assert [each.name for each in Read(out).layout.sites] == ["x"]


# Batch sizes.

SEQUENCES = [[*range(1, length + 1)] for length in (3, 5, 2, 7, 4, 6, 1, 8)] * 3


@pytest.mark.parametrize(
    ("data", "first", "second", "options"),
    [
        (tokens(12), 4, 3, {}),
        (tokens(12), 4, 6, {}),
        (SEQUENCES, 4, 3, {}),
        (SEQUENCES, 4, 3, {"pack": True, "context": 4}),
        (SEQUENCES, 4, 5, {"pack": True, "context": 4}),
    ],
)
def test_another_batch_size_is_warned_of_once(out, data, first, second, options):
    extract(bridge(), data, RESID, out, batch_size=first, max_tokens=5, **options)
    with pytest.warns(UserWarning, match="batch_size") as caught:
        extract(bridge(), data, RESID, out, batch_size=second, **options)
    assert [str(each.message) for each in caught] == [
        f"the rows in '{out}' were run with batch_size={first}, and new ones are run with "
        f"batch_size={second}, so values equal those of a single run only up to rounding; give "
        f"batch_size={first} for the same bits"
    ]
    assert caught[0].filename == __file__


def test_a_batch_size_that_changes_no_forward_is_not_warned_of(out):
    batches = [tokens(seed=seed) for seed in range(3)]
    extract(bridge(), batches[:1], RESID, out, batch_size=4)
    extract(bridge(), batches, RESID, out, batch_size=2)  # they run as they are
    other = out.with_name("other.lance")
    extract(bridge(), SEQUENCES, RESID, other, batch_size=4, max_tokens=5)
    extract(bridge(), SEQUENCES, RESID, other, batch_size=9)  # never joined
    extract(bridge(), SEQUENCES, RESID, other, batch_size=2)  # nothing is left to run


def test_a_bridge_of_a_model_in_another_setting_is_told_apart():
    models = [huggingface("MixtralForCausalLM", num_experts_per_tok=number) for number in (1, 2)]
    names = [name for name, *_ in differing(*map(bridge_of, models))]
    assert "setting 'config.num_experts_per_tok'" in names
