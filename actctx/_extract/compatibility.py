"""Compare an extraction with the data set that it resumes or adds to.

# NOTE [What is not compared]
The names of the model and of the tokenizer are recorded, but the same weights and texts come from
many paths: the weights and the tokens on disk tell whether they differ. The batch size is recorded
since it orders single sequences, an order that any other keeps; see `Reader.ordered_as`.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from actctx._capture.watched import WatchedSite
from actctx._errors import DataError
from actctx._extract.batching import is_padded_before
from actctx._extract.inputs import Reader
from actctx._extract.row_choice import Work
from actctx._model.absolute_positions import has_bare_table, tables_of
from actctx._model.flags import flags_of
from actctx._model.same_model import ANEW, Fact, differences, is_of_weights, summed_up
from actctx._select.slices import Positions, Selector
from actctx._store.contents import Contents
from actctx._store.layout import Layout
from actctx._store.site_columns import StoredSite, column_name
from actctx._text import dtype_name, printable

_SITES = "list of sites"
_NOT_COMPARED = {"name", "tokenizer", "batch_size"}


@dataclass(frozen=True, eq=False)
class Facts:
    """What is known of an extraction before any forward.

    Attributes:
        layout: What its data set says about itself, but for the sites.
        sites: What is captured.
        slices: What is selected from each site, by name.

    """

    layout: Layout
    sites: Sequence[WatchedSite]
    slices: Mapping[str, str]

    def names(self, there: Iterable[str]) -> list[str]:
        """Name the sites, where some are on disk: a pattern's count as far as they are there."""
        return [site.key for site in self.sites if site.exact or site.key in there]

    def check(self, contents: Contents, *, resume: bool, otherwise: str = "another path") -> None:
        """Compare what is known before any forward with the data set to be resumed.

        Args:
            contents: The data set that is there.
            resume: Whether it may be resumed.
            otherwise: What else can be done.

        Raises:
            DataError: It differs, or it is not to be resumed.

        """
        layout = contents.layout
        if not resume:
            raise DataError(
                f"'{contents.path}' exists; give resume=True to resume it, or {otherwise}"
            )
        stored = [site.name for site in layout.sites]
        asked = self.names(stored)
        facts = [
            *self._of_model(layout),
            # added sites come after the others, wherever a pattern has them
            (_SITES, stored, stored if sorted(asked) == sorted(stored) else asked),
            *self._of_sites(layout),
            *self._of_rows(layout),
        ]
        _compare(f"cannot resume '{contents.path}'", facts, otherwise)
        if more := layout.unlisted(contents.schema):
            raise DataError(
                f"cannot resume '{contents.path}': it has a column {more[0]!r} that extract() did "
                "not write, so new rows would have no value in it; drop it, with "
                f"lance.dataset(path).drop_columns([{more[0]!r}]), or give {otherwise}"
            )

    def check_rows(self, contents: Contents) -> None:
        """Compare what decides which rows there are with a data set that sites are added to.

        Raises:
            DataError: Its rows came from another model, or were chosen otherwise; or a column has
                the name that a site's would have.

        """
        layout = contents.layout
        if not layout.sites:
            raise DataError(
                f"cannot add to '{contents.path}': it has no site, so it is not known what was "
                "selected along its tokens; extract to another path"
            )
        was, now = layout.sites[0].slice, self.slices[self.sites[0].key]  # one for all, of tokens
        spared = flags_of(site.place for site in self.sites)  # which sites may need that are added
        facts = [
            *self._of_model(layout, spared),
            *self._of_rows(layout),
            ("slice along the tokens", _of_tokens(was), _of_tokens(now)),
        ]
        _compare(f"cannot add to '{contents.path}'", facts)
        more = layout.unlisted(contents.schema)
        taken = next((site.key for site in self.sites if column_name(site.key) in more), None)
        if taken is not None:
            raise DataError(
                f"cannot add {taken!r} to '{contents.path}': it has a column "
                f"{column_name(taken)!r} that extract() did not write; drop it, with "
                f"lance.dataset(path).drop_columns([{column_name(taken)!r}]), or give the site an "
                "alias, as in {'resid': ...}"
            )

    def check_added(self, contents: Contents) -> None:
        """Compare sites with those of the data set that they were added to.

        Raises:
            DataError: Those that were added are others.

        """
        _compare(f"cannot add to '{contents.path}'", self._of_sites(contents.layout))

    def check_sites(self, contents: Contents, sites: Iterable[StoredSite]) -> None:
        """Compare the sites, as a forward left them, with the data set that is resumed.

        Raises:
            DataError: A row of theirs is another.

        """
        told = {site.name: site for site in sites}
        facts = []
        for was in contents.layout.sites:
            now = told.get(was.name, was)
            facts += [
                (f"dtype of {was.name!r}", was.dtype, now.dtype),
                (f"shape of {was.name!r}", was.shape, now.shape),
                (f"list of axes of {was.name!r}", [*was.axes], [*now.axes]),
            ]
        _compare(f"cannot resume '{contents.path}'", facts)

    def check_hooks(self, contents: Contents, changing: Collection[str]) -> None:
        """Compare the hooks of others, once a forward has told which ones change what passes.

        Args:
            contents: The data set that has the rows.
            changing: The places of the model whose hooks do.

        Raises:
            DataError: Other hooks changed what is there.

        """
        facts = self._of_model(
            contents.layout, flags_of(site.place for site in self.sites), changing
        )
        _compare(f"cannot resume '{contents.path}'", facts)

    def on_batch_size(self, contents: Contents, reader: Reader) -> str | None:
        """Warn that values are equal up to rounding; None if the forwards are as they were."""
        was = contents.layout.input.get("batch_size")
        if was is None or not reader.runs_otherwise(was):
            return None
        return (
            f"the rows in '{contents.path}' were run with batch_size={was}, and new ones are run "
            f"with batch_size={reader.batch_size}, so values equal those of a single run only up "
            f"to rounding; give batch_size={was} for the same bits"
        )

    def _of_model(
        self, layout: Layout, spared: Collection[str] = (), changing: Collection[str] = ()
    ) -> Iterator[Fact]:
        was, now = layout.model, self.layout.model
        yield "model's class", was.get("class"), now["class"]
        has_other_versions = layout.versions != self.layout.versions
        yield from summed_up(
            differences(
                was,
                now,
                versions_differ=has_other_versions,
                changing=changing,
                spared=spared,
            )
        )

    def _of_sites(self, layout: Layout) -> Iterator[Fact]:
        stored = {site.name: site for site in layout.sites}
        for now in self.sites:
            if now.key not in stored:
                continue
            was = stored[now.key]
            yield f"hook of {was.name!r}", was.hook, now.place.name
            yield f"tensor of {was.name!r} (io, output, firing)", was.taken, taken_of(now)
            yield f"slice of {was.name!r}", was.slice, self.slices[was.name]
            if now.dtype is not None and was.torch_dtype.is_floating_point:
                yield f"dtype of {was.name!r}", was.dtype, dtype_name(now.dtype)

    def _of_rows(self, layout: Layout) -> Iterator[Fact]:
        yield "kind of row", layout.rows, self.layout.rows
        yield "list of carried columns", [*layout.carried], [*self.layout.carried]
        for name, was in {"equal_lengths": False, **layout.input}.items():
            if name not in _NOT_COMPARED:
                yield name, was, self.layout.input.get(name)


def check_padding(
    works: Iterable[Work], there: Contents, model: nn.Module, *, before: int = 0
) -> Iterator[Work]:
    """Pass on forwards, unless rows on disk may have counted padding as positions.

    Args:
        works: All there is, from a mark in the input on.
        there: The data set that has the rows.
        model: The model.
        before: The rows before the mark.

    Raises:
        DataError: They are of sequences with padding before their tokens, which versions that did
            not know `equal_lengths` ran as they were.

    """
    is_older = "equal_lengths" not in there.layout.input
    may_count = is_older and (any(tables_of(model)) or has_bare_table(model))
    count = before
    for work in works:
        is_there = may_count and count < there.row_count
        if is_there and "position_ids" not in work.batch.given and is_padded_before(work.batch):
            raise DataError(
                f"cannot resume '{there.path}': an older version of actctx wrote it, which did not "
                "move padding behind the tokens, and this model may count padding as positions, "
                "so its rows may be wrong; give another path"
            )
        count += len(work.token)
        yield work


def taken_of(site: WatchedSite) -> str:
    """Write which tensor of its place a site takes; see `StoredSite`."""
    output = "" if site.output is None else f" {site.output!r}"
    return f"{site.io}{output}" + ("" if site.firing is None else f", firing {site.firing}")


def slice_of(site: WatchedSite) -> str:
    """Write what is selected from a site; see `StoredSite`."""
    tokens = [] if site.rows is None else picks_of(site.rows.tokens)
    parts = [f"token {pick}" for _, pick in tokens]
    return ", ".join(parts + [f"axis {dim} {pick}" for dim, pick in picks_of(site.selector)])


def picks_of(selector: Selector) -> list[tuple[int, str]]:
    """Write a selection such that equal ones are written alike, whatever tensors it holds."""
    return [
        (
            step.dim,
            str(step.pick.index.tolist() if isinstance(step.pick, Positions) else step.pick),
        )
        for step in selector.steps
    ]


def _of_tokens(shown: str) -> str:
    """Return what a slice selects along the tokens; see `StoredSite`."""
    return shown.split(", axis ", maxsplit=1)[0] if shown.startswith("token ") else ""


def _compare(refusal: str, facts: Iterable[Fact], otherwise: str = "another path") -> None:
    for fact in facts:
        name, was, now = fact
        if was != now:
            hint = f" ({ANEW})" if is_of_weights(fact) else ""
            same = "the same"
            if name == _SITES and not {*now} <= {*was}:
                same += ", and add the others afterwards with add=True"
            raise DataError(
                f"{refusal}: its {printable(name)} is {was!r}, not {now!r}; give {same}, or "
                f"{otherwise}{hint}"
            )
