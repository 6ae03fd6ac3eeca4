"""Random lives of captures, against an oracle of plain hooks.

A plan is a list of steps: open a capture, close any of those that are open, run a forward, run
one that raises, put a foreign hook on or take it off, reset all hooks, copy the model. Opening
and closing may be interrupted at any line. After each plan the model must be as it was before,
and every buffer must hold what plain hooks saw.
"""

import copy
import gc
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interrupts import interrupted
from models import Mlp, bridge, hooks_of, huggingface, tiny_transformer, tokens
from torch import Tensor, nn

from actctx import Activations, Capture, HooksRemovedError, NeverFiredError, Stopped, capture

pytestmark = pytest.mark.thorough

KINDS = {
    "plain": (lambda: Mlp(twice=True), ["embed", "block", "", "head"]),
    "llama": (
        lambda: huggingface("LlamaForCausalLM"),
        ["model.layers.0", "model.layers.1.mlp", "model.norm", "lm_head"],
    ),
    "bridge": (
        bridge,
        [
            "blocks.0.hook_resid_post",
            "blocks.0.attn.hook_q",
            "blocks.1.hook_mlp_out",
            "unembed.hook_out",
        ],
    ),
    "hooked": (
        tiny_transformer,
        [
            "hook_embed",
            "blocks.0.attn.hook_pattern",
            "blocks.1.hook_resid_post",
            "unembed.hook_in",
        ],
    ),
}


REAL = torch.tensor([[True] * 7, [False] * 3 + [True] * 4, [True] * 5 + [False] * 2])
OPTIONS = [{}, {"stop": True}, {"grad": True}, {"capacity": 60}, {"mask": REAL}]


class Planned(BaseException):
    """What a planned error raises; a `KeyboardInterrupt` is such a `BaseException`."""


@dataclass
class Life:
    """A model under a plan, and what plain hooks say that each capture must hold."""

    model: nn.Module
    names: list[str]
    truth: dict[tuple[str, int], list[Tensor]]
    open: list[tuple[Capture, Activations, dict[str, list[int]], dict[str, object]]] = field(
        default_factory=list
    )
    closed: list[tuple[Activations, dict[str, list[int]], dict[str, object]]] = field(
        default_factory=list
    )
    foreign: list[torch.utils.hooks.RemovableHandle] = field(default_factory=list)
    seen: int = 0

    def enter(self, chosen, options, at):
        names = sorted({self.names[i % len(self.names)] for i in chosen})
        if "mask" in options:  # for which axes must be known, and `batch pos` come first
            names = [name for name in names if "hook_" in name and "pattern" not in name]
        if not names:
            return
        opened = capture(self.model, names, **options)
        try:
            with interrupted(at):
                acts = opened.__enter__()
        except KeyboardInterrupt:
            return
        self.stopped |= options.get("stop", False)
        self.open.append((opened, acts, {name: [] for name in names}, options))

    def leave(self, which, error, at=0):
        if not self.open:
            return
        opened, acts, seeds, options = self.open.pop(which % len(self.open))
        try:
            with interrupted(at) as interrupts:
                opened.__exit__(*((Planned, Planned(), None) if error else (None, None, None)))
        except NeverFiredError:
            assert any(not ran for ran in seeds.values())
        except KeyboardInterrupt:
            name, _, is_first = interrupts.where
            if name == "Capture.__exit__" and is_first:
                opened.__exit__(Planned, Planned(), None)
        self.closed.append((acts, seeds, options))

    def copy(self):
        if hasattr(self.model, "hook_dict"):
            return  # it keeps tensors of its last forward, in the graph, which cannot be copied
        with torch.no_grad():
            assert not isinstance(copy.deepcopy(self.model)(tokens()), Stopped)

    def forward(self, seed, fails):
        handle = None
        if fails:
            last = self.model.get_submodule(self.last_module)
            handle = last.register_forward_pre_hook(_fail)
        watching = bool(self.open)
        try:
            output = self.model(tokens(seed=seed))
        except Planned:
            return
        except HooksRemovedError:
            assert self.was_reset
            return
        finally:
            if handle is not None:
                handle.remove()
        asked = [options for *_, options in self.open]
        assert isinstance(output, Stopped) == any("stop" in options for options in asked)
        if fails:
            assert isinstance(output, Stopped), "a forward that was to fail ended well"
        if watching and isinstance(output, Tensor):
            assert output.requires_grad == any("grad" in options for options in asked)
        for _, _, seeds, _ in self.open:
            for ran in seeds.values():
                ran.append(seed)

    def check(self, acts, name, seeds, options):
        """Compare what a capture holds of a site with what plain hooks saw."""
        if not seeds:
            assert name not in acts
            return
        found = acts.firings(name)
        if not self.stopped:
            assert len(found) == len(self.truth[name, seeds[0]])
        for number in range(1 if self.stopped else len(found)):  # a stop lets later ones not come
            parts = [self.truth[name, seed][number] for seed in seeds]
            expected = torch.cat([part[REAL] if "mask" in options else part for part in parts])
            assert torch.equal(found[number], expected)
            assert found[number].requires_grad == ("grad" in options)

    was_reset = False
    stopped = False
    last_module = ""

    def add_foreign(self):
        def count(*_args):
            self.seen += 1

        self.foreign.append(self.model.register_forward_pre_hook(count))

    def remove_foreign(self, which):
        if self.foreign:
            self.foreign.pop(which % len(self.foreign)).remove()

    def reset(self):
        if hasattr(self.model, "reset_hooks") and self.open:
            self.model.reset_hooks()
            self.was_reset = True


def _fail(*_args):
    raise Planned


# At 0 there is no interrupt.
LINES = st.one_of(st.just(0), st.just(0), st.integers(1, 400))
STEPS = st.lists(
    st.one_of(
        st.tuples(
            st.just("enter"),
            st.lists(st.integers(0, 3), min_size=1, max_size=3),
            st.sampled_from(OPTIONS),
            LINES,
        ),
        st.tuples(st.just("leave"), st.integers(0, 5), st.booleans(), LINES),
        st.tuples(
            st.just("forward"), st.integers(0, 2), st.sampled_from([False, False, False, True])
        ),
        st.tuples(st.just("add_foreign")),
        st.tuples(st.just("remove_foreign"), st.integers(0, 3)),
        st.tuples(st.sampled_from(["reset", "add_foreign", "add_foreign", "copy"])),
    ),
    max_size=14,
)
LAST = {"plain": "head", "llama": "lm_head", "bridge": "unembed", "hooked": "unembed"}


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    build, names = KINDS[request.param]
    model = build()
    truth = {}
    for seed in range(3):
        for name in names:  # each alone, the plain way
            truth[name, seed] = _plain(model, name, tokens(seed=seed))
    return request.param, model, names, truth


def _plain(model, name, ids):
    kept = []

    def keep(*args):
        kept.append(args[-1].detach().clone())

    point = getattr(model, "hook_dict", {}).get(name)
    if point is not None:
        point.add_hook(lambda activation, hook: keep(activation))  # noqa: ARG005
    else:
        handle = model.get_submodule(name).register_forward_hook(keep)
    with torch.no_grad():
        model(ids)
    if point is not None:
        point.remove_hooks()
    else:
        handle.remove()
    return kept


def _live(kind, steps):
    name, model, names, truth = kind
    life = Life(model, names, truth)
    life.last_module = LAST[name]
    before = hooks_of(model)
    for step, *args in steps:
        getattr(life, step)(*args)
    while life.open:
        life.leave(len(life.open) // 2, error=False)
    while life.foreign:
        life.remove_foreign(0)
    assert torch.is_grad_enabled()
    assert hooks_of(model) == before
    for acts, seen, options in life.closed:
        for site, seeds in seen.items():
            life.check(acts, site, seeds, options)


RELAXED = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}


@pytest.mark.usefixtures("unchecked")
@settings(max_examples=100, **RELAXED)
@given(steps=STEPS)
def test_whatever_happens_the_model_is_as_before_and_the_buffers_are_right(kind, steps):
    _live(kind, steps)


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
@settings(max_examples=3000, **RELAXED)
@given(steps=STEPS)
def test_whatever_happens_in_thousands_of_lives(kind, steps):
    _live(kind, steps)


@pytest.mark.usefixtures("unchecked")
@settings(max_examples=10, **RELAXED)
@given(sites=st.lists(st.integers(0, 2), min_size=1, max_size=3), runs=st.integers(1, 4))
def test_with_the_collector_off_stopped_captures_leave_no_tensor_alive(sites, runs):
    model = huggingface("LlamaForCausalLM")
    names = ["model.layers.0", "model.layers.0.mlp", "model.layers.1"]
    chosen = sorted({names[i] for i in sites})
    model(tokens())

    def alive():
        # Not `isinstance`, which asks deprecated objects for their class.
        return sum(issubclass(type(each), Tensor) for each in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        before = alive()
        for _ in range(runs):
            with capture(model, chosen, stop=True) as acts:
                model(tokens())
            del acts
        assert alive() <= before
    finally:
        gc.enable()
