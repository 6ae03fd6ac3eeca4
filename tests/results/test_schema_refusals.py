"""What a `Schema` refuses, and how it says so."""

import pytest
import torch
from fields import ANOTHER_NAME, Resid, one
from jaxtyping import Float, Float16, Int
from models import Mlp
from torch import Tensor

from actctx import (
    Activations,
    HookNameError,
    OptionError,
    Schema,
    Site,
    TypedError,
    capture,
    captures,
    site,
)

# What is asked of a GPT-2 with d_model 32, 2 layers and 4 heads of 8, and what it answers.

PLAIN = "blocks.0.hook_resid_post"


TOLD = {
    "too few axes": (
        (Float[Tensor, "batch d_model"], PLAIN, {}),
        f"One.x, from '{PLAIN}', is annotated Float[Tensor, \"batch d_model\"], with 2 axes, but "
        "will have 3, 'batch pos d_model'; write Float[Tensor, \"batch pos d_model\"]",
    ),
    "a slice that drops an axis": (
        (Float[Tensor, "batch pos d_model"], PLAIN, {"slice": {"pos": -1}}),
        f"One.x, from '{PLAIN}', is annotated Float[Tensor, \"batch pos d_model\"], with 3 axes, "
        "but will have 2, 'batch d_model' (without 'pos', which slice= or mask= drops); write "
        'Float[Tensor, "batch d_model"]',
    ),
    "layers": (
        (Float[Tensor, "batch pos d_model"], "blocks.*.hook_resid_post", {}),
        f"One.x, from '{PLAIN}', is annotated Float[Tensor, \"batch pos d_model\"], with 3 axes, "
        "but will have 4, 'layer batch pos d_model'; write Float[Tensor, \"layer batch pos "
        'd_model"]',
    ),
    "a mask": (
        (Float[Tensor, "batch pos d_model"], PLAIN, {}),
        f"One.x, from '{PLAIN}', is annotated Float[Tensor, \"batch pos d_model\"], with 3 axes, "
        "but will have 2, 'token d_model' (without 'batch pos', which slice= or mask= drops); "
        'write Float[Tensor, "token d_model"]',
    ),
    "some layers": (
        (Float[Tensor, "layer batch pos d_model"], "blocks.[1].hook_resid_post", {}),
        "One.x, from 'blocks.1.hook_resid_post', is annotated Float[Tensor, \"layer batch pos "
        "d_model\"], but 1 of the 2 along 'layer' are selected; write 1 in its place, or another "
        "name, such as 'chosen_layer'",
    ),
    "another axis": (
        (Float[Tensor, "batch pos d_mlp"], PLAIN, {}),
        f"One.x, from '{PLAIN}', is annotated Float[Tensor, \"batch pos d_mlp\"], but what it "
        "calls 'd_mlp' is the axis 'd_model': its axes are 'batch pos d_model'; write "
        'Float[Tensor, "batch pos d_model"]',
    ),
    "another size": (
        (Float[Tensor, "batch pos 768"], PLAIN, {}),
        f"One.x, from '{PLAIN}', is annotated Float[Tensor, \"batch pos 768\"], but it says 768 "
        "where the axis 'd_model' has the size 32; write Float[Tensor, \"batch pos d_model\"]",
    ),
    "some heads": (
        (Float[Tensor, "batch pos head d_head"], "blocks.0.attn.hook_q", {"slice": {"head": [0]}}),
        "One.x, from 'blocks.0.attn.hook_q', is annotated Float[Tensor, \"batch pos head "
        'd_head"], '
        "but 1 of the 4 along 'head' are selected; write 1 in its place, or another name, such as "
        "'chosen_head'",
    ),
    "the number of heads": (
        (Float[Tensor, "b p 4 d"], "blocks.0.attn.hook_q", {"slice": {"head": slice(2)}}),
        "One.x, from 'blocks.0.attn.hook_q', is annotated Float[Tensor, \"b p 4 d\"], but it says "
        "4 where the axis 'head' has the size 2; write Float[Tensor, \"batch pos 2 d_head\"]",
    ),
    "the dtype asked for": (
        (Float16[Tensor, "..."], PLAIN, {"dtype": torch.bfloat16}),
        f"One.x, from '{PLAIN}', is annotated Float16[Tensor, \"...\"], but dtype=torch.bfloat16 "
        "was requested; write BFloat16, or leave the dtype out",
    ),
    "the dtype that fires": (
        (Float16[Tensor, "batch pos d_model"], PLAIN, {}),
        f"One.x, from '{PLAIN}', is float32 (3, 7, 32), which does not match Float16[Tensor, "
        '"batch pos '
        'd_model"]: Float16 does not hold float32; write Float32, or capture with '
        "dtype=torch.float16",
    ),
    "integers": (
        (Int[Tensor, "batch pos d_model"], PLAIN, {}),
        f"One.x, from '{PLAIN}', is float32 (3, 7, 32), which does not match Int[Tensor, \"batch "
        "pos "
        'd_model"]: Int does not hold float32; write Float32',
    ),
    "a product": (
        (Float[Tensor, "batch pos 5*d_head"], PLAIN, {}),
        f"One.x, from '{PLAIN}', is float32 (3, 7, 32), which does not match Float[Tensor, \"batch "
        "pos "
        '5*d_head"]: the dimension size 32 does not equal the existing value of 5*d_head=40',
    ),
    "an unknown factor": (
        (Float[Tensor, "batch pos n*d_head"], PLAIN, {}),
        f"One.x, from '{PLAIN}', is annotated Float[Tensor, \"batch pos n*d_head\"], which "
        "computes with an axis that no other annotation names: Cannot process symbolic axis "
        "'n*d_head' as some axis names have not been processed",
    ),
    "a module of unknown axes": (
        (Float[Tensor, "batch pos d_mlp"], "blocks.0", {}),
        "One.x, from 'blocks.0', is float32 (3, 7, 32), which does not match Float[Tensor, \"batch "
        "pos "
        "d_mlp\"]: d_mlp is 32 here, but 128 in the model's config" + ANOTHER_NAME,
    ),
    "a module of another rank": (
        (Float[Tensor, "batch d_model"], "blocks.0", {}),
        "One.x, from 'blocks.0', is float32 (3, 7, 32), which does not match Float[Tensor, \"batch "
        'd_model"]: it has 3 axes, not 2',
    ),
}


@pytest.mark.parametrize("case", TOLD)
def test_a_wrong_annotation_is_told_with_what_to_write(gpt2, ids, case):
    (hint, name, options), message = TOLD[case]
    mask = torch.ones_like(ids) if case == "a mask" else None
    with pytest.raises(TypedError) as caught, capture(gpt2, one(hint, name, **options), mask=mask):
        gpt2(ids)
    assert str(caught.value) == message


def test_axes_must_agree_between_fields(gpt2, ids):
    class Two(Schema):
        whole: Float[Tensor, "batch pos d_model"] = site("blocks.0.hook_resid_post")
        part: Float[Tensor, "batch pos d_model"] = site(
            "blocks.0.hook_resid_post", slice={"pos": [0, 1]}
        )

    with pytest.raises(TypedError) as caught, capture(gpt2, Two):
        gpt2(ids)
    assert str(caught.value) == (
        "Two.part, from 'blocks.0.hook_resid_post', is float32 (3, 2, 32), which does not match "
        'Float[Tensor, "batch pos d_model"]: pos is 2 here, but 7 in Two.whole; if these '
        "are different things, rename one of them"
    )


def test_a_wrong_model_is_told(gpt2):
    class Small(Schema):
        resid: Float[Tensor, "batch pos d_model"] = site("encoder.layer.0.output")

    with pytest.raises(HookNameError):
        capture(gpt2, Small)
    with pytest.raises(HookNameError):
        capture(Mlp(), Resid)


NEXT_TO = 'resid: Float[Tensor, "batch pos d_model"] = site("blocks.0.hook_resid_post")'


MISTAKES = {
    "no site": (
        {"__annotations__": {"x": Float[Tensor, "..."]}},
        "Bad.x is annotated, but nothing says where to capture it; write ... = "
        'site("blocks.0.hook_resid_post")',
    ),
    "something else for a site": (
        {"x": Site("block"), "__annotations__": {"x": Float[Tensor, "..."]}},
        "Bad.x is annotated, but nothing says where to capture it; write ... = "
        'site("blocks.0.hook_resid_post"), not Site',
    ),
    "no annotation": (
        {"x": site("block")},
        'Bad.x has no annotation; write x: Float[Tensor, "batch pos d_model"] = site(...)',
    ),
    "no tensor": (
        {"x": site("block"), "__annotations__": {"x": int}},
        'Bad.x is annotated int; annotate it as a tensor, such as Float[Tensor, "batch pos '
        'd_model"], or as a dict[str, ...] of tensors',
    ),
    "a name in use": (
        {"activations": site("block"), "__annotations__": {"activations": Float[Tensor, "..."]}},
        "Bad.activations has a name that Schema uses itself; choose another",
    ),
    "a private name": (
        {"_x": site("block"), "__annotations__": {"_x": Float[Tensor, "..."]}},
        "Bad._x has a name that Schema uses itself; choose another",
    ),
    "an annotation that cannot be read": (
        {"x": site("block"), "__annotations__": {"x": "Float[Nowhere, '...']"}},
        "the annotations of Bad cannot be read: name 'Float' is not defined; import it where the "
        "class's module can see it",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_schema_that_makes_no_sense_is_refused(case):
    body, message = MISTAKES[case]
    with pytest.raises(OptionError) as caught:
        type("Bad", (Schema,), {"__module__": "builtins", **body})
    assert str(caught.value) == message


def test_what_is_no_schema_to_capture_is_refused(gpt2):
    class Empty(Schema):
        pass

    for names, options, message in (
        (
            Empty,
            {},
            f"Empty has no fields, so there is nothing to capture; write, for example, {NEXT_TO}",
        ),
        (
            Resid,
            {"join": None},
            "the fields of Resid are tensors, but join=None keeps lists of them; join along "
            "'batch' or 'pos', or capture by names instead",
        ),
    ):
        with pytest.raises(OptionError) as caught:
            capture(gpt2, names, **options)
        assert str(caught.value) == message


@pytest.mark.usefixtures("unchecked")
def test_another_class_is_refused(gpt2):
    with pytest.raises(OptionError) as caught:
        capture(gpt2, Mlp)
    assert str(caught.value) == (
        "cannot capture the class 'Mlp'; derive it from actctx.Schema, or give a hook name"
    )


def test_a_stack_of_two_sites_of_a_layer_is_refused(gpt2):
    with pytest.raises(HookNameError) as caught:
        capture(gpt2, one(Float[Tensor, "layer b p d"], "blocks.*.hook_resid_*"))
    assert str(caught.value) == (
        "One.x stacks layers, but 'blocks.*.hook_resid_*' matches more than one site of a layer: "
        "'blocks.0.hook_resid_pre' and 'blocks.0.hook_resid_mid'; narrow the pattern, or annotate "
        'the field as dict[str, Float[Tensor, "b p d"]]'
    )


def test_what_cannot_be_read_is_refused_where_it_would_be_checked():
    def run(model, ids: "Flaot[Tensor, 'batch pos']"):
        model(ids)

    with pytest.raises(OptionError) as caught:
        captures(Resid)(run)
    assert str(caught.value) == (
        "the annotation Flaot[Tensor, 'batch pos'] of 'ids' cannot be read, so it could not be "
        "checked against a Schema; import what it names where the module of run can see it"
    )


def test_another_kind_of_buffer_is_refused():
    def run(acts: Activations):
        return acts

    with pytest.raises(OptionError) as caught:
        captures(Resid)(run)
    assert str(caught.value) == (
        "the parameter 'acts' is annotated Activations, but it receives Resid; annotate it so"
    )


def test_a_schema_beside_other_names_is_refused(gpt2):
    with pytest.raises(OptionError) as caught:
        capture(gpt2, [Resid, "blocks.0.hook_resid_post"])
    assert str(caught.value) == (
        "cannot capture the class 'Resid' together with other names; give a Schema alone"
    )
