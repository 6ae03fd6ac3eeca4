"""What `acts.save` writes, and `actctx.load` reads."""

import contextlib
import json
import struct

import numpy as np
import pytest
import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import actctx
from actctx import DataError, NotCapturedError, OptionError, Site, capture
from actctx.dataset import ActivationDataset
from actctx.extract import extract

RESID = "blocks.*.hook_resid_post"
DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.bool),
    *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu),
]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "acts.safetensors"


@pytest.fixture
def back(path):
    """Save, and load what was saved."""

    def roundtrip(acts, **given):
        acts.save(path)
        return actctx.load(path, **given)

    return roundtrip


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


class Yields(nn.Module):
    """A module that yields one tensor."""

    def __init__(self, value):
        super().__init__()
        self.value = value
        self.layer = nn.Identity()

    def forward(self):
        return self.layer(self.value)


def of_values(value):
    model = Yields(value)
    with capture(model, "layer") as acts:
        model()
    return acts


def test_a_buffer_comes_back_as_it_was(gpt2, ids, back):
    names = {"resid": RESID, "z": Site("blocks.0.attn.hook_z", slice={"head": [0, 2]})}
    with capture(gpt2, names) as acts:
        gpt2(ids)
        gpt2(ids)
    again = back(acts)
    assert isinstance(again, actctx.Activations)
    assert [*again] == [*acts]
    for name in acts:
        assert torch.equal(again[name], acts[name])
        assert again.axes(name) == acts.axes(name)
        assert again.spec(name).__name__ == acts.spec(name).__name__
    assert torch.equal(again.stack("resid"), acts.stack("resid"))
    assert torch.equal(again.stack("hook_resid_post"), acts.stack("hook_resid_post"))
    assert torch.equal(again["blocks.0.attn.o.hook_in"], acts.z)
    assert torch.equal(again.z, acts.z)
    assert repr(again) == repr(acts)
    assert again.forwards == 2


def test_a_name_that_is_not_there_is_said_as_by_the_buffer(gpt2, ids, back):
    with capture(gpt2, RESID) as acts:
        gpt2(ids)
    again, said = back(acts), []
    for each in (acts, again):
        with pytest.raises(NotCapturedError) as caught:
            each["blocks.0.hook_mlp_out"]
        said.append(str(caught.value))
    assert said[0] == said[1]


def test_what_never_fired_is_missing_again(ids, back):
    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.a, self.b = nn.Embedding(50, 4), nn.Identity(), nn.Identity()

        def forward(self, ids):
            return self.a(self.embed(ids))

    model = Skips()
    with capture(model, "*") as acts:
        model(ids)
    again = back(acts)
    assert again.missing == acts.missing == ("b",)
    with pytest.raises(NotCapturedError, match="'b': it never fired in 1 forward"):
        again["b"]


def test_positions_come_back(gpt2, ids, back, path):
    mask = torch.ones_like(ids).bool()
    mask[0, 3:] = False
    with capture(gpt2, RESID, mask=mask) as acts:
        gpt2(ids, attention_mask=mask)
    again = back(acts)
    for name in acts:
        assert torch.equal(again.positions(name), acts.positions(name))
        assert torch.equal(again[name], acts[name])
    # One tensor for all sites that have the same rows.
    assert {*load_file(path)} == {*acts, "positions"}


def test_without_a_mask_there_are_no_positions(gpt2, ids, back):
    with capture(gpt2, RESID) as acts:
        gpt2(ids)
    with pytest.raises(NotCapturedError, match="was captured without mask="):
        back(acts).positions("blocks.0.hook_resid_post")


def test_a_site_may_be_called_as_the_positions_are(ids, back):
    model = nn.Sequential()
    model.add_module("positions", nn.Embedding(50, 4))
    mask = torch.ones_like(ids).bool()
    mask[0, 3:] = False
    with capture(model, Site("positions", axes="batch pos d"), mask=mask) as acts:
        model(ids)
    again = back(acts)
    assert torch.equal(again["positions"], acts["positions"])
    first, second = again.positions("positions"), acts.positions("positions")
    assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_comes_back_bit_by_bit(dtype, back):
    value = torch.arange(16 * dtype.itemsize, dtype=torch.uint8)
    value = value % 2 == 0 if dtype == torch.bool else value.view(dtype)
    acts = of_values(value.reshape(2, -1))
    again = back(acts)
    assert again.tensor.dtype == dtype
    assert again.tensor.shape == acts.tensor.shape
    assert torch.equal(bits(again.tensor), bits(acts.tensor))


@pytest.mark.parametrize("value", [torch.tensor(1.5), torch.empty(0, 3), torch.ones(2, 3).T])
def test_every_shape_comes_back(value, back):
    again = back(of_values(value)).tensor
    assert torch.equal(again, value)
    assert again.is_contiguous()


def test_layers_that_were_stacked_come_back(gpt2, ids, back):
    class Blocks(actctx.Schema):
        resid: Float[torch.Tensor, "layer batch pos d_model"] = actctx.site(RESID)

    with capture(gpt2, Blocks) as acts:
        gpt2(ids)
    stacked = acts.resid  # each layer is a view of it now
    assert torch.equal(back(acts.activations).stack("hook_resid_post"), stacked)


def test_what_is_loaded_is_owned(gpt2, ids, back, path):
    with capture(gpt2, RESID) as acts:
        gpt2(ids)
    again = back(acts)
    first = again["blocks.0.hook_resid_post"]
    assert first.untyped_storage().nbytes() == first.nbytes
    before = acts["blocks.0.hook_resid_post"].clone()
    with path.open("r+b") as file:  # the file changes under it
        file.seek(-64, 2)
        file.write(b"\xff" * 64)
    assert torch.equal(first, before)
    first.zero_()
    assert not again["blocks.0.hook_resid_post"].any()


def test_what_was_loaded_can_be_saved_moved_and_cast(gpt2, ids, back):
    with capture(gpt2, RESID, join="batch") as acts:
        gpt2(ids)
    again = back(back(acts).to(torch.float16))
    assert again["blocks.0.hook_resid_post"].dtype == torch.float16
    assert [*again] == [*acts]


def test_a_device_is_chosen(gpt2, ids, back):
    with capture(gpt2, RESID) as acts:
        gpt2(ids)
    assert back(acts, device="meta").stack("hook_resid_post").is_meta
    with pytest.raises(OptionError, match="device='nowhere' cannot hold activations"):
        back(acts, device="nowhere")


def test_what_an_earlier_version_wrote_is_read(path):
    save_file(
        {"b": torch.ones(2, 3), "a": torch.zeros(2, 3)},
        path,
        metadata={
            "axes": json.dumps({"b": "batch d_model", "a": "batch d_model"}),
            "model": "GPT2Model",
            "actctx": "0.1.0",
            "torch": "2.13.0",
        },
    )
    acts = actctx.load(path)
    assert [*acts] == ["b", "a"]
    assert acts.axes("a") == ("batch", "d_model")
    assert repr(acts).startswith("Activations: 2 sites, 48 B\n")
    with pytest.raises(NotCapturedError) as caught:
        acts["c"]
    assert str(caught.value) == "nothing was captured from 'c': the captured names are 'b', 'a'"


def test_what_something_else_wrote_is_read_with_unknown_axes(path):
    layers = {f"model.layers.{layer}.out": torch.full((2, 3), layer) for layer in range(3)}
    save_file(layers, path, metadata={"format": "pt", "axes": "[1, 2]"})
    acts = actctx.load(path)
    assert {*acts} == {*layers}
    assert acts.axes("model.layers.1.out") == ("_", "_")
    assert acts.stack("out")[:, 0, 0].tolist() == [0, 1, 2]
    assert acts["layers.2.out"].tolist() == [[2, 2, 2]] * 2
    save_file(layers, path)
    assert {*actctx.load(path)} == {*layers}


def test_a_file_of_a_data_set_is_read(gpt2, ids, path, tmp_path):
    pytest.importorskip("lance")
    extract(gpt2, ids, "blocks.1.hook_resid_post", tmp_path / "a.lance", progress=False)
    data = ActivationDataset(tmp_path / "a.lance")
    data.to_safetensors(path)
    acts = actctx.load(path)
    assert torch.equal(acts["blocks.1.hook_resid_post"], data.read("blocks.1.hook_resid_post"))
    assert acts.axes("blocks.1.hook_resid_post") == ("token", "d_model")
    assert acts.axes("token") == ("token",)


def header_of(path):
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(size))["__metadata__"]


@pytest.fixture
def written(gpt2, ids, path):
    """A file that was saved, and how to write it anew with other metadata."""
    mask = torch.ones_like(ids).bool()
    mask[0, 3:] = False
    with capture(gpt2, RESID, mask=mask) as acts:
        gpt2(ids, attention_mask=mask)
    acts.save(path)
    tensors, metadata = load_file(path), header_of(path)

    def forge(known=lambda known: known, **changed):
        known = json.dumps(known(json.loads(metadata["activations"])))
        save_file(tensors, path, metadata={**metadata, "activations": known, **changed})

    return forge


def of_first(known, **changed):
    name = "blocks.0.hook_resid_post"
    return {**known, "sites": {**known["sites"], name: {**known["sites"][name], **changed}}}


@pytest.mark.parametrize(
    "changed",
    [
        {"axes": "{"},
        {"axes": "[]"},
        {"axes": "5"},
        {"axes": '{"blocks.0.hook_resid_post": 5}'},
        {"axes": '{"blocks.0.hook_resid_post": "batch"}'},
        {"axes": "[" * 100_000},
        {"activations": "{"},
        {"activations": "[]"},
        {"activations": "null"},
        {"known": lambda known: {**known, "format": "x"}},
        {"known": lambda known: {**known, "join": "layer"}},
        {"known": lambda known: {**known, "join": []}},
        {"known": lambda known: {**known, "forwards": -1}},
        {"known": lambda known: {**known, "forwards": True}},
        {"known": lambda known: {**known, "sites": []}},
        {"known": lambda known: {**known, "sites": {"no": {}}}},
        {"known": lambda known: {**known, "sites": {"blocks.0.hook_resid_post": 5}}},
        {"known": lambda known: of_first(known, names=[5])},
        {"known": lambda known: of_first(known, names=5)},
        {"known": lambda known: of_first(known, sizes=[None])},
        {"known": lambda known: of_first(known, sizes=[None, 33])},
        {"known": lambda known: of_first(known, sizes=[None, "32"])},
        {"known": lambda known: of_first(known, positions="no")},
        {"known": lambda known: of_first(known, positions=[])},
        {"known": lambda known: of_first(known, positions="blocks.0.hook_resid_post")},
    ],
)
def test_metadata_that_does_not_fit_is_said(written, path, changed):
    written(**changed)
    with pytest.raises(DataError) as caught:
        actctx.load(path)
    assert str(caught.value) == (
        f"cannot read '{path}': its metadata is damaged; give a file that acts.save wrote, or "
        "another safetensors file"
    )


def test_a_file_of_a_later_version_is_called_that(written, path):
    written(known=lambda _: {"format": 3, "all": "else"}, actctx="9.0")
    with pytest.raises(DataError) as caught:
        actctx.load(path)
    assert str(caught.value) == (
        f"cannot read '{path}': it was written by actctx '9.0', whose files this version cannot "
        "read; upgrade actctx to read it"
    )


@pytest.mark.usefixtures("written")
def test_a_damaged_file_is_said(path):
    whole = path.read_bytes()
    chance = np.random.default_rng(0)
    for damage in (b"", b"\0" * 7, whole[:100], whole[:-1], b"\xff" * 8 + whole[8:], whole + b"x"):
        path.write_bytes(damage)
        with pytest.raises(DataError, match=r"^cannot read '.*'; give|^cannot read '.*': .*; give"):
            actctx.load(path)
    for _ in range(300):
        spoilt = bytearray(whole)
        for at in chance.integers(len(whole) // 8, size=3):
            spoilt[at] = chance.integers(256)
        path.write_bytes(spoilt)
        with contextlib.suppress(DataError):
            actctx.load(path)


@pytest.mark.usefixtures("unchecked")
def test_a_path_that_holds_no_file_is_said(tmp_path):
    other = "; give a file that acts.save wrote, or another safetensors file"
    long = tmp_path / ("x" * 300)
    for place, said in {
        tmp_path / "no": f"cannot read '{tmp_path / 'no'}': there is nothing{other}",
        tmp_path: f"cannot read '{tmp_path}': it is a directory; a data set is read with "
        "actctx.dataset.ActivationDataset",
        "s3://bucket/x": "cannot read 's3://bucket/x': it is an address; give the path of a copy "
        "on this machine",
        long: f"cannot read '{long}': File name too long{other}",
    }.items():
        with pytest.raises(DataError) as caught:
            actctx.load(place)
        assert str(caught.value) == said
    with pytest.raises(OptionError, match="5 is not a path"):
        actctx.load(5)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (5, "metadata=5 is not a dict of strings; give one, or None"),
        ("x", "metadata='x' is not a dict of strings; give one, or None"),
        (
            {"a": 5},
            "metadata has 5 under 'a', but a file maps text to text; give strings, such as "
            "json.dumps(value)",
        ),
        (
            {5: "a"},
            "metadata has 'a' under 5, but a file maps text to text; give strings, such as "
            "json.dumps(value)",
        ),
        (
            {"a": "\ud800"},
            "metadata has '\\ud800' under 'a', but a file maps text to text; give strings, such as "
            "json.dumps(value)",
        ),
        (
            {"axes": "mine"},
            "metadata has 'axes', which the file defines itself; give it another name",
        ),
    ],
)
def test_metadata_that_cannot_be_kept_is_refused(metadata, message, path):
    acts = of_values(torch.ones(2, 3))
    with pytest.raises(OptionError) as caught:
        acts.save(path, metadata=metadata)
    assert str(caught.value) == message
    assert not path.exists()


def test_metadata_lies_beside_what_the_file_says(path):
    of_values(torch.ones(2, 3)).save(path, metadata={"note": "mine"})
    with safe_open(path, "pt") as file:
        assert file.metadata()["note"] == "mine"
    assert [*actctx.load(path)] == ["layer"]


@pytest.mark.parametrize("alias", ["__metadata__", "\ud800"])
def test_a_name_that_a_file_cannot_hold_is_refused(alias, path):
    model = Yields(torch.ones(2, 3))
    with capture(model, {alias: "layer"}) as acts:
        model()
    with pytest.raises(DataError) as caught:
        acts.save(path)
    assert str(caught.value) == (
        f"cannot write {alias!r} to '{path}': a safetensors file cannot have such a name; give the "
        "site an alias, as in {'resid': ...}"
    )
    assert not path.exists()
