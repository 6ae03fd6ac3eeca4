"""Run texts or tokens through a model, batch by batch, and write the activations to a data set."""

import time
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from actctx._capture.capture import Capture
from actctx._capture.watched import Options
from actctx._errors import OptionError
from actctx._extract.add_sites import add_sites, clear_additions
from actctx._extract.model_inputs import reader_of
from actctx._extract.order import check_order
from actctx._extract.plan import make_plan
from actctx._extract.row_choice import dropping
from actctx._extract.run import run
from actctx._extract.signals import signals_raised
from actctx._files import local_path
from actctx._model.sites import Names, Site
from actctx._results.activations import Activations
from actctx._select.padding import Chosen
from actctx._select.slices import Slice
from actctx._store.destination import Destination
from actctx._store.indexing import whole_number
from actctx._store.libraries import import_lance


@dataclass(frozen=True)
class Extracted:
    """The result of `extract`.

    Attributes:
        path: The path of the data set.
        rows: The number of its rows.
        new_rows: The number of rows that this call wrote.
        cut: The number of tokens that this call cut off the ends of sequences to fit the context.
        empty: The number of sequences that this call read and that have no rows: those without
            tokens, and those of which `mask`, `drop` or the slice keeps none.
        seconds: The time it took.

    """

    path: Path
    rows: int
    new_rows: int
    cut: int
    empty: int
    seconds: float


def extract(
    model: nn.Module,
    data: Iterable[Any],
    names: Names,
    out: str | PathLike[str],
    *,
    slice: Slice = None,  # noqa: A002  as in `capture`
    dtype: torch.dtype | None = None,
    mask: str | None = "attention",
    pool: Literal["mean", "max"] | None = None,
    max_tokens: int | None = None,
    tokenizer: Any = None,
    batch_size: int = 8,
    context: int | None = None,
    equal_lengths: bool = False,
    pack: bool = False,
    drop: Mapping[str, Iterable[int]] | None = None,
    carry: str | Iterable[str] = (),
    finite: bool = True,
    resume: bool = True,
    add: bool = False,
    sync: bool = True,
    stop: bool = True,
    progress: bool = True,
) -> Extracted:
    """Run inputs through a model, and write the captured activations to a data set on disk.

    A row is a token: its activations at each site, the `token` itself, the number of its `sequence`
    in the input, and its `position` in the sequence. Padding has no rows. If the slice selects one
    position of each sequence, such as `{"pos": -1}`, or with `pool`, a row is a sequence.

    Rows are committed while the extraction runs. However it ends, committed rows are kept, and
    calling it again with the same arguments resumes. The finished data set is the same, row for
    row, as one that was written without a break. A finished data set grows in the same way, if
    there are more batches after those it has, or if `max_tokens` is larger.

    Args:
        model: A TransformerLens model of any generation, or any module.
        data: What to run: token ids `batch pos`; an iterable of them, such as a `DataLoader`, or of
            dicts with `input_ids` and the `attention_mask`, which are run as they are, but with the
            padding after the tokens; or single sequences of token ids, texts, or dicts of either,
            such as a Hugging Face dataset, which are batched. It is read in a separate thread.
        names: What to capture, as in `capture`.
        out: Where to write, a directory such as `acts.lance`. It is created, or resumed.
        slice: What to select along the axes of every site, as in `capture`. Along `pos` it counts
            the tokens that are not padding and not dropped, and is the same for all sites.
        dtype: The dtype of floating-point sites, as in `capture`: float32, float16, bfloat16, or
            one of float8. Integers and bools keep theirs.
        mask: Which tokens have rows. `"attention"` keeps all that are not padding. The name of an
            entry in each dict of `data`, such as `"loss_mask"`, keeps those of them where it is not
            0. None keeps all, including the padding of given batches.
        pool: Whether a row is a sequence, with the mean or the elementwise maximum of the
            activations of its tokens that `mask`, `drop` and the slice keep, in float32. Its
            `token` and `position` are those of the last of them.
        max_tokens: The exact number of rows to stop at, including those on disk. It cannot be used
            with `add`.
        tokenizer: Converts texts to tokens; by default the model's own.
        batch_size: The most sequences in a forward, if they are batched here. A resumed data set
            keeps its original order of rows. With another size, a warning says that values are
            equal only up to rounding.
        context: The most tokens in a sequence; by default what the model can read. Longer sequences
            are cut off at the end.
        equal_lengths: Whether only sequences of equal length run together, so that no forward sees
            padding. This takes more forwards. In some models, such as CANINE and ConvBERT, padding
            changes the tokens next to it in spite of the mask. A warning names this option if that
            is detected.
        pack: Whether to join the sequences and cut them into `context` tokens each. Texts are
            joined by the tokenizer's end-of-sequence token, if it has one. A `sequence` is then one
            that the model saw.
        drop: The tokens without rows: `{"position": [0]}`, by their position in the sequence, or
            `{"token": [50256]}`, by their ids.
        carry: The names of further entries of the dicts, such as labels and ids. Each becomes a
            column of numbers or strings. Strings are stored once per sequence.
        finite: Whether NaN and infinite values are refused.
        resume: Whether to resume an existing data set; otherwise it is refused. An input that is
            shuffled without a seed could not be resumed, so it needs False.
        add: Whether the sites are added to the rows of an existing data set, which are not
            rewritten. The input must be the one that the rows came from. Until it is done, the new
            columns are next to it, in `acts.lance.adding`, and are resumed if `resume` allows it.
        sync: Whether a commit is on the disk, not only in the system's memory, before more is
            written. Without it, power loss may cost the last commits; the next call resumes after
            the newest complete one.
        stop: Whether to end each forward as soon as all sites have fired. If the last site fires
            several times in a forward, a row then has its first firing.
        progress: Whether to show a progress bar, on a terminal or in a notebook. Elsewhere,
            progress is reported once a minute, by the logger "actctx" if it is enabled for INFO,
            else on stderr.

    Returns:
        The result.

    Raises:
        DataError: The input cannot be read; the input, the model or an option differs from the data
            set's; there is something else at the path, or it cannot be written to, or another
            extraction is writing to it; it has more rows than `max_tokens`; a value is not finite.
        OptionError: An option is not valid.
        ActctxError: As `capture`.
        SystemExit: In the main thread, at SIGTERM or SIGHUP, after complete rows are committed,
            unless you have a handler for it.

    Example:
        >>> done = extract(model, tokens, "blocks.1.hook_resid_post", "acts.lance")
        >>> done.rows
        28

    """
    import_lance()
    begun = time.monotonic()
    if pool not in (None, "mean", "max"):
        raise OptionError(f"pool={pool!r} is not a way to pool; give 'mean', 'max' or None")
    if max_tokens is not None:
        max_tokens = whole_number("max_tokens", max_tokens, least=1)
    if resume or add:
        check_order(data)
    chosen = Chosen()
    options = Options(stop=stop, join="batch", grad=False, mask=chosen, capacity=None)
    capture: Capture[Activations] = Capture(
        model, names, options, defaults=Site("", slice, dtype, "cpu")
    )
    reader = reader_of(
        model,
        tokenizer=tokenizer,
        batch_size=batch_size,
        context=context,
        pack=bool(pack),
        carry=_names_of(carry),
        mask=mask,
        equal_lengths=bool(equal_lengths),
    )
    plan = make_plan(
        model,
        capture,
        chosen=chosen,
        reader=reader,
        drop=dropping(drop),
        pooling=pool,
        finite=finite,
    )
    with signals_raised():
        destination = Destination(local_path(out), sync=sync)
        try:
            before, contents = destination.row_count, destination.contents
            if add:
                tally = add_sites(
                    plan,
                    data,
                    destination=destination,
                    most=max_tokens,
                    resume=resume,
                    progress=progress,
                )
            else:
                clear_additions(destination)
                if contents is not None:
                    plan.facts.check(contents, resume=resume)
                tally = run(plan, data, destination, most=max_tokens, progress=progress)
        finally:
            destination.release()
    return Extracted(
        path=destination.path,
        rows=tally.row_count,
        new_rows=tally.row_count - before,
        cut=tally.cut,
        empty=tally.empty,
        seconds=time.monotonic() - begun,
    )


def _names_of(carry: str | Iterable[str]) -> tuple[str, ...]:
    if isinstance(carry, str):
        return (carry,)
    if not isinstance(carry, Iterable):
        raise OptionError(f"carry={carry!r} names nothing; give a list of names, such as ['label']")
    return tuple(sorted(carry) if isinstance(carry, AbstractSet) else carry)
