"""On every architecture of TransformerLens' factory a plan is what the capture leaves."""

import pytest
import torch
from models import GENERATION
from torch import nn

if GENERATION < 4:
    pytest.skip("the factory of TransformerLens 4 and later", allow_module_level=True)

import architectures
from architectures import BATCH, POS
from test_every_architecture import CASES, USUAL

from actctx import ActctxError, Capture, Plan, PlanError, capture
from actctx._capture.cache_size import counting_cache

pytestmark = [
    pytest.mark.thorough,
    # Captures of bridges that are known to be wrong say so.
    pytest.mark.filterwarnings("ignore:.*TransformerLens 4:UserWarning"),
    pytest.mark.usefixtures("unchecked"),
]
# They divide tokens among experts by lists of Python's.
REFUSED = {"JetMoeForCausalLM", "JetMoEForCausalLM"}


def _plan(capturing: Capture, model: nn.Module, given: dict) -> Plan:
    if not hasattr(model, "hook_dict"):
        return capturing.plan(**given)
    first, *rest = given
    return capturing.plan(given[first], **{name: given[name] for name in rest})


def _differing(capturing: Capture, model: nn.Module, given: dict) -> list[str]:
    """List the sites of which the plan and the capture differ."""
    plan = _plan(capturing, model, given)
    with counting_cache(model) as held, capturing as acts:
        architectures.run(model, given)
    wrong = list({*plan} ^ {*acts} | {*plan.missing} ^ {*acts.missing})
    for key, column in zip(acts, acts.columns, strict=True):
        first, site = column.read(0), plan[key]
        left = acts.axes(key), tuple(first.shape), first.dtype, column.nbytes, len(column.firings)
        if left != (site.axes, site.shape, site.dtype, site.nbytes, site.firings):
            wrong.append(f"{key}: {left}, not {site}")
    if plan.cache_nbytes != held.nbytes:
        wrong.append(f"{plan.cache_nbytes} bytes of a cache, not {held.nbytes}")
    return wrong


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(*case, id="-".join(case), marks=[] if case[0] in USUAL else pytest.mark.slow)
        for case in CASES
        if case[0] not in REFUSED
    ],
)
def test_a_plan_is_what_the_capture_leaves(name, kind):
    model = getattr(architectures, kind)(name)
    given = architectures.inputs(model)
    capturing = capture(model, "**" if kind == "bridge" else lambda _name: True)
    assert not _differing(capturing, model, given)
    plan = _plan(capturing, model, given)
    # An encoder and a decoder have other positions than one mask.
    sizes = given.get("input_ids", torch.empty(0, 0)).shape if len(given) == 1 else ()
    tokens = [
        key
        for key, site in plan.items()
        if site.axes[:2] == ("batch", "pos") and site.shape[:2] == sizes and site.firings == 1
    ]
    if not tokens:
        return
    mask = torch.ones(BATCH, POS, dtype=torch.long)
    mask[1, -2:] = mask[2, -3:] = 0
    given["attention_mask"] = mask
    for options in ({"mask": "attention"}, {"mask": mask, "slice": -1, "stop": True}):
        masked = capture(model, tokens, dtype=torch.float16, **options)
        assert _planned(masked, model, given) == _left(masked, model, given)


def _planned(capturing: Capture, model: nn.Module, given: dict) -> object:
    """Tell what is planned, or why that is refused."""
    try:
        plan = _plan(capturing, model, given)
    except ActctxError as error:
        return type(error), str(error)
    return {key: (site.axes, site.shape, site.dtype, site.nbytes) for key, site in plan.items()}


def _left(capturing: Capture, model: nn.Module, given: dict) -> object:
    """Tell what is left, or why that is refused."""
    try:
        with capturing as acts:
            architectures.run(model, given)
    except ActctxError as error:
        return type(error), str(error)
    return {
        key: (acts.axes(key), tuple(acts[key].shape), acts[key].dtype, acts[key].nbytes)
        for key in acts
    }


@pytest.mark.parametrize("kind", ["plain", "bridge"])
def test_what_cannot_be_planned_is_refused(kind):
    model = getattr(architectures, kind)("JetMoeForCausalLM")
    with pytest.raises(PlanError, match="it depends on values of its activations"):
        _plan(capture(model, lambda _name: True), model, architectures.inputs(model))
