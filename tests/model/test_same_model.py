"""What a data set is of: another weight, module or config is found when it is resumed."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from compared import RESID, SITE, Scale, differing, mlp, refused, resumed
from extracted import Read, refusal
from models import huggingface, tokens
from torch import nn

from actctx import DataError, OptionError
from actctx._model.fingerprint import describe_model, fingerprint
from actctx._model.same_model import differences, packed, unpacked
from actctx.dataset import ActivationDataset
from actctx.extract import extract

lance = pytest.importorskip("lance")


# Weights and buffers.
def normed(mean=0.0):
    norm = nn.BatchNorm1d(tokens().shape[1])
    norm.running_mean[3] = mean
    return mlp(norm)


def test_a_buffer_that_is_saved_is_named(out):
    assert refused(normed(), normed(1e-7), out).startswith(
        "buffer 'block.1.running_mean' is 'float32 (7,) "
    )


def test_the_fingerprint_is_of_weights_and_saved_buffers():
    assert fingerprint(normed()) == fingerprint(normed())
    assert fingerprint(normed()) != fingerprint(normed(1e-7))


def rotary(factor):
    model = huggingface("LlamaForCausalLM")
    model.model.rotary_emb.inv_freq *= factor
    return model


def test_a_buffer_that_is_computed_is_named(out):
    found = refused(rotary(1), rotary(0.98), out, RESID)
    assert found.startswith("buffer 'model.rotary_emb.inv_freq' is 'float32 (4,) ~")


@pytest.mark.parametrize("factor", [1 + 3e-7, 1 - 3e-7])
def test_a_buffer_that_another_device_computed_is_the_same(out, factor):
    resumed(rotary(1), rotary(factor), out, RESID)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_that_follow_the_longest_sequence_are_no_setting(out, kind):
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4} if kind == "longrope" else {}
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0, **factors}
    rope["original_max_position_embeddings"] = 8
    name = "Phi3ForCausalLM" if factors else "LlamaForCausalLM"
    sizes = {"max_position_embeddings": 16, "rope_parameters": rope}
    if factors:
        sizes["original_max_position_embeddings"] = 8
    model, fresh = (huggingface(name, **sizes) for _ in range(2))
    before = fresh.model.rotary_emb.inv_freq.clone()
    extract(model, [tokens()], RESID, out)
    with torch.no_grad():
        model(tokens(1, 20))
    assert not torch.equal(model.model.rotary_emb.inv_freq, before)
    for each in (model, fresh):
        extract(each, [tokens(), tokens(seed=1)], RESID, out)


def test_a_weight_is_named_among_all_that_differ(out):
    other = mlp()
    with torch.no_grad():
        other.block[0].weight[1, 2] += 1
        other.head.bias += 1
    found = refused(mlp(), other, out)
    assert found.startswith("weight 'block.0.weight' (1 of 2 differences) is 'float32 (8, 8) ")


def quantised(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates its own
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)


def test_weights_that_are_saved_in_a_way_of_their_own_are_told_apart():
    first, same, other = map(quantised, (0, 0, 1))
    assert not [*first.parameters()]
    assert fingerprint(first) == fingerprint(same) != fingerprint(other)
    assert "buffer '0._packed_params._packed_params.0'" in [
        name for name, *_ in differing(first, other)
    ]


@pytest.mark.parametrize(
    "made",
    [
        lambda weights: weights.to_sparse(),
        lambda weights: weights.to_sparse_csr(),
        lambda weights: weights.to_sparse_csc(),
        lambda weights: weights.to(torch.complex64),
        lambda weights: weights.to(torch.float8_e4m3fn),
        lambda weights: torch.quantize_per_tensor(weights, 0.1, 3, torch.qint8),
        lambda weights: torch.quantize_per_channel(
            weights, torch.tensor([0.1, 0.2]), torch.tensor([0, 0]), 0, torch.qint8
        ),
    ],
)
def test_weights_of_any_kind_are_digested(made):
    def model(last):
        holder = nn.Module()
        weights = torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, last]])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that sparse and quantised tensors are in beta
            holder.weight = nn.Parameter(made(weights), requires_grad=False)
        return holder

    assert fingerprint(model(3.0)) == fingerprint(model(3.0)) != fingerprint(model(4.0))


def test_weights_that_are_not_initialised_are_refused(out):
    model = mlp()
    model.head = nn.LazyLinear(3)
    assert refusal(OptionError, model, [tokens()], SITE, out) == (
        "the weights of 'head.weight' are initialised only in the first forward, so data sets "
        "cannot identify them; run the model once first"
    )


_SHARDED = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from actctx._model.fingerprint import fingerprint

rank, world, file = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 5))
whole = fingerprint(model)
mesh = init_device_mesh("cpu", (world,))
for linear, kind in zip(model, (Shard(0), Replicate())):
    linear.weight = nn.Parameter(distribute_tensor(linear.weight.detach(), mesh, [kind]))
assert fingerprint(model) == whole
with torch.no_grad():
    model[0].weight.mul_(2)
assert fingerprint(model) != whole
dist.destroy_process_group()
"""


@pytest.mark.thorough
@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_sharded_weights_have_the_fingerprint_of_the_whole(tmp_path, world):
    command = [sys.executable, "-W", "ignore", "-c", _SHARDED]
    ranks = [
        subprocess.Popen([*command, str(rank), str(world), str(tmp_path / "store")])
        for rank in range(world)
    ]
    assert [rank.wait() for rank in ranks] == [0] * world


# Modules and configs.


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        (nn.LeakyReLU(0.1), nn.LeakyReLU(0.2), "setting 'block.1.negative_slope' is 0.1, not 0.2"),
        (nn.Dropout(0.1), nn.Dropout(0.5), "setting 'block.1.p' is 0.1, not 0.5"),
        (nn.ReLU(), nn.GELU(), "class of 'block.1' is 'ReLU', not 'GELU'"),
        (nn.GELU(), nn.GELU("tanh"), "setting 'block.1.approximate' is 'none', not 'tanh'"),
        (Scale(2.0), Scale(3.0), "setting 'block.1.factor' is 2.0, not 3.0"),
        (Scale(_power=1), Scale(_power=2), "setting 'block.1._power' is 1, not 2"),
        (Scale(most=torch.inf), Scale(most=1), "setting 'block.1.most' is 'inf', not 1"),
        (
            Scale(at={1: (2, None)}),
            Scale(at={1: (3, None)}),
            "setting 'block.1.at' is {'1': [2, None]}, not {'1': [3, None]}",
        ),
    ],
)
def test_modules_without_parameters_are_told_apart(out, first, second, said):
    found = refused(mlp(first), mlp(second), out)
    assert found.replace(" (1 of 2 differences)", "") == said


def test_one_more_module_without_parameters_is_named(out):
    found = refused(mlp(nn.Tanh()), mlp(nn.Tanh(), nn.Tanh()), out)
    assert found == "class of 'block.2' is None, not 'Tanh'"


def test_the_epsilon_of_a_norm_is_named(out):
    found = refused(mlp(nn.LayerNorm(8, eps=1e-5)), mlp(nn.LayerNorm(8, eps=1e-3)), out)
    assert found == "setting 'block.1.eps' is 1e-05, not 0.001"


def test_tensors_and_functions_that_a_module_holds_are_told_apart():
    vectors = [torch.linspace(0, last, 8) for last in (1, 1, 2)]
    first, same, other = (mlp(Scale(vectors=[vector])) for vector in vectors)
    assert not differing(first, same)
    assert [name for name, *_ in differing(first, other)] == ["setting 'block.1.vectors'"]
    first, other = (mlp(Scale(act=act)) for act in (nn.functional.gelu, nn.functional.relu))
    assert [name for name, *_ in differing(first, other)] == ["setting 'block.1.act'"]


def test_what_a_forward_changes_is_a_state_and_no_setting(out):
    model = mlp(Scale(calls=5))
    extract(model, [tokens()], SITE, out)
    assert model.block[1].calls == 6
    extract(model, [tokens(), tokens(seed=1)], SITE, out)
    extract(mlp(Scale()), [tokens(), tokens(seed=1), tokens(seed=2)], SITE, out)


def hooked(hook, *, put="register_forward_hook", **options):
    model = mlp()
    getattr(model.block[0], put)(hook, **options)
    return model


def test_functions_are_told_apart_by_their_names_alone_in_another_python():
    def model(factor, act=nn.functional.gelu):
        return hooked(lambda m, args, output: output * factor, act=act)  # noqa: ARG005

    def hooked(hook, act):
        made = mlp(Scale(act=act, own=hook))
        made.block[0].register_forward_hook(hook)
        return made

    first, other, third = map(describe_model, (model(2), model(3), model(2, nn.functional.relu)))
    place = "output of 'block.0'"
    found = [
        name for name, *_ in differences(first, other, versions_differ=False, changing=[place])
    ]
    assert found == ["setting 'block.1.own'", f"hooks on the {place}"]
    elsewhere = packed({**unpacked(first), "python": {"version": "3.99"}})
    first = {**first, "settings": elsewhere}
    assert not [*differences(first, other, versions_differ=False, changing=[place])]
    assert [*differences(first, third, versions_differ=False)] == [
        ("setting 'block.1.act'", "gelu", "relu")
    ]


def test_an_attribute_that_came_with_another_use_is_no_difference():
    assert not differing(mlp(Scale()), mlp(Scale(cached=3)))


def test_a_setting_of_the_config_is_named(out):
    other = huggingface("MixtralForCausalLM")
    other.config.num_experts_per_tok = 1
    assert refused(huggingface("MixtralForCausalLM"), other, out, RESID) == (
        "setting 'config.num_experts_per_tok' is 2, not 1"
    )


def test_the_number_of_experts_that_a_layer_holds_is_named(out):
    other = huggingface("MixtralForCausalLM")
    other.model.layers[1].mlp.gate.top_k = 1
    assert refused(huggingface("MixtralForCausalLM"), other, out, RESID) == (
        "setting 'model.layers.1.mlp.gate.top_k' is 2, not 1"
    )


def test_a_config_that_somebody_wrote_is_read():
    from types import SimpleNamespace

    first, other = (mlp(Scale(config=SimpleNamespace(power=each))) for each in (1, 2))
    assert differing(first, other) == [("setting 'block.1.config.power'", 1, 2)]


def test_the_attention_implementation_is_named(out):
    models = [huggingface("LlamaForCausalLM", attention) for attention in ("eager", "sdpa")]
    assert refused(*models, out, RESID) == (
        "attention implementation of config is 'eager', not 'sdpa'"
    )


def test_what_says_where_a_model_came_from_is_no_setting(tmp_path, out):
    model = huggingface("LlamaForCausalLM", "sdpa")
    model.config._name_or_path = "gpt2"
    loaded = []
    for name in ("a", "b"):
        model.save_pretrained(tmp_path / name)
        loaded.append(type(model).from_pretrained(tmp_path / name).eval())
    loaded[1].config.transformers_version = "4.0.0"
    loaded[1].config.dtype = torch.float16  # what it says, not what the weights are
    for each in loaded:
        assert not differing(model, each)
    resumed(*loaded, out, RESID)
    assert str(tmp_path) not in str(unpacked(Read(out).layout.model))


@pytest.mark.parametrize("secret", ["hf_token", "api_key", "password"])
def test_secrets_are_not_written(secret):
    described = unpacked(describe_model(mlp(Scale(**{secret: "hunter2"}))))
    assert "hunter2" not in str(described)


_DESCRIBED = """
import sys, warnings
warnings.simplefilter("ignore")
from types import SimpleNamespace
import torch
from torch import nn
from actctx._model.fingerprint import describe_model
torch.manual_seed(0)
made = [nn.Sequential(nn.Linear(3, 2), nn.LeakyReLU(0.2), nn.BatchNorm1d(2))]
made[0].config = SimpleNamespace(at={"b", "a", "c"}, act=nn.functional.gelu)
made[0][0].register_forward_hook(lambda module, args, output: output in {"x", "y"})
if sys.argv[2:]:
    sys.path.insert(0, sys.argv[1])
    from models import bridge, huggingface
    made += [bridge("BertForMaskedLM"), huggingface("T5ForConditionalGeneration")]
print(*(describe_model(model)["settings"] for model in made))
"""


@pytest.mark.thorough
@pytest.mark.parametrize("more", [[], pytest.param(["bridge"], marks=pytest.mark.slow)])
def test_equal_models_agree_in_other_processes(more):
    found = {
        subprocess.run(
            [sys.executable, "-c", _DESCRIBED, str(Path(__file__).parents[1]), *more],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1
    assert len(found.pop().split()) == 1 + 2 * bool(more)


def test_a_config_of_another_version_may_lack_a_setting():
    first, other = (mlp(Scale(config=type("C", (), {})())) for _ in range(2))
    other.block[1].config.rope_new = 1
    assert [name for name, *_ in differing(first, other)] == ["setting 'block.1.config.rope_new'"]
    assert not differing(first, other, versions_differ=True)
    first.block[1].config.rope_new = 2
    assert differing(first, other, versions_differ=True)


# Data sets of earlier versions, and damaged ones.


def rewritten(out, **model):
    import json

    dataset = lance.dataset(str(out))
    found = json.loads(dataset.schema.metadata[b"actctx"])
    for key, value in model.items():
        found["model"].pop(key) if value is None else found["model"].update({key: value})
    dataset.update_schema_metadata({"actctx": json.dumps(found)})


def test_a_data_set_of_an_earlier_version_is_resumed(out):
    model = normed()
    extract(model, [tokens()], SITE, out)
    parameters = unpacked(describe_model(model))["parameters"]
    assert parameters != fingerprint(model)  # since it has buffers
    rewritten(out, settings=None, fingerprint=parameters)
    extract(normed(1.0), [tokens(), tokens(seed=1)], SITE, out)
    ActivationDataset(out).check(model)
    with torch.no_grad():
        model.head.weight += 1
    now = unpacked(describe_model(model))["parameters"]
    message = refusal(DataError, model, [tokens(), tokens(seed=1), tokens(seed=2)], SITE, out)
    assert message.startswith(
        f"cannot resume '{out}': its model's fingerprint is '{parameters}', not '{now}'; give the "
        "same, or another path (if a part of the model"
    )


@pytest.mark.parametrize(
    "settings",
    [
        "!",
        "AAAA",
        3,
        packed({"weights": []}),
        packed({"states": {}}),
        packed({"hooks": {"x": [1]}}),
    ],
)
def test_damaged_settings_are_an_error_of_ours(out, settings):
    extract(mlp(), [tokens()], SITE, out)
    rewritten(out, settings=settings)
    message = refusal(DataError, mlp(), [tokens(), tokens(seed=1)], SITE, out)
    assert message.startswith("what the data set says of its model is damaged (")
    assert message.endswith("), so no model can be compared with it; give another path")


# check().


def test_check_names_what_differs(out):
    model = mlp(nn.LeakyReLU(0.1))
    extract(model, [tokens()], SITE, out)
    data = ActivationDataset(out)
    with torch.autocast("cpu"):
        data.check(model)  # how it is run now is not asked
    described = f"a Mlp with the fingerprint {fingerprint(model)}"
    with pytest.raises(DataError) as caught:
        data.check(mlp(nn.LeakyReLU(0.2)))
    assert str(caught.value) == (
        f"'{out}' holds activations of {described}, but this model is {described}: its setting "
        "'block.1.negative_slope' is 0.1 there, but 0.2 here; give the model that they were "
        "extracted from, or extract them from this one"
    )
