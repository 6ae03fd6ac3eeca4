"""What every architecture of TransformerLens' factory must hold, as a plain model and as a bridge.

The oracle is bare hooks, on forwards with other numbers of sequences and of positions.
"""

import functools
import re
from collections.abc import Iterator

import pytest
import torch
from models import GENERATION
from torch import Tensor

if GENERATION < 4:
    pytest.skip("the factory of TransformerLens 4 and later", allow_module_level=True)

import architectures
from architectures import BATCH, HEADS, POS, WRONG, apart
from grown import MORE_BATCH, Matrix, Truth, captured

from actctx import AxisError, capture

# Captures of bridges that are known to be wrong say so.
pytestmark = [
    pytest.mark.thorough,
    pytest.mark.filterwarnings("ignore:.*TransformerLens 4:UserWarning"),
]
Failures = Iterator[tuple[str, str]]
CASES = [(name, kind) for kind in ("plain", "bridge") for name in architectures.built(kind)]
# Keys and values that a decoder takes from its encoder.
_ACROSS = re.compile(r"cross_attn|EncDecAttention|encoder_attn")
POSITIONS = {"pos", "query", "key"}


@functools.lru_cache(maxsize=1)
def matrix_of(name: str, kind: str) -> Matrix:
    return Matrix(name, kind)


def values_are_those_of_bare_hooks(matrix: Matrix) -> Failures:
    """Every site is captured bit for bit."""
    with capture(matrix.model, _everything(matrix), check=True) as acts:
        matrix.run(matrix.inputs())
    for name, firings in matrix.fired.items():
        if name in matrix.translated:
            continue  # by another capture
        got = acts.firings(name) if name in acts else []
        if len(got) != len(firings) or not all(map(torch.equal, got, firings)):
            yield name, f"value: {len(got)} firings for {len(firings)}"


def plain_values_are_those_of_a_bridge(matrix: Matrix) -> Failures:
    """TransformerLens' names on a plain model mean what they mean on a bridge."""
    if matrix.kind == "bridge" or matrix.name in architectures.NO_BRIDGE:
        return
    for site, error in matrix.refused.items():
        yield site, f"refused: {type(error).__name__}: {error}"
    if not matrix.translated:
        yield "**", "has none of TransformerLens' names"
    expected = Matrix(matrix.name, "bridge", alone=True).by_alias()
    for name in matrix.translated:
        got, wanted = matrix.fired[name], expected.get(name)
        if wanted is None:  # what a bridge yields there is no tensor, or it never fires
            continue
        if WRONG.get(matrix.name, "no name") in name:
            continue
        if len(got) != len(wanted) or not all(map(_alike, got, wanted)):
            yield name, f"{_shapes(got)} for a bridge's {_shapes(wanted)}"
        elif (off := max(map(apart, got, wanted))) > 1e-4:
            yield name, f"off by {off:.2g} from a bridge's"


def axes_lie_where_they_grow(matrix: Matrix) -> Failures:
    """No axis of a whole capture has a wrong name; one that is not known is `_`."""
    for given in (matrix.inputs(), matrix.inputs(HEADS, HEADS)):
        with capture(matrix.model, _everything(matrix), check=False) as acts:
            matrix.run(given)
        for name in matrix.truths:
            yield from _axes(matrix, name, acts, may_be_unknown=True)


def axes_are_told_where_sizes_coincide(matrix: Matrix) -> Failures:
    """With as many sequences and positions as heads no size tells, and a slice has to know."""
    given = matrix.inputs(HEADS, HEADS)
    fired = matrix.bare(given)
    acts, _ = captured(matrix, _one_of_each(matrix, _with_pos(matrix)), given, slice=slice(None))
    for name in acts:
        yield from _axes(matrix, name, acts)
        if not all(map(torch.equal, acts.firings(name), fired[name])):
            yield name, "value of a whole slice"


def positions_are_selected(matrix: Matrix) -> Failures:
    """The last position of every site that has positions, by exact names and by globs."""
    for by_glob, given in ((False, matrix.inputs()), (True, matrix.inputs(HEADS, HEADS))):
        what = "glob pos" if by_glob else "pos"
        fired = matrix.bare(given)
        wanted = _one_of_each(matrix, _with_pos(matrix))
        acts, refused = captured(matrix, wanted, given, by_glob=by_glob, slice=-1)
        for name, error in refused.items():
            if matrix.truths[name].own:
                yield name, f"{what} refused: {type(error).__name__}: {error}"
        for name in acts:
            axis = matrix.truths[name].pos[0]  # of the queries, which come first
            yield from _same(name, what, acts.firings(name), _at(fired[name], axis, -1))


def positions_are_selected_from_flattened_rows(matrix: Matrix) -> Failures:
    """Where rows are flattened sequences, the last of each is meant, or nothing is selected."""
    for by_glob, given in ((False, matrix.inputs()), (True, matrix.inputs(HEADS, HEADS))):
        fired = matrix.bare(given)
        flat = [name for name, truth in matrix.truths.items() if truth.flat is not None]
        flat = _one_of_each(matrix, flat)
        acts, _ = captured(matrix, flat, given, by_glob=by_glob, slice={"pos": -1})
        batch = len(next(iter(given.values())))
        for name in acts:
            axis = matrix.truths[name].flat
            whole = [value.unflatten(axis, (batch, -1)) for value in fired[name]]
            yield from _same(name, "pos of rows", acts.firings(name), _at(whole, axis + 1, -1))


def positions_are_refused_where_there_are_none(matrix: Matrix) -> Failures:
    """By exact names as by globs; where sizes coincide, too."""
    others = [name for name, truth in matrix.truths.items() if not truth.pos and truth.flat is None]
    given = matrix.inputs(HEADS, HEADS)
    for name in _one_of_each(matrix, others):
        for names in (name, [name].__contains__):
            try:
                with capture(matrix.model, names, slice={"pos": -1}) as acts:
                    matrix.run(given)
            except AxisError:
                continue
            except Exception as error:  # noqa: BLE001  every error is a finding
                yield name, f"pos is refused otherwise: {type(error).__name__}: {error}"
            else:
                if name in acts:
                    yield name, f"pos is selected where there is none: {acts.axes(name)}"


def heads_are_selected(matrix: Matrix) -> Failures:
    """The first head of every site that is known to have heads, by exact names and by globs."""
    given = matrix.inputs(HEADS, HEADS)
    fired = matrix.bare(given)
    with capture(matrix.model, _everything(matrix), check=False) as whole:
        matrix.run(given)
    for axis in ("head", "kv_head"):
        named = [name for name in matrix.truths if axis in whole.axes(name)]
        for by_glob in (False, True):
            what = f"glob {axis}" if by_glob else axis
            wanted = _one_of_each(matrix, named)
            acts, refused = captured(matrix, wanted, given, by_glob=by_glob, slice={axis: 0})
            for name, error in refused.items():
                yield name, f"{what} refused: {type(error).__name__}: {error}"
            for name in acts:
                where = matrix.truths[name].head
                where = whole.axes(name).index(axis) if where is None else where
                yield from _same(name, what, acts.firings(name), _at(fired[name], where, 0))


def forwards_join_along_the_sequences(matrix: Matrix) -> Failures:
    """Two forwards with other numbers of sequences are one tensor."""
    few, many = matrix.inputs(BATCH), matrix.inputs(MORE_BATCH, seed=1)
    parts = matrix.bare(few), matrix.bare(many)
    wanted = [
        name
        for name, truth in matrix.truths.items()
        if (truth.batch is not None or truth.flat is not None) and len(matrix.fired[name]) == 1
    ]
    with capture(matrix.model, _everything(matrix)) as acts:
        matrix.run(few)
        matrix.run(many)
    for name in wanted:
        truth = matrix.truths[name]
        axis = truth.flat if truth.batch is None else truth.batch
        whole = torch.cat([part[name][0] for part in parts], axis)
        try:
            if not torch.equal(acts[name], whole):
                yield name, f"join: {tuple(acts[name].shape)} for {tuple(whole.shape)}"
        except Exception as error:  # noqa: BLE001  every error is a finding
            yield name, f"join refused: {type(error).__name__}: {error}"


def masks_keep_the_rows_of_real_tokens(matrix: Matrix) -> Failures:
    """With padding on the right; a decoder has other positions than the mask."""
    given = matrix.inputs()
    if "input_ids" not in given:
        return
    mask = torch.ones(BATCH, POS, dtype=torch.long)
    mask[1, -2:] = mask[2, -3:] = 0
    given["attention_mask"] = mask
    fired = matrix.bare(given)
    wanted = [
        name
        for name, truth in matrix.truths.items()
        if truth.batch is not None
        and len(truth.pos) == 1
        and fired[name][0].shape[truth.pos[0]] == POS
        and len(fired[name]) == 1
    ]
    acts, refused = captured(matrix, _one_of_each(matrix, wanted), given, mask="attention")
    for name, error in refused.items():
        if _ACROSS.search(name):  # in a decoder, which may be given a mask of its own
            continue
        yield name, f"mask refused: {type(error).__name__}: {error}"
    for name in acts:
        truth = matrix.truths[name]
        rows = fired[name][0].movedim((truth.batch, truth.pos[0]), (0, 1))[mask.bool()]
        if not torch.equal(acts[name], rows):
            yield name, f"mask: {tuple(acts[name].shape)} for {tuple(rows.shape)}"


CHECKS = (
    values_are_those_of_bare_hooks,
    plain_values_are_those_of_a_bridge,
    axes_lie_where_they_grow,
    axes_are_told_where_sizes_coincide,
    positions_are_selected,
    positions_are_selected_from_flattened_rows,
    positions_are_refused_where_there_are_none,
    heads_are_selected,
    forwards_join_along_the_sequences,
    masks_keep_the_rows_of_real_tokens,
)


def failures(name: str, kind: str) -> Iterator[tuple[str, str, str]]:
    """List what does not hold of an architecture: the check, the site and what is wrong."""
    matrix = matrix_of(name, kind)
    for check in CHECKS:
        try:
            for site, what in check(matrix):
                yield check.__name__, site, what
        except Exception as error:  # noqa: BLE001  of a capture that is refused as a whole
            yield check.__name__, "**", f"{type(error).__name__}: {error}"


# One of each way to build a model; all others are marked slow.
USUAL = {
    "AfmoeForCausalLM",
    "ASTForAudioClassification",
    "BartForConditionalGeneration",
    "BertForMaskedLM",
    "BloomForCausalLM",
    "DeepseekV3ForCausalLM",
    "DeepseekV4ForCausalLM",
    "FalconForCausalLM/grouped",
    "Florence2ForConditionalGeneration",
    "Gemma4ForCausalLM",
    "Gemma4ForConditionalGeneration",
    "GPT2LMHeadModel",
    "GptOssForCausalLM",
    "HrmTextForCausalLM",
    "HubertForCTC",
    "JambaForCausalLM",
    "JetMoeForCausalLM",
    "LEDForConditionalGeneration",
    "Lfm2MoeForCausalLM",
    "Llama4ForCausalLM",
    "LlavaForConditionalGeneration/pictures",
    "LongT5ForConditionalGeneration",
    "Mamba2ForCausalLM",
    "MptForCausalLM",
    "MusicFlamingoForConditionalGeneration",
    "OlmoHybridForCausalLM",
    "OpenAIGPTLMHeadModel",
    "OPTForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3NextForCausalLM",
    "Qwen3_5ForConditionalGeneration",
    "RwkvForCausalLM",
    "SwitchTransformersForConditionalGeneration",
    "T5Gemma2ForConditionalGeneration",
    "TransformerLensNative",
    "ViTForImageClassification",
    "Zamba2ForCausalLM",
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(*case, id="-".join(case), marks=[] if case[0] in USUAL else pytest.mark.slow)
        for case in CASES
    ],
)
@pytest.mark.usefixtures(
    "unchecked"
)  # types are checked elsewhere; here they cost most of the time
def test_every_site_is_what_bare_hooks_say(name, kind):
    assert not list(failures(name, kind))


@pytest.mark.parametrize("name", architectures.NOT_BUILT)
def test_what_is_listed_as_not_built_cannot_be(name):
    with pytest.raises((AttributeError, ImportError)):
        architectures.plain(name)


def test_every_architecture_of_the_factory_is_built_or_said_not_to_be():
    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES

    assert {name for name, _ in CASES} >= USUAL
    named = {name.partition("/")[0] for name, _ in CASES} | architectures.NOT_BUILT.keys()
    assert named == set(SUPPORTED_ARCHITECTURES)


def _axes(matrix, name, acts, *, may_be_unknown: bool = False) -> Failures:
    axes, truth = acts.axes(name), matrix.truths[name]
    value = acts.firings(name)[0]
    if len(axes) != truth.rank:
        yield name, f"axes {axes} of rank {truth.rank}"
    elif wrong := "; ".join(_wrong(axes, truth, value, {"_"} if may_be_unknown else set())):
        yield name, f"axes {axes} of {tuple(value.shape)}: {wrong}"


def _wrong(axes: tuple[str, ...], truth: Truth, value: Tensor, also: set[str]) -> Iterator[str]:
    """Say which axes are not named, then which are named otherwise."""
    named = {axis: {called} for axis, called in enumerate(axes)}
    if truth.batch is not None and not named[truth.batch] <= {"batch"} | also:
        yield f"batch is axis {truth.batch}"
    if truth.flat is not None and not named[truth.flat] <= {"token", "_"}:
        yield f"flattened rows are axis {truth.flat}"
    if truth.head is not None and not named[truth.head] <= {"head", "kv_head", "_"}:
        yield f"head is axis {truth.head}"
    allowed = POSITIONS if len(truth.pos) == 1 else {"query", "key"}
    if truth.own and not {axes[axis] for axis in truth.pos} <= allowed | also:
        yield f"positions are axes {truth.pos}"
    grown = {truth.batch, *truth.pos, *truth.odd}
    for axis, called in enumerate(axes):
        if axis in grown:
            places = {"batch": {truth.batch}, "token": {*truth.odd}, "_": grown}
            wrong = axis not in places.get(called, truth.pos if called in POSITIONS else ())
        else:
            wrong = called == "token" or (
                called in {"batch", *POSITIONS} and value.shape[axis] != 1
            )
        if wrong:
            yield f"axis {axis} is not {called}"


def _shapes(firings: list[Tensor]) -> list[tuple[int, ...]]:
    return [tuple(value.shape) for value in firings]


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether shapes agree: a bridge repeats a batch of one, and unflattens flattened rows."""
    return one.numel() == other.numel() or one[0].shape == other[0].shape


def _with_pos(matrix: Matrix) -> list[str]:
    return [name for name, truth in matrix.truths.items() if truth.pos]


def _at(firings: list[Tensor], axis: int, index: int) -> list[Tensor]:
    return [value.select(axis, index) for value in firings]


def _same(name, what, got, expected: list[Tensor]) -> Failures:
    if len(got) != len(expected) or not all(map(torch.equal, got, expected)):
        shapes = [tuple(value.shape) for value in (*got[:1], *expected[:1])]
        yield name, f"{what}: the wrong value, {shapes}"


def _one_of_each(matrix: Matrix, names: list[str]) -> list[str]:
    """Choose one site of those whose names differ by numbers alone, and whose axes are alike."""
    kinds = {(re.sub(r"\d+", "0", name), matrix.truths[name]): name for name in reversed(names)}
    return [name for name in names if name in kinds.values()]


def _everything(matrix: Matrix) -> list[str]:
    return list(matrix.fired)
