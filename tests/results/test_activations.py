"""The buffer that is handed back."""

import copy
import json
import pickle
from collections.abc import Mapping

import pytest
import torch
from models import HAS_T5, Mlp, tokens
from safetensors import safe_open
from safetensors.torch import load_file

from actctx import (
    Activations,
    AxisError,
    HookNameError,
    JoinError,
    NotCapturedError,
    OptionError,
    SelectionError,
    SeveralFiringsError,
    Site,
    capture,
)
from actctx._capture.cache_size import estimate_cache_bytes
from actctx._text import format_bytes

RESID = "blocks.1.hook_resid_post"


@pytest.fixture
def acts(gpt2, ids):
    with capture(gpt2, {"resid": RESID, "blocks.0.attn.hook_z": "blocks.0.attn.hook_z"}) as acts:
        gpt2(ids)
    return acts


def test_it_is_a_mapping_in_the_order_in_which_sites_ran(acts):
    assert isinstance(acts, Mapping)
    assert list(acts) == ["blocks.0.attn.hook_z", "resid"]
    assert len(acts) == 2
    assert [tuple(tensor.shape) for tensor in acts.values()] == [(3, 7, 4, 8), (3, 7, 32)]


def test_a_site_is_read_under_every_name_of_its_place(acts):
    assert acts["resid"] is acts[RESID] is acts["blocks.1.hook_out"] is acts.resid
    assert RESID in acts
    assert "blocks.0.hook_out" not in acts
    assert acts.get("blocks.0.hook_out") is None


def test_a_name_that_two_sites_share_reads_neither(gpt2, ids):
    with capture(gpt2, {"a": Site(RESID, slice=0), "b": Site(RESID, slice=1)}) as acts:
        gpt2(ids)
    assert "a" in acts
    assert RESID not in acts


def test_bytes_and_axes_are_told(acts):
    assert acts.nbytes == 2 * 3 * 7 * 32 * 4
    assert acts.axes("resid") == ("batch", "pos", "d_model")
    assert acts.axes("blocks.0.attn.hook_z") == ("batch", "pos", "head", "d_head")


def test_axes_that_are_not_known_are_anonymous():
    linear = torch.nn.Sequential(torch.nn.Linear(4, 5))
    with capture(linear, "0") as acts:
        linear(torch.ones(3, 7, 4))
    assert acts.axes("0") == ("_", "_", "_")


def test_axes_that_only_the_model_tells_are_named_as_far_as_it_does(mlp, ids):
    with capture(mlp, "block") as acts:
        mlp(ids)
    assert acts.axes("block") == ("batch", "pos", "_")


def test_layers_are_stacked_in_their_order(gpt2, ids):
    names = ["blocks.1.hook_resid_post", "blocks.0.hook_resid_post", "blocks.0.hook_resid_pre"]
    with capture(gpt2, names) as acts:
        gpt2(ids)
    stacked = acts.stack("hook_resid_post")
    assert stacked.shape == (2, 3, 7, 32)
    assert torch.equal(stacked[1], acts[RESID])
    assert torch.equal(acts.stack("blocks.*.hook_resid_post"), stacked)


def test_layers_of_a_plain_model_are_stacked(llama, ids):
    with capture(llama, "model.layers.*.mlp") as acts:
        llama(ids)
    assert acts.stack("mlp").shape == (2, 3, 7, 32)
    with capture(llama, "model.layers.*") as acts:
        llama(ids)
    assert acts.stack("model.layers.*").shape == (2, 3, 7, 32)


def test_a_copy_on_a_device_or_in_a_dtype_leaves_the_original(gpt2, ids):
    with capture(gpt2, [RESID, "embed.hook_in"]) as acts:
        gpt2(ids)
    half = acts.to(torch.float16)
    assert half[RESID].dtype == torch.float16
    assert half["embed.hook_in"].dtype == torch.int64
    assert acts[RESID].dtype == torch.float32
    assert acts.to("meta")[RESID].is_meta
    assert half.axes(RESID) == acts.axes(RESID)
    with torch.inference_mode():
        assert not acts.to(torch.float16)[RESID].is_inference()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("nope",), "device='nope' cannot hold activations: Expected one of cpu"),
        (("cpu", "float16"), "dtype='float16' is not one of torch's floating-point dtypes"),
        ((torch.int64,), "dtype=torch.int64 is not one of torch's floating-point dtypes"),
        (
            (torch.float16, torch.float32),
            r"acts.to\(torch.float16, torch.float32\) names two dtypes; give one",
        ),
    ],
)
def test_a_copy_on_no_device_or_in_no_dtype_is_refused(acts, given, message):
    with pytest.raises(OptionError, match=message):
        acts.to(*given)


def test_complex_activations_keep_their_dtype():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2, dtype=torch.complex64))
    x = torch.ones(3, 2, dtype=torch.complex64)
    with capture(model, "0", dtype=torch.float16) as acts:
        output = model(x)
    assert torch.equal(acts.tensor, output)
    assert torch.equal(acts.to(torch.float16).tensor, output)


def test_clearing_forgets_and_goes_on(gpt2, ids):
    with capture(gpt2, RESID) as acts:
        gpt2(ids)
        read = acts.tensor
        acts.clear()
        assert len(acts) == 0
        assert acts.nbytes == 0
        gpt2(ids[:1])
    assert acts.tensor.shape == (1, 7, 32)
    assert read.shape == (3, 7, 32)


def test_joining_releases_what_it_joined(gpt2, ids):
    with capture(gpt2, RESID) as acts:
        for _ in range(4):
            gpt2(ids)
    before = acts.nbytes
    joined = acts.tensor
    assert acts.nbytes == before == joined.nbytes
    assert joined is acts.tensor


def test_a_file_holds_what_was_captured(acts, tmp_path):
    acts.save(tmp_path / "acts.safetensors", metadata={"note": "mine"})
    loaded = load_file(tmp_path / "acts.safetensors")
    assert loaded.keys() == set(acts)
    assert all(torch.equal(loaded[name], acts[name]) for name in acts)
    with safe_open(tmp_path / "acts.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["note"] == "mine"
    assert metadata["model"] == "TransformerBridge"
    assert json.loads(metadata["axes"])["resid"] == "batch pos d_model"
    assert [path.name for path in tmp_path.iterdir()] == ["acts.safetensors"]


def test_a_file_may_lie_at_home(acts, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    acts.save("~/acts.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["acts.safetensors"]


def test_a_file_that_cannot_be_written_leaves_the_one_that_was_there(ids, tmp_path):
    target = tmp_path / "acts.safetensors"
    target.write_text("precious")
    model = Mlp(twice=True)
    with capture(model, "block") as acts:
        model(ids)
    with pytest.raises(SeveralFiringsError):
        acts.save(target)
    assert target.read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["acts.safetensors"]


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda acts: pickle.loads(pickle.dumps(acts))])  # noqa: S301
def test_a_copy_holds_the_same_and_shares_nothing(acts, clone):
    twin = clone(acts)
    assert list(twin) == list(acts)
    assert torch.equal(twin.resid, acts.resid)
    assert twin.resid.data_ptr() != acts.resid.data_ptr()
    assert twin.axes("resid") == acts.axes("resid")


def test_its_repr_is_a_short_table(acts):
    assert repr(acts).splitlines() == [
        "Activations: 2 sites, 5.2 KiB, 1 forward",
        "  site                  axes                   shape         dtype    device  bytes",
        "  blocks.0.attn.hook_z  batch pos head d_head  (3, 7, 4, 8)  float32  cpu     2.6 KiB",
        "  resid                 batch pos d_model      (3, 7, 32)    float32  cpu     2.6 KiB",
    ]


def test_its_repr_does_not_join(gpt2, ids):
    with capture(gpt2, RESID) as acts:
        gpt2(ids)
        gpt2(ids)
        assert "(6, 7, 32)" in repr(acts)
    assert len(acts._columns[RESID].firings[0]) == 2


def test_its_repr_does_not_show_shapes_that_do_not_join(gpt2):
    with capture(gpt2, RESID) as acts:
        gpt2(tokens(2, 5))
        gpt2(tokens(2, 4))
    assert "a list of 2" in repr(acts)
    with capture(gpt2, RESID, join=None) as acts:
        gpt2(tokens(2, 5))
        gpt2(tokens(2, 5))
    assert "2 x (2, 5, 32)" in repr(acts)


def test_its_repr_leaves_out_what_is_too_much(gpt2, ids):
    with capture(gpt2, "**") as acts:
        gpt2(ids)
    lines = repr(acts).splitlines()
    assert lines[0].endswith("1 forward, 16 missing")
    assert len(lines) == 2 + 12 + 1 + 12
    assert "... 44 more ..." in lines[14]


def test_the_repr_of_an_empty_buffer_says_so():
    assert repr(Activations()) == "Activations: 0 sites, 0 B, 0 forwards"
    assert "<table>" in Activations()._repr_html_()


def test_a_spec_is_built_from_site_slice_and_config(gpt2, ids):
    sites = {
        "last": Site("blocks.0.hook_resid_post", slice={"pos": -1}, dtype=torch.bfloat16),
        "heads": Site("blocks.0.attn.hook_q", slice={"head": [0, 3], "pos": slice(2, 5)}),
        "some": Site("blocks.0.attn.hook_z", slice={"d_head": slice(None, None, 3)}),
        "module": Site("blocks.0"),
        "ids": Site("embed.hook_in"),
    }
    with capture(gpt2, sites) as acts:
        gpt2(ids)
    assert acts.spec("last").__name__ == "BFloat16[Tensor, 'batch d_model=32']"
    assert acts.spec("heads").__name__ == "Float32[Tensor, 'batch pos head=2 d_head=8']"
    assert acts.spec("some").__name__ == "Float32[Tensor, 'batch pos head=4 d_head=3']"
    assert acts.spec("module").__name__ == "Float32[Tensor, 'batch pos _']"
    assert acts.spec("ids").__name__ == "Int64[Tensor, 'batch pos']"
    with pytest.raises(NotCapturedError):
        acts.spec("other")


def test_a_spec_leaves_the_axis_free_that_forwards_join_along(gpt2, ids):
    with capture(gpt2, "blocks.0.hook_resid_post", slice={"pos": [0, 1]}, join="pos") as acts:
        gpt2(ids)
        gpt2(ids)
    assert (
        acts.spec("blocks.0.hook_resid_post").__name__ == "Float32[Tensor, 'batch pos d_model=32']"
    )


def test_a_spec_of_masked_rows_counts_tokens(gpt2, ids):
    with capture(gpt2, "blocks.0.attn.hook_pattern", mask=torch.ones_like(ids)) as acts:
        gpt2(ids)
    assert acts.spec("blocks.0.attn.hook_pattern").__name__ == "Float32[Tensor, 'token head=4 key']"


def test_its_html_says_what_was_spared(gpt2, ids):
    with capture(gpt2, "blocks.0.hook_resid_post", slice={"pos": -1}, stop=True) as acts:
        gpt2(ids)
        gpt2(ids)
    held = format_bytes(2 * estimate_cache_bytes(gpt2, *ids.shape))
    title = f"Activations: 1 site, 768 B of about {held} that run_with_cache would hold, 2 forwards"
    assert f"<div>{title}</div>" in acts._repr_html_()
    assert f"<div>{title}</div>" in copy.deepcopy(acts)._repr_html_()
    acts.clear()
    assert "run_with_cache" not in acts._repr_html_()


def test_its_html_says_nothing_of_what_is_not_known(mlp, ids):
    with capture(mlp, "block") as acts:
        mlp(ids)
    assert "run_with_cache" not in acts._repr_html_()


def test_its_html_is_safe_against_odd_names(mlp, ids):
    with capture(mlp, {"<script>": "block"}) as acts:
        mlp(ids)
    assert "<script>" not in acts._repr_html_()
    assert "&lt;script&gt;" in acts._repr_html_()


def test_names_complete_in_an_editor(acts):
    assert "resid" in dir(acts)
    assert "blocks.0.attn.hook_z" not in dir(acts)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (3 * 2**20, "3.0 MiB"),
        (2**52, "4096.0 TiB"),
    ],
)
def test_bytes_are_shown_in_the_unit_that_fits(size, text):
    from actctx._text import format_bytes

    assert format_bytes(size) == text


# What cannot be read.


def test_nothing_is_read_that_was_not_captured(acts):
    with pytest.raises(NotCapturedError):
        acts["nowhere"]
    with pytest.raises(KeyError):
        acts["nowhere"]
    with pytest.raises(AttributeError):
        acts.nowhere  # noqa: B018
    with pytest.raises(NotCapturedError):
        acts.tensor  # noqa: B018
    with pytest.raises(NotCapturedError):
        acts.stack("hook_resid_post ")


def test_a_site_with_several_firings_is_not_one_tensor(ids):
    model = Mlp(twice=True)
    with capture(model, "block") as acts:
        model(ids)
    with pytest.raises(SeveralFiringsError):
        acts["block"]
    assert len(acts.firings("block")) == 2


def test_lengths_that_differ_do_not_join(gpt2):
    with capture(gpt2, RESID) as acts:
        gpt2(tokens(2, 5))
        gpt2(tokens(2, 4))
    with pytest.raises(JoinError):
        acts[RESID]
    assert [chunk.value.shape for chunk in acts._columns[RESID].firings[0]] == [
        (2, 5, 32),
        (2, 4, 32),
    ]


def test_forwards_do_not_join_along_an_axis_that_a_slice_dropped(gpt2, ids):
    with capture(gpt2, RESID, slice={"batch": 0}) as acts:
        gpt2(ids)
        assert acts.tensor.shape == (7, 32)
        gpt2(ids)
    with pytest.raises(AxisError):
        acts[RESID]


def test_dtypes_that_differ_do_not_join(mlp, ids):
    with capture(mlp, "block") as acts:
        mlp(ids)
        mlp.double()(ids)
    with pytest.raises(JoinError):
        acts["block"]


def test_layers_of_different_shapes_do_not_stack(gpt2, ids):
    names = ["blocks.0.hook_resid_post", Site(RESID, slice=-1)]
    with capture(gpt2, names) as acts:
        gpt2(ids)
    with pytest.raises(JoinError):
        acts.stack("hook_resid_post")


@pytest.mark.skipif(not HAS_T5, reason="this TransformerLens cannot run T5")
def test_layers_of_two_stacks_do_not_stack(ids):
    from models import bridge

    model = bridge("T5ForConditionalGeneration")
    with capture(model, "*hook_resid_post") as acts:
        model(ids)
    with pytest.raises(HookNameError):
        acts.stack("hook_resid_post")
    assert acts.stack("encoder_blocks.*.hook_resid_post").shape == (2, 3, 7, 32)


def test_lists_are_not_saved(gpt2, ids, tmp_path):
    with capture(gpt2, RESID, join=None) as acts:
        gpt2(ids)
    with pytest.raises(OptionError):
        acts.save(tmp_path / "acts.safetensors")
    with pytest.raises(OptionError):
        acts.tensor  # noqa: B018


def test_forwards_of_a_module_do_not_join_along_a_batch_that_a_slice_dropped(mlp, ids):
    with capture(mlp, "block", slice=(0,)) as acts:
        mlp(ids)
        mlp(ids[:, :3])
    with pytest.raises(AxisError):
        acts["block"]


def test_an_alias_without_activations_is_no_attribute(mlp):
    with capture(mlp, {"hidden": "block"}) as acts:
        assert not hasattr(acts, "hidden")


def test_an_activation_without_axes_is_not_selected_from():
    class Scalar(Mlp):
        def __init__(self):
            super().__init__()
            self.total = torch.nn.Identity()

        def forward(self, ids):
            return self.total(self.embed(ids).sum())

    model = Scalar()
    with pytest.raises(AxisError), capture(model, "total", slice=(0,)):
        model(tokens())


def test_every_shape_is_checked_not_only_the_first(gpt2, ids):
    with (
        pytest.raises(SelectionError, match="has the size 3 along 'pos'"),
        capture(gpt2, RESID, slice={"pos": 5}) as acts,
    ):
        gpt2(ids)
        gpt2(ids)
        gpt2(ids[:, :3])
    assert acts.forwards == 2


def test_axes_are_those_of_what_came_since_the_buffer_was_cleared():
    model = Mlp()
    with capture(model, "head", join=None) as acts:
        model(tokens())
        model(tokens()[0])
        assert acts.axes("head") == ("batch", "pos", "_")
        acts.clear()
        model(tokens()[0])
        assert acts.axes("head") == ("_", "_")
