"""Where the axes of a model's sites truly lie, told by bare hooks on forwards of other sizes.

No name is trusted: an axis that is longer with more sequences is theirs, one that is longer with
more positions is theirs, and one that is longer with either holds both, flattened.
"""

import functools
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import architectures
from architectures import BATCH, POS
from torch import Tensor, nn

from actctx import Activations, capture, hook_names

MORE_BATCH, MORE_POS = 5, 11
Fired = dict[str, list[Tensor]]

# Where heads have an axis of their own, which is before the last one unless it is a pattern's.
_PER_HEAD = re.compile(r"hook_(?:rot_)?[qkvz]$|\.[qkv]\.hook_out$|\.o\.hook_in$")
_PATTERN = re.compile(r"hook_(?:pattern|attn_scores)$")


@dataclass(frozen=True)
class Truth:
    """The axes of a site, by their places.

    Attributes:
        rank: The number of axes.
        batch: The axis of the sequences, or None where it has none.
        pos: The axes of positions: two are those of a query and a key.
        odd: Axes that grow, but are no axis of sequences or positions alone: flattened rows, a
            batch times heads.
        flat: The axis that has one row for each position of each sequence.
        own: Whether the site has as many positions as the model has tokens.
        head: The axis of the heads, where the site is known to have one.

    """

    rank: int
    batch: int | None
    pos: tuple[int, ...]
    odd: tuple[int, ...]
    flat: int | None
    own: bool
    head: int | None


class Matrix:
    """One architecture, as a plain model or a bridge, with what bare hooks see of it.

    Attributes:
        name: The name of the architecture.
        kind: `"plain"` or `"bridge"`.
        model: The model.
        translated: TransformerLens' names of a plain model's places that fire.
        refused: Why others of them are refused.
        fired: What every site yields, in the order of the firings.
        truths: Where its axes lie, by site, for those whose firings are alike.

    """

    def __init__(self, name: str, kind: str, *, alone: bool = False) -> None:
        self.name, self.kind = name, kind
        self.model = getattr(architectures, kind)(name)
        self.translated: list[str] = []
        self.refused: dict[str, Exception] = {}
        if kind == "plain":
            self._translate()
        self.fired = self.bare(self.inputs())
        if alone:
            return
        wider = self.bare(self.inputs(MORE_BATCH))
        longer = self.bare(self.inputs(BATCH, MORE_POS))
        self.grows = any(_shapes(self.fired[name]) != _shapes(longer[name]) for name in self.fired)
        truths = {
            name: self._truth(name, firings[0], wider[name][0], longer[name][0])
            for name, firings in self.fired.items()
            if all(len(_shapes(fired[name])) == 1 for fired in (self.fired, wider, longer))
        }
        # What becomes of a picture, which has one size, does not tell where its positions are.
        pictured = not self.grows or name.endswith("/pictures")
        self.truths = {
            site: truth
            for site, truth in truths.items()
            if not pictured or truth.pos or truth.odd or truth.rank == 2
        }

    def inputs(self, batch: int = BATCH, pos: int = POS, **options: int) -> dict[str, Tensor]:
        """Draw what the model takes."""
        return architectures.inputs(self.model, batch, pos, **options)

    def run(self, given: Mapping[str, Tensor]) -> object:
        """Run the model."""
        return architectures.run(self.model, dict(given))

    def bare(self, given: Mapping[str, Tensor]) -> Fired:
        """Read every site without actctx, but for TransformerLens' names on plain models.

        What those yield is compared with a bridge elsewhere.
        """
        run = functools.partial(self.run, given)
        fired: Fired = defaultdict(list)
        if self.kind == "bridge":
            _read_hook_points(self.model, run, fired)
            return fired
        _read_modules(self.model, run, fired)
        if self.translated:
            with capture(self.model, self.translated, check=False) as acts:
                run()
            fired |= {name: acts.firings(name) for name in acts}
        return fired

    def by_alias(self) -> Fired:
        """List what every hook point of a bridge yields, by all of its names."""
        points = self.model.hook_dict.items()
        return {name: self.fired[point.name] for name, point in points if point.name in self.fired}

    def _translate(self) -> None:
        given, hooks = self.inputs(), lambda name: "hook_" in name
        try:
            with capture(self.model, hooks, check=False) as acts:
                self.run(given)
            self.translated = list(acts)
        except Exception as error:  # noqa: BLE001  every error is a finding
            self.refused["**"] = error
            try:
                names = hook_names(self.model, hooks)
            except Exception:  # noqa: BLE001  as above
                return
            acts, refused = captured(self, names, given, check=False)
            self.translated = list(acts)
            self.refused |= refused

    def _truth(self, name: str, value: Tensor, wider: Tensor, longer: Tensor) -> Truth:
        axes = range(value.ndim)
        by_batch = {a for a in axes if value.shape[a] != wider.shape[a]}
        by_pos = {a for a in axes if value.shape[a] != longer.shape[a]}
        if not by_pos:  # pictures have one size
            by_pos = {a for a in axes if value.shape[a] == self._frames} - by_batch
        both = by_batch & by_pos
        batch = [a for a in by_batch - both if value.shape[a] == BATCH]
        odd = both | (by_batch - set(batch))
        if len(batch) > 1:
            batch, odd = [], odd | set(batch)
        pos = tuple(sorted(by_pos - both))
        # A decoder has two tokens more than its encoder.
        lengths = {POS, POS + 2} if self.grows else {self._frames}
        flat = [a for a in both if value.shape[a] in {BATCH * length for length in lengths}]
        return Truth(
            value.ndim,
            batch[0] if batch else None,
            pos,
            tuple(sorted(odd)),
            flat[0] if len(flat) == 1 else None,
            all(value.shape[a] in lengths for a in pos),
            _head(name, value, {*by_batch, *by_pos}),
        )

    @functools.cached_property
    def _frames(self) -> int | None:
        """The number of positions of what is given in one size: pictures, spectrograms."""
        config = getattr(getattr(self.model, "original_model", self.model), "config", None)
        own = {"vit": 17, "deit": 18, "audio-spectrogram-transformer": 22}
        if self.name.endswith("/pictures"):
            return {"llava": 5, "gemma3": 16}[config.model_type]
        return own.get(getattr(config, "model_type", None))


def _head(name: str, value: Tensor, grown: Collection[int]) -> int | None:
    if value.ndim != 4:
        return None
    rest = [axis for axis in range(4) if axis not in grown]
    if _PATTERN.search(name) and len(rest) == 1:
        return rest[0]
    return rest[0] if _PER_HEAD.search(name) and len(rest) == 2 else None


def _shapes(firings: list[Tensor]) -> set[tuple[int, ...]]:
    return {tuple(value.shape) for value in firings}


def _read_hook_points(model: nn.Module, run: Callable[[], object], fired: Fired) -> None:
    """Read what every hook point of a bridge is given."""

    def keep(value: object, hook: nn.Module) -> None:
        if isinstance(value, Tensor):
            fired[hook.name].append(value.detach().clone())

    points = {id(point): point for point in model.hook_dict.values()}.values()
    for point in points:
        point.add_hook(keep)
    try:
        run()
    finally:
        for point in points:
            point.remove_hooks()


def _read_modules(model: nn.Module, run: Callable[[], object], fired: Fired) -> None:
    """Read what every module returns: a tensor, or the first one of a tuple."""

    def keep(name: str, _module: nn.Module, _given: object, output: object) -> None:
        first = output[0] if isinstance(output, tuple) and output else output
        if isinstance(first, Tensor):
            fired[name].append(first.detach().clone())

    handles = [
        module.register_forward_hook(functools.partial(keep, name))
        for name, module in model.named_modules()
        if name
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()


def captured(
    matrix: Matrix,
    names: list[str],
    given: Mapping[str, Tensor],
    *,
    by_glob: bool = False,
    **options: object,
) -> tuple[Mapping[str, object], dict[str, Exception]]:
    """Capture sites by their exact names, or as what a glob matches, and find what is refused.

    Where a capture is refused as a whole, its halves are tried, down to single sites.

    Returns:
        The capture of all others, empty where there are none, and the errors by site.

    """
    refused: dict[str, Exception] = {}

    def tried(some: list[str]) -> Activations | None:
        asked = some.__contains__ if by_glob else some
        try:
            with capture(matrix.model, asked, **options) as acts:
                matrix.run(given)
        except Exception as error:  # noqa: BLE001  every error is a finding
            if len(some) == 1:
                refused[some[0]] = error
                return None
            tried(some[: len(some) // 2])
            tried(some[len(some) // 2 :])
            return None
        return acts

    acts = tried(names) if names else {}
    if acts is None:
        rest = [name for name in names if name not in refused]
        acts = tried(rest) if rest else {}
    return acts or {}, refused
