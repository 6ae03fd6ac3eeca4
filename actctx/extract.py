"""Extract activations to disk: a data set of texts or tokens through a model, batch by batch."""

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
    """What `extract` left on disk.

    Attributes:
        path: Where the data set is.
        rows: The rows that it has.
        new_rows: The rows that were written now.
        cut: The tokens that were cut off the ends of the sequences that ran now, to fit into the
            context.
        empty: The sequences that were read now and left no rows: those without tokens, and those of
            which `mask`, `drop` or the slice leaves none.
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
    """Run inputs through a model, and write what is captured to a data set on disk.

    A row is a token: what the sites left of it, the `token` itself, the number of its `sequence`
    in the input, and its `position` there. Padding leaves none. Where the slice takes one
    position of each sequence, as `{"pos": -1}` does, a row is a sequence, as it is with `pool`.

    Rows are committed while the extraction runs. However it ends, what was committed stays, and
    calling it again with the same arguments goes on after it. The finished data set is the same,
    row for row, as one that was written without a break. One that is finished grows in the same
    way, where there are more batches after those it had, or `max_tokens` is larger.

    Args:
        model: A TransformerLens model of any generation, or any module.
        data: What to run: token ids `batch pos`; an iterable of them, such as a `DataLoader`, or
            of dicts with `input_ids` and the `attention_mask`, which are run as they are, but with
            the padding behind the tokens; or single sequences of token ids, texts, or dicts of
            either, such as a Hugging Face dataset, which are put together into batches. It is read
            in a thread of its own.
        names: What to capture, as in `capture`.
        out: Where to write, a directory such as `acts.lance`. It is made, or resumed.
        slice: What to select along the axes of every site, as in `capture`. Along `pos` it counts
            the tokens that are no padding and that `drop` leaves, and is one for all sites.
        dtype: The dtype to keep of floating-point sites, as in `capture`: float32, float16,
            bfloat16, or one of float8. Integers and bools keep theirs.
        mask: Which tokens leave rows: with `"attention"` all that are no padding; with the name
            of an entry that each dict of `data` has, such as `"loss_mask"`, those of them where it
            is not 0; with None all, padding too, of batches that come as such.
        pool: Whether a row is a sequence, and holds the mean, or for each element the maximum, of
            what its tokens left: those that `mask`, `drop` and the slice leave, in float32. Its
            `token` and `position` are those of the last of them.
        max_tokens: The number of rows to stop at, exactly, including those that are on disk; with
            `add` it is left out.
        tokenizer: What turns texts into tokens; by default the model's own.
        batch_size: The sequences in a forward, where they are put together here, at most. A
            resumed data set keeps the order of rows that the first one made; with another size, a
            warning says that values are equal up to rounding only.
        context: The tokens in a sequence, at most; by default what the model can read. What is
            longer is cut off at the end.
        equal_lengths: Whether only sequences of one length run together, so that no forward sees
            padding. It takes more forwards. Some models, CANINE and ConvBERT among them, let
            padding into the tokens beside it whatever the mask says. A warning names this option
            where that is seen.
        pack: Whether to join the sequences and cut them into `context` tokens each. Texts are
            joined by the tokenizer's end-of-sequence token, where it has one. A `sequence` is
            then one that the model saw.
        drop: The tokens that leave no rows: `{"position": [0]}`, by their place in the sequence,
            or `{"token": [50256]}`, by their ids.
        carry: The names of what comes along with the sequences in dicts, such as labels and ids:
            a column each, of numbers or strings. Strings are stored once a sequence.
        finite: Whether NaN and infinite values are refused.
        resume: Whether to resume a data set that is there; otherwise it is refused. An input that
            is shuffled without a seed could not be resumed, so it needs False.
        add: Whether the sites are added to the rows of the data set that is there, which are not
            rewritten. The input has to be the one that they came from. Until all is done, what is
            new lies beside it, in `acts.lance.adding`, and is resumed if `resume` allows it.
        sync: Whether what is committed is on the disk itself, not only in the system's memory,
            before more is written. Without it a cut of power may cost the last commits; the next
            call goes on after the newest that is whole.
        stop: Whether to end each forward as soon as all sites have fired. Of a site that fires
            several times in a forward, a row has the first firing then, if it is the last site.
        progress: Whether a progress bar is shown, on a terminal or in a notebook; elsewhere a line
            a minute, by the logger "actctx" if it listens at INFO, else on stderr.

    Returns:
        What was written.

    Raises:
        DataError: The input cannot be read, or it, the model or an option differs from what the
            data set came from; there is something else at the path, or it cannot be written to, or
            another extraction does; it has more rows than `max_tokens`; a value is not finite.
        OptionError: An option is not valid.
        ActctxError: As `capture`.
        SystemExit: In the main thread, at SIGTERM or SIGHUP, once what is whole is committed;
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
