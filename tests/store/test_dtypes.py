"""Sites of integers, bools and floats of eight bits, from the forward to the training loop."""

import json

import pytest
import torch
from extracted import refusal
from models import huggingface
from torch import nn
from transformers.models.mixtral import modeling_mixtral

from actctx import AxisError, DataError, OptionError, Site
from actctx._store.site_columns import FLOAT8
from actctx.dataset import ActivationDataset
from actctx.extract import extract

lance = pytest.importorskip("lance")

HAS_ROUTER = hasattr(modeling_mixtral, "MixtralTopKRouter")
NUMBERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
FLOATS = sorted(FLOAT8, key=str)
VALUES = Site("values", axes="batch pos d")
LARGE = 2**53 + 1  # which no float64 is
IDS = torch.arange(2, 44).view(6, 7)


class Numbers(nn.Module):
    """A module of which a part yields values of a dtype, and another floats."""

    def __init__(self, dtype):
        super().__init__()
        self.values, self.floats, self.dtype = nn.Identity(), nn.Identity(), dtype

    def forward(self, input_ids):
        spread = torch.stack([input_ids, input_ids % 3, -input_ids], dim=-1)
        floats = spread.float()
        if self.dtype == torch.int64:
            spread = spread + LARGE
        if self.dtype == torch.bool:
            spread = spread % 2
        self.values(spread.to(self.dtype))
        return self.floats(floats)


def values(dtype, ids=IDS):
    """What the part yields, kept by a bare hook, a row for each token."""
    model, kept = Numbers(dtype), []
    model.values.register_forward_hook(lambda _module, _inputs, output: kept.append(output))
    model(ids)
    return kept[0].reshape(-1, 3)


def same(here, there):
    """Compare values, and dtypes, of which torch cannot compare all."""
    if here.dtype in FLOAT8:
        return here.dtype == there.dtype and torch.equal(here.float(), there.float())
    return here.dtype == there.dtype and torch.equal(here, there)


@pytest.mark.parametrize("dtype", [*NUMBERS, *FLOATS], ids=str)
def test_they_come_back_as_they_were(out, dtype):
    extract(Numbers(dtype), IDS, VALUES, out, batch_size=2)
    data, wanted = ActivationDataset(out), values(dtype)
    rows = torch.tensor([40, 3, 3, 17])
    assert data.sites["values"].dtype == str(dtype).removeprefix("torch.")
    assert data.nbytes == 42 * (4 + 8 + 4 + 3 * dtype.itemsize)
    assert same(data.read("values"), wanted)
    assert same(data[5]["values"], wanted[5])
    assert same(data[2:40:3]["values"], wanted[2:40:3])
    assert same(data[rows]["values"], wanted[rows])
    assert same(ActivationDataset(out, where="token > 20")[:]["values"], wanted[19:])


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("dtype", [*NUMBERS, *FLOATS], ids=str)
def test_they_are_shuffled_with_their_rows(out, dtype, workers):
    extract(Numbers(dtype), IDS, VALUES, out)
    loader = ActivationDataset(out).loader(8, seed=0, workers=workers)
    for batch in loader:
        assert same(batch["values"], values(dtype)[batch["token"].long() - 2])


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float8_e5m2], ids=str)
def test_they_are_resumed_and_added(out, dtype):
    model = Numbers(dtype)
    extract(model, IDS, VALUES, out, max_tokens=16)
    extract(model, IDS, VALUES, out)
    floats = Site("floats", axes="batch pos d")
    extract(model, IDS, {"other": VALUES, "floats": floats}, out, add=True)
    rows = ActivationDataset(out)[:]
    assert same(rows["values"], values(dtype))
    assert same(rows["other"], values(dtype))
    assert rows["floats"].dtype == torch.float32


def test_integers_are_resumed_and_added_whatever_dtype_floats_are_cast_to(out):
    sites = [VALUES, Site("floats", axes="batch pos d")]
    extract(Numbers(torch.int64), IDS, sites, out, max_tokens=16, dtype=torch.float16)
    extract(Numbers(torch.int64), IDS, sites, out, dtype=torch.float16)
    other = {"other": VALUES}
    extract(Numbers(torch.int64), IDS, other, out, dtype=torch.float16, add=True)
    extract(Numbers(torch.int64), IDS, other, out, dtype=torch.float16, add=True)
    rows = ActivationDataset(out)[:]
    assert same(rows["values"], values(torch.int64))
    assert same(rows["other"], values(torch.int64))


def test_numbers_without_axes_of_their_own_are_rows(gpt2, out):
    extract(gpt2, IDS, ["embed.hook_in", "blocks.0.hook_resid_pre"], out, dtype=torch.float16)
    rows = ActivationDataset(out)[:]
    assert same(rows["embed.hook_in"], IDS.flatten())
    assert rows["blocks.0.hook_resid_pre"].dtype == torch.float16


@pytest.mark.skipif(not HAS_ROUTER, reason="its router is a linear layer")
@pytest.mark.parametrize("site", ["blocks.1.mlp.gate.hook_out", "named"])
def test_experts_chosen_are_rows_of_tokens(out, site):
    model, kept = huggingface("MixtralForCausalLM"), []
    named = Site("model.layers.1.mlp.gate", output=2, axes="batch pos choice")
    batch = {
        "input_ids": torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]),
    }
    extract(model, [batch], [named if site == "named" else site], out, drop={"position": [0]})
    (rows,) = (ActivationDataset(out).read(name) for name in ActivationDataset(out).sites)
    gate = model.model.layers[1].mlp.gate
    gate.register_forward_hook(lambda _module, _inputs, output: kept.append(output))
    for sequence in ([5, 6, 7], [8, 9, 10, 11, 12]):
        model(torch.tensor([sequence]))
    wanted = [torch.cat([each[part][1:] for each in kept]) for part in (0, 2)]
    if site == "named":
        assert torch.equal(rows, wanted[1])
        assert rows.dtype == torch.int64
    else:
        assert torch.allclose(rows, wanted[0], atol=1e-5)


@pytest.mark.skipif(not HAS_ROUTER, reason="its router is a linear layer")
def test_what_may_be_in_another_order_than_the_tokens_is_refused(out):
    model = huggingface("MixtralForCausalLM")
    site = Site("model.layers.1.mlp.gate", axes="token choice", output=2)
    assert refusal(AxisError, model, [[3, 4, 5]], [site], out) == (
        "a data set has one row per token, but 'model.layers.1.mlp.gate' has no axis 'batch': its "
        "axes are 'token choice'; if it has one row for each token, in order, give "
        "Site(axes='batch pos choice'), else leave it out"
    )


class Halved(nn.Module):
    """A module of which a part yields a row for every other token."""

    def __init__(self):
        super().__init__()
        self.alternate = nn.Identity()

    def forward(self, input_ids):
        return self.alternate(input_ids.flatten()[::2, None].float())


def test_a_site_without_a_row_for_each_token_is_refused(out):
    site = Site("alternate", axes="batch pos d")
    assert refusal(AxisError, Halved(), torch.ones(2, 6, dtype=torch.long), [site], out) == (
        "a data set has one row per token, but 'alternate' fired with the shape (6, 1) for 2 x 6 "
        "tokens, so it does not have one row for each; leave it out"
    )


# Casts.


def test_a_dtype_is_of_floating_point_sites_and_leaves_integers_exact(out):
    floats = Site("floats", axes="batch pos d")
    extract(Numbers(torch.int64), IDS, [VALUES, floats], out, dtype=torch.float16)
    rows = ActivationDataset(out)[:]
    assert same(rows["values"], values(torch.int64))
    assert rows["floats"].dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.uint8])
def test_floats_are_not_cast_to_integers(out, dtype):
    assert refusal(OptionError, Numbers(torch.int8), IDS, VALUES, out, dtype=dtype) == (
        f"dtype={dtype} is not one of torch's floating-point dtypes; give one, such as "
        "torch.float16"
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_floats_are_cast_to_eight_bits(out, dtype):
    floats = Site("floats", axes="batch pos d")
    extract(Numbers(torch.int8), IDS, floats, out, dtype=dtype)
    wanted = values(torch.int8).float().to(dtype)
    assert same(ActivationDataset(out).read("floats"), wanted)


class Beyond(nn.Module):
    """A module of which a part yields a value in one place, and zeros elsewhere."""

    def __init__(self, value):
        super().__init__()
        self.part, self.value = nn.Identity(), value

    def forward(self, input_ids):
        return self.part(torch.where(input_ids == 5, self.value, 0.0)[..., None])


@pytest.mark.parametrize(
    ("dtype", "value", "shown", "remedy"),
    [
        (torch.float8_e4m3fn, 500.0, "448 or beyond", "float8_e4m3fn ends at 448"),
        (torch.float8_e4m3fn, -1e9, "-448 or beyond", "float8_e4m3fn ends at 448"),
        (torch.float8_e5m2, 1e9, "57344 or beyond", "float8_e5m2 ends at 57344"),
        (torch.float8_e4m3fnuz, 500.0, "nan", "float8_e4m3fnuz ends at 240"),
        (torch.float8_e5m2fnuz, 1e9, "nan", "float8_e5m2fnuz ends at 57344"),
    ],
)
def test_what_eight_bits_do_not_reach_is_refused(out, dtype, value, shown, remedy):
    site = Site("part", axes="batch pos d")
    data = torch.tensor([[3, 4], [4, 5]])
    assert refusal(DataError, Beyond(value), data, site, out, dtype=dtype) == (
        f"'part' is {shown} in row 3: token 5 of sequence 1, position 1; {remedy}, but "
        "dtype=torch.bfloat16 has a larger range; finite=False writes it as it is"
    )
    with pytest.warns(UserWarning, match="'part' loses values in its cast: 1 value is outside"):
        extract(Beyond(value), data, site, out, dtype=dtype, finite=False)
    wanted = torch.tensor([0.0, 0, 0, value]).to(dtype).float()
    assert torch.equal(
        ActivationDataset(out).read("part").float().isnan().flatten(), wanted.isnan()
    )


@pytest.mark.parametrize("dtype", NUMBERS, ids=str)
def test_the_maximum_of_integers_is_exact(out, dtype):
    extract(Numbers(dtype), IDS, VALUES, out, pool="max", dtype=torch.float16)
    wanted = values(dtype).view(6, 7, 3).amax(1)
    assert same(ActivationDataset(out).read("values"), wanted)


def test_the_mean_of_integers_is_that_of_their_sum(out):
    extract(Numbers(torch.int64), IDS, VALUES, out, pool="mean")
    wanted = values(torch.int64).view(6, 7, 3).double().mean(1).float()
    assert same(ActivationDataset(out).read("values"), wanted)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.uint16, torch.uint32], ids=str)
def test_other_numbers_are_refused(out, dtype):
    assert refusal(OptionError, Numbers(dtype), IDS, VALUES, out) == (
        f"'values' yields {str(dtype).removeprefix('torch.')}, but a data set stores "
        "floating-point numbers, bools, signed integers of up to 64 bits, and unsigned ones of 8 "
        "bits; leave the site out, or keep it in memory with capture()"
    )


# What a data set of them is good for.


@pytest.mark.parametrize("dtype", NUMBERS[:-1], ids=str)
def test_conditions_compare_integers(out, dtype):
    extract(Numbers(dtype), IDS, VALUES, out)
    limit = LARGE + 2 if dtype == torch.int64 else 1
    data = ActivationDataset(out, where=f"values[2] = {limit} AND token > 4")
    wanted = values(dtype)[:, 1] == limit
    wanted[:3] = False
    assert data.tokens.tolist() == (wanted.nonzero().flatten() + 2).tolist()


@pytest.mark.parametrize("condition", ["values[1]", "values[1] = true", "NOT values[1] = false"])
def test_conditions_ask_for_bools(out, condition):
    extract(Numbers(torch.bool), IDS, VALUES, out)
    tokens = ActivationDataset(out, where=condition).tokens
    assert tokens.tolist() == [token for token in range(2, 44) if token % 2]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_conditions_on_eight_bits_are_refused(out, dtype):
    extract(Numbers(dtype), IDS, VALUES, out)
    with pytest.raises(OptionError) as refused:
        ActivationDataset(out, where="values[1] > 3")
    assert str(refused.value) == (
        f"where='values[1] > 3' compares 'values', which is {str(dtype).removeprefix('torch.')}, "
        "as Lance cannot; read the rows and compare them, as in data[:]['values'].float() > 0"
    )


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool], ids=str)
def test_saelens_is_given_no_integers(out, tmp_path, dtype):
    pytest.importorskip("datasets")
    extract(Numbers(dtype), IDS, VALUES, out)
    with pytest.raises(OptionError) as refused:
        ActivationDataset(out).to_saelens(tmp_path / "cached", context=7)
    assert str(refused.value) == (
        "SAELens trains on floating-point activations, but 'values' is "
        f"{str(dtype).removeprefix('torch.')}; leave it out, with ActivationDataset(..., sites=)"
    )
    assert not (tmp_path / "cached").exists()


def test_saelens_is_given_eight_bits_as_float32(out, tmp_path):
    datasets = pytest.importorskip("datasets")
    extract(Numbers(torch.float8_e4m3fn), IDS, VALUES, out)
    with pytest.warns(UserWarning, match="takes four times the space"):
        ActivationDataset(out).to_saelens(tmp_path / "cached", context=7)
    cached = datasets.load_from_disk(tmp_path / "cached").with_format("torch")[:]["values"]
    assert torch.equal(cached.reshape(-1, 3), values(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float8_e5m2], ids=str)
def test_safetensors_hold_them(out, tmp_path, dtype):
    from safetensors.torch import load_file

    extract(Numbers(dtype), IDS, VALUES, out)
    ActivationDataset(out).to_safetensors(tmp_path / "acts.safetensors")
    assert same(load_file(tmp_path / "acts.safetensors")["values"], values(dtype))


def test_only_data_sets_that_need_it_are_of_the_later_layout(out):
    floats = Site("floats", axes="batch pos d")
    extract(Numbers(torch.int8), IDS, floats, out)
    assert _format(out) == 1
    extract(Numbers(torch.int8), IDS, VALUES, out, add=True)
    assert _format(out) == 2


def _format(path):
    return json.loads(lance.dataset(path).schema.metadata[b"actctx"])["format"]
