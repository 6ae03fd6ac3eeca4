"""One grammar for names, wherever they are given."""

import functools

import pytest
import torch
from jaxtyping import Float
from models import GENERATION, JOINT, bridge, bridge_of, huggingface, plainly_hooked, tokens
from torch import Tensor, nn

from actctx import (
    ActctxError,
    HookNameError,
    NeverFiredError,
    Schema,
    Site,
    capture,
    hook_names,
    site,
)
from actctx._model.globs import matcher, matches

RESID = "blocks.*.hook_resid_post"
TWICE = {"all": Site(RESID), "last": Site(RESID, slice=-1)}


class Deep(nn.Module):
    """Twelve layers, named by numbers behind a dot and behind an underscore."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(12))
        for number in range(12):
            self.add_module(f"layer_{number}", nn.Linear(4, 4))

    def forward(self, x):
        for number, layer in enumerate(self.layers):
            x = getattr(self, f"layer_{number}")(layer(x))
        return x


@pytest.fixture
def deep():
    return Deep()


def _said(act, *args, **kwargs):
    with pytest.raises(ActctxError) as caught:
        act(*args, **kwargs)
    return str(caught.value)


def _run(model, names, *inputs, **options):
    with capture(model, names, **options) as acts:
        for each in inputs or (tokens(),):
            model(each)
    return acts


# Brackets.


@pytest.mark.parametrize(
    ("bracket", "layers"),
    [
        ("[8-11]", [8, 9, 10, 11]),
        ("[6-12]", [6, 7, 8, 9, 10, 11]),
        ("[0,3,11]", [0, 3, 11]),
        ("[0, 3, 11]", [0, 3, 11]),
        ("[0-3,8]", [0, 1, 2, 3, 8]),
        ("[0-3]", [0, 1, 2, 3]),
        ("[1]", [1]),
        ("*[1]", [1]),
        ("*[8-11]", [8, 9, 10, 11]),
        ("[10]", None),
        ("[!0]", [*range(1, 12)]),
        ("[!8-11]", [*range(8)]),
        ("1[0-1]", [10, 11]),
        ("[0-1][0-1]", [10, 11]),
        ("[1]?", [10, 11]),
        ("?", [*range(10)]),
    ],
)
def test_numbers_in_brackets_are_whole_numbers(deep, bracket, layers):
    for written, name in ((f"layers.{bracket}", "layers.{}"), (f"layer_{bracket}", "layer_{}")):
        if layers is None:
            assert "is not a valid bracket" in _said(capture, deep, written)
            continue
        acts = _run(deep, written, torch.ones(2, 4))
        assert list(acts) == [name.format(number) for number in layers]
        assert acts.stack(written).shape == (len(layers), 2, 4)


def test_a_stack_by_a_bracket_has_the_layers_in_order(deep):
    acts = _run(deep, "layer_*", torch.ones(2, 4))
    for name in ("layer_[9-11]", "[l]ayer_[9,10,11]"):
        stacked = acts.stack(name)
        expected = [acts[f"layer_{number}"] for number in (9, 10, 11)]
        assert torch.equal(stacked, torch.stack(expected))


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("hook_[qk]", "qk"),
        ("hook_[q,k]", "qk"),
        ("hook_[!qk]", "vz"),
        ("hook_[q-v]", "qv"),
        ("**.hook_[kz]", "kz"),
        ("attn.hook_[qk]", ""),
        ("**.attn.hook_[qk]", "qk"),
    ],
)
def test_characters_in_brackets_are_those_of_the_shell(pattern, expected):
    found = [each for each in "qkvz" if matches(f"blocks.0.attn.hook_{each}", pattern)]
    assert sorted(found) == sorted(expected)


HOW = (
    "write numbers, as in '[0-3]', '[8-11]' or '[0,3,11]', or characters, as in '[qkv]' or '[!qk]'"
)


@pytest.mark.parametrize(
    ("bracket", "remedy"),
    [
        ("[0:3]", "a range has a hyphen, and its last number is in it; write '[0-2]'"),
        ("[:3]", "a range has a hyphen, and its last number is in it; write '[0-2]'"),
        ("[!0:3]", "a range has a hyphen, and its last number is in it; write '[!0-2]'"),
        ("[11-8]", "a range ascends; write '[8-11]'"),
        ("[z-a]", "a range ascends; write '[a-z]'"),
        (
            "[12]",
            "write '[1,2]' for the numbers 1 and 2, or 12 without a bracket for the one number",
        ),
        ("[8-]", HOW),
        ("[-3]", HOW),
        ("[-1]", HOW),
        ("[]", HOW),
        ("[0 3]", HOW),
        ("[0,,3]", HOW),
        ("[a0-11]", HOW),
        ("[attn,mlp]", HOW),
        ("[^q]", HOW),
        ("[0-11:2]", HOW),
        ("[0-9999999]", "it holds 10000000 numbers; write one with at most 10000, or '*' for all"),
    ],
)
def test_what_is_neither_numbers_nor_characters_is_refused(gpt2, bracket, remedy):
    pattern = f"blocks.{bracket}.hook_out"
    expected = f"{bracket!r} in {pattern!r} is not a valid bracket: {remedy}"
    acts = _run(gpt2, RESID)
    for act in (
        functools.partial(capture, gpt2, pattern),
        functools.partial(capture, gpt2, Site(pattern)),
        functools.partial(hook_names, gpt2, pattern),
        functools.partial(acts.__getitem__, pattern),
        functools.partial(acts.stack, pattern),
        functools.partial(matcher, pattern),
    ):
        assert _said(act) == expected
    assert pattern not in acts


def test_a_bracket_that_is_not_closed_is_refused(gpt2):
    assert _said(capture, gpt2, "blocks.[0.hook_out") == (
        f"'blocks.[0.hook_out' has a '[' without its ']'; {HOW}"
    )


def test_numbers_before_a_star_are_refused(deep):
    assert _said(capture, deep, "layers.[0-9]*") == (
        "'[0-9]*' in 'layers.[0-9]*' is not a valid bracket: it could mean these numbers, or all "
        "that begin with them; write '*' for every number, or the numbers themselves, as in "
        "'[0-11]'"
    )


def test_a_module_with_a_bracket_in_its_name_is_captured_by_it():
    model = nn.Sequential()
    model.add_module("a[b", nn.Linear(2, 2))
    assert list(_run(model, "a[b", torch.ones(1, 2))) == ["a[b"]


def test_an_index_is_told_how_a_layer_is_named(gpt2):
    assert "; a number is a part of a name: 'blocks.0.hook_out' (see" in _said(
        capture, gpt2, "blocks[0].hook_out"
    )


def test_layers_that_are_not_there_are_told_of_those_that_are(gpt2):
    assert "; it has layers 0 to 1; " in _said(capture, gpt2, "blocks.[8-11].hook_resid_post")


def test_a_glob_that_would_match_deeper_says_so(gpt2):
    assert (
        "; a pattern with a dot matches whole names: '**.attn.hook_*' matches at any depth (see"
    ) in _said(capture, gpt2, "attn.hook_*")


# Names, endings and globs mean the same everywhere.


@pytest.mark.parametrize("name", ["hook_z", "attn.hook_z", "blocks.*.attn.hook_z", "*_z"])
@pytest.mark.parametrize("kind", ["bridge", "plain"])
def test_a_name_means_the_same_places_everywhere(name, kind):
    model = {"bridge": bridge, "plain": huggingface}[kind]("LlamaForCausalLM")
    expected = ["blocks.0.attn.hook_z", "blocks.1.attn.hook_z"]
    assert hook_names(model, name) == expected
    acts = _run(model, name)
    assert list(acts) == expected
    both = torch.stack([acts[each] for each in expected])
    everything = _run(model, "**.hook_*" if kind == "plain" else "**")
    for buffer in (acts, everything):
        assert torch.equal(buffer.stack(name), both)
        assert name not in buffer
        assert "read one of 'blocks.0.attn.hook_z', 'blocks.1.attn.hook_z', or acts.stack(" in (
            _said(buffer.__getitem__, name)
        )
    one = _run(model, "blocks.1.attn.hook_z")
    assert name in one
    assert one[name] is one["blocks.1.attn.hook_z"]
    assert one.axes(name) == ("batch", "pos", "head", "d_head")


def test_an_ending_with_a_number_is_one_layer(llama, ids):
    acts = _run(llama, "layers.1", ids)
    assert list(acts) == ["model.layers.1"]
    assert acts["layers.1"] is acts.tensor


def test_an_ending_with_a_number_must_fire(deep):
    deep.spare = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(NeverFiredError, match="'0\\.spare\\.0' never fired in 1 forward"):
        _run(nn.Sequential(deep), "spare.0", torch.ones(1, 4))


def test_a_whole_name_comes_before_an_ending():
    model = nn.Sequential()
    model.add_module("a", nn.Linear(2, 2))
    model.add_module("b", nn.Sequential())
    model.b.add_module("a", nn.Linear(2, 2))
    assert hook_names(model, "a") == ["a"]
    assert list(_run(model, "a", torch.ones(1, 2))) == ["a"]
    assert list(_run(model, "b.a", torch.ones(1, 2))) == ["b.a"]
    both = _run(model, ["a", "b.a"], torch.ones(1, 2))
    assert both["a"] is not both["b.a"]


def test_a_name_within_a_layer_comes_before_one_that_ends_so(gpt2):
    acts = _run(gpt2, "**")
    stacked = acts.stack("hook_out")  # there are attn.hook_out, mlp.hook_out and others
    assert torch.equal(stacked, acts.stack(RESID))
    assert "means more than one site of a layer" in _said(acts.stack, "**.hook_out")


def test_layers_of_two_stacks_are_not_mixed():
    model = nn.Sequential()
    for name in ("left", "right"):
        model.add_module(name, nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    acts = _run(model, ["left.0", "right.1"], torch.ones(1, 2))
    assert _said(acts.stack, "*.*") == (
        "'*.*' means more than one stack of layers: 'left.0' and 'right.1'; give a pattern of "
        "whole names, such as 'left.*'"
    )


def test_layers_are_told_by_the_number_that_differs():
    model = nn.Sequential()
    for number in (1, 2, 10):
        block = nn.Sequential(nn.Linear(2, 2))
        model.add_module(f"layer{number}", block)
    acts = _run(model, "layer*.0", torch.ones(1, 2))
    expected = [acts[f"layer{number}.0"] for number in (1, 2, 10)]
    assert torch.equal(acts.stack("layer*.0"), torch.stack(expected))


# Plain models have both kinds of names.


def test_a_plain_model_lists_both_kinds_of_names_and_patterns_choose_one(llama):
    listed = hook_names(llama)
    hooks = hook_names(llama, "**.hook_*")
    assert listed[: len(hooks)] == hooks
    assert listed[len(hooks) :] == hook_names(llama, "**")
    assert "model.layers.0" in listed
    assert not any("hook_" in name for name in hook_names(llama, "**"))


@pytest.mark.parametrize(
    "name",
    ["**", "*", "mlp", "self_attn.*", "hook_pre", "blocks.0.*", "model.layers.[0-1]", "0.mlp"],
)
@pytest.mark.parametrize("kind", ["bridge", "plain"])
def test_what_is_listed_for_a_pattern_is_what_is_captured_by_it(name, kind):
    model = {"bridge": bridge, "plain": huggingface}[kind]("LlamaForCausalLM")
    listed = hook_names(model, name)
    if not listed:
        with pytest.raises(HookNameError):
            capture(model, name)
        return
    acts = _run(model, name)
    captured = {*acts, *acts.missing}
    assert captured <= {*listed}
    names = [column.label.names for column in acts._columns.values()]
    assert all(any(each in those for those in names) for each in listed)


def test_a_module_of_ones_own_lists_its_modules(deep):
    assert hook_names(deep)[:2] == ["layers", "layers.0"]


# An alias before several places.


def test_one_glob_is_captured_under_two_aliases(gpt2, ids):
    acts = _run(gpt2, TWICE, ids)
    assert sorted(acts) == [
        f"{alias}.blocks.{layer}.hook_resid_post" for alias in ("all", "last") for layer in (0, 1)
    ]
    names = [f"blocks.{layer}.hook_resid_post" for layer in (0, 1)]
    expected = plainly_hooked(gpt2, ids, *names)
    whole = torch.stack([expected[name][0] for name in names])
    for read in ("all", "all.**", "all.blocks.*.hook_resid_post"):
        assert torch.equal(acts.stack(read), whole)
    assert torch.equal(acts.stack("last"), whole[:, :, -1])
    assert torch.equal(acts["last.blocks.1.hook_resid_post"], whole[1, :, -1])
    assert "several times, so read one of 'all.blocks.0" in _said(acts.__getitem__, names[0])
    assert "acts.stack" not in _said(acts.__getitem__, "hook_resid_post")
    assert "such as 'all.blocks.*.hook_resid_post'" in _said(acts.stack, "hook_resid_post")


def test_an_alias_before_a_glob_of_one_place_is_its_name(gpt2):
    assert list(_run(gpt2, {"first": "blocks.[0].hook_resid_post"})) == ["first"]


def test_a_glob_that_is_its_own_alias_has_none(gpt2):
    assert list(_run(gpt2, {RESID: RESID})) == [*_run(gpt2, RESID)]


def test_an_alias_and_the_name_of_a_place_are_both_kept(gpt2):
    name = "blocks.0.hook_out"
    acts = _run(gpt2, {name: name, "again": name})
    assert list(acts) == [name, "again"]
    assert torch.equal(acts.again, acts[name])


def test_layers_that_are_apart_under_two_aliases_are_stacked(gpt2):
    acts = _run(gpt2, {"early": "blocks.[0].hook_out", "late": "blocks.[1].hook_out"})
    assert acts.stack("hook_resid_post").shape[0] == 2


def test_an_alias_before_a_glob_may_not_be_an_attribute_of_the_buffer(gpt2):
    assert "the alias 'stack' is already an attribute" in _said(capture, gpt2, {"stack": RESID})


def test_a_schema_has_one_glob_in_two_fields(gpt2, ids):
    class Acts(Schema):
        whole: Float[Tensor, "layer batch pos d_model"] = site("hook_resid_post")
        last: Float[Tensor, "layer batch d_model"] = site(RESID, slice=-1)
        apart: dict[str, Float[Tensor, "batch d_model"]] = site(RESID, slice={"pos": 0})

    acts = _run(gpt2, Acts, ids)
    assert torch.equal(acts.whole[:, :, -1], acts.last)
    assert torch.equal(torch.stack([*acts.apart.values()]), acts.whole[:, :, 0])


# Data sets.


@pytest.fixture
def stored(gpt2, ids, tmp_path):
    pytest.importorskip("lance")
    from actctx.dataset import ActivationDataset
    from actctx.extract import extract

    half = Site("hook_resid_post", dtype=torch.float16)
    sites = {"whole": Site(RESID), "half": half, "z": "blocks.1.attn.hook_z"}
    extract(gpt2, ids.tolist(), sites, tmp_path / "acts.lance", progress=False)
    return functools.partial(ActivationDataset, tmp_path / "acts.lance")


def test_a_data_set_is_read_by_the_same_names(stored, gpt2, ids):
    expected = _run(gpt2, [RESID, "hook_z"], ids)
    both = ["half.blocks.0.hook_resid_post", "half.blocks.1.hook_resid_post"]
    for asked in ("half", "half.**", "half.blocks.[0-1].hook_resid_post"):
        assert list(stored(sites=asked).sites) == both
    whole = [name.replace("half", "whole") for name in both]
    assert list(stored(sites="hook_resid_post").sites) == [*whole, *both]
    for asked in ("hook_z", "attn.hook_z", "blocks.*.attn.hook_z"):
        data = stored(sites=asked)
        assert list(data.sites) == ["blocks.1.attn.hook_z"]
        assert torch.equal(data.read(asked), expected["blocks.1.attn.hook_z"].flatten(0, 1))
    found = stored().read("whole.blocks.0.hook_resid_post")
    assert torch.equal(found, expected["blocks.0.hook_resid_post"].flatten(0, 1))
    positive = int((expected["blocks.1.attn.hook_z"][..., 0, 0] > 0).sum())
    assert len(stored(where="`attn.hook_z`[1] > 0")) == positive


def test_a_data_set_refuses_names_of_several_and_brackets_of_nothing(stored):
    data = stored()
    several = "several times, so read one of "
    assert f"{several}'whole.blocks.0" in _said(data.read, "blocks.0.hook_resid_post")
    assert f"{several}'half.blocks.0" in _said(data.read, "half")
    assert "write '[0-2]'" in _said(stored, sites="blocks.[0:3].hook_resid_post")


# What is switched off.


@pytest.mark.skipif(GENERATION < 4, reason="the bridges of TransformerLens 3 have other flags")
@pytest.mark.parametrize("name", ["hook_result", "hook_q_input", "hook_attn_in", "hook_mlp_in"])
@pytest.mark.parametrize(
    "architecture",
    ["GPT2LMHeadModel", "LlamaForCausalLM", "OPTForCausalLM", "Llama4ForCausalLM", *JOINT[2:]],
)
def test_what_is_advised_for_what_is_off_works_when_followed(architecture, name):
    model = bridge_of(huggingface(architecture))
    off = capture(model, name)
    said = _said(off.__enter__)
    assert " is off" in said
    if "call model." in said:
        advice = said.partition("call ")[2].removesuffix(" first")
        for call in advice.split(", then "):
            eval(call, {"model": model})  # noqa: S307  what a user would type
        acts = _run(model, name)
        assert len(acts) == 2
        return
    assert "; capture 'blocks.0." in said
    flag = said.partition(": use_")[2].partition(" ")[0]
    with pytest.raises(NotImplementedError):
        getattr(model, f"set_use_{flag}")(True)  # noqa: FBT003  as TransformerLens has it
    instead = said.partition("; capture ")[2].split("'")[1]
    assert len(_run(model, instead)) == 1


@pytest.mark.skipif(GENERATION < 4, reason="the bridges of TransformerLens 3 have other flags")
def test_flags_that_exclude_each_other_are_switched_one_after_the_other(gpt2):
    gpt2.set_use_attn_in(True)
    assert _said(capture(gpt2, "hook_q_input").__enter__).endswith(
        "use_split_qkv_input is off: call model.set_use_attn_in(False), then "
        "model.set_use_split_qkv_input(True) first"
    )
    gpt2.set_use_attn_in(False)
    gpt2.set_use_split_qkv_input(True)
    assert len(_run(gpt2, "hook_q_input")) == 2


@pytest.mark.skipif(GENERATION < 4, reason="the bridges of TransformerLens 3 have other flags")
def test_blocks_without_a_norm_before_the_mlp_say_so():
    said = _said(capture(bridge("PhiForCausalLM"), "hook_mlp_in").__enter__)
    assert said.endswith(
        "use_hook_mlp_in is off, and its blocks have no norm of their own before the MLP; capture "
        "'blocks.0.mlp.hook_in', which is what the MLP is given"
    )


@pytest.mark.skipif(GENERATION < 4, reason="the bridges of TransformerLens 3 have other flags")
def test_what_is_on_and_never_computed_says_so():
    model = bridge("CodeGenForCausalLM")
    model.set_use_attn_result(True)
    assert _said(_run, model, "blocks.0.attn.hook_result").endswith(
        "use_attn_result is on, but TransformerLens does not compute it for this architecture; "
        "capture 'blocks.0.attn.hook_z', whose product with its part of W_O is each head's result"
    )


def test_a_site_is_renamed_by_an_ending_of_its_name(stored, tmp_path):
    pytest.importorskip("datasets")
    import datasets

    data = stored(sites=["half", "hook_z"])
    data.to_saelens(tmp_path / "cached", context=7, rename={"attn.hook_z": "z", "0.hook_out": "a"})
    columns = datasets.load_from_disk(tmp_path / "cached").column_names
    assert {"z", "a", "half.blocks.1.hook_resid_post"} <= {*columns}
    said = _said(data.to_saelens, tmp_path / "other", context=7, rename={"half": "x"})
    assert said.startswith("rename names 'half', which is several sites that are read; the sites ")
