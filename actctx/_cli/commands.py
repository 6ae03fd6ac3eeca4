"""The implementation of the commands. It imports torch, unlike the parsing of their arguments."""

import io
import json
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.measure import Measurement
from rich.progress import track
from rich.table import Table
from torch import nn

from actctx._capture.capture import capture as take
from actctx._cli.corpus import paragraphs, read_corpus
from actctx._cli.load_model import load, load_without_weights
from actctx._cli.options import Dtype, Pooling
from actctx._cli.texts import (
    Result,
    Sequences,
    TextBatch,
    count_caches,
    in_batches,
    run,
    tokenize,
)
from actctx._errors import OptionError
from actctx._files import local_path, room_beside
from actctx._model.places import Place, Places, hook_names
from actctx._model.sites import resolve
from actctx._results.activations import Activations
from actctx._select.slices import Index, parse_words
from actctx._store.layout import layout_of
from actctx._store.libraries import import_lance
from actctx._store.repair import repair as mend
from actctx._store.validation import count_rows, reading
from actctx._store.verification import check_whole
from actctx._store.versions import NewestVersion, newest_whole, open_lance
from actctx._text import counted, dtype_name, format_bytes, is_utf8, printable, shortened
from actctx.extract import extract as write

_LENGTH = 1024
"""The tokens of a sequence in a plan, unless the model reads fewer."""

_UNBROKEN = 10_000
"""More columns than any table has."""


def names(model: str, pattern: str | None) -> None:
    """List what can be captured from a model."""
    _print(_table_of(_matching(load(model), pattern)))


def capture(
    model: str,
    hooks: list[str],
    *,
    text: str | None,
    prompts: Sequence[str],
    slices: Sequence[str],
    dtype: Dtype | None,
    out: Path | None,
    force: bool,
    batch_size: int,
    tokenizer: str | None,
    device: str,
) -> None:
    """Run texts through a model, show the captured activations, and save them."""
    selected = _slices(slices)
    _check_out(out, force=force)
    texts = _read_texts(text, prompts)
    loaded = load(model, device=device, tokenizer=tokenizer)
    sequences = tokenize(loaded, texts)
    batches = in_batches(sequences.tokens, batch_size)
    result = run(loaded, hooks, batches, slice=selected, dtype=_torch(dtype), watch=_progress)
    if out is not None:  # before anything else can fail
        described = {
            "model_name": model,
            "hooks": json.dumps(hooks),
            "slice": json.dumps(slices),
            "text": text or "--prompt",
            "lengths": json.dumps([len(tokens) for tokens in sequences.tokens]),
            "transformer_lens": version("transformer_lens"),
        }
        result.activations.save(out, metadata=described)
    _note_what_was_lost(result, sequences)
    _print_sizes(result.activations, count_caches(loaded, batches), len(texts))
    typer.echo("not saved, which --out FILE does" if out is None else f"saved {out}")


def plan(
    model: str,
    hooks: list[str],
    *,
    batch: int,
    length: int | None,
    slices: Sequence[str],
    dtype: Dtype | None,
) -> None:
    """Show what the hooks would leave of a forward, without running it."""
    selected = _slices(slices)
    outlined: Any = load_without_weights(model)
    limit = outlined.cfg.n_ctx
    length = min(_LENGTH, limit) if length is None else length
    if length > limit:
        raise OptionError(
            f"--length {length} is more than the {limit} tokens that {model} reads; give fewer"
        )
    tokens = torch.ones((batch, length), dtype=torch.long)
    capturing = take(outlined, hooks, slice=selected, dtype=_torch(dtype), stop=True)
    planned = capturing.plan(tokens)
    if planned.missing:
        _note(f"matched, but would never fire: {shortened(list(planned.missing))}")
    table = _table("site", "axes", "shape", "dtype", "bytes")
    table.columns[-1].justify = "right"
    for name in planned:
        row = planned[name].row(name)
        table.add_row(row.site, row.axes, row.shape, row.dtype, format_bytes(row.nbytes))
    _print(table)
    said = f"{format_bytes(planned.nbytes)} would be captured"
    if planned.cache_nbytes is not None:
        said += f"; run_with_cache would hold {format_bytes(planned.cache_nbytes)}"
    typer.echo(f"{said} for {counted(batch, 'text')} of {counted(length, 'token')}")


def extract(
    model: str,
    hooks: list[str],
    *,
    data: Path,
    out: str,
    slices: Sequence[str],
    dtype: Dtype | None,
    max_tokens: int | None,
    batch_size: int,
    context: int | None,
    equal_lengths: bool,
    pack: bool,
    drop: Sequence[str],
    carry: list[str],
    mask: str,
    pool: Pooling | None,
    finite: bool,
    resume: bool,
    add: bool,
    sync: bool,
    tokenizer: str | None,
    device: str,
) -> None:
    """Run a corpus through a model and write the activations to a data set on disk."""
    import_lance()  # before the model, which takes longer to load
    corpus = read_corpus(data)
    done = write(
        load(model, device=device, tokenizer=tokenizer),
        corpus,
        hooks,
        out,
        slice=_slices(slices) or None,
        dtype=_torch(dtype),
        max_tokens=max_tokens,
        batch_size=batch_size,
        context=context,
        equal_lengths=equal_lengths,
        pack=pack,
        drop=_drop(drop),
        carry=carry,
        mask=mask,
        pool=None if pool is None else pool.value,
        finite=finite,
        resume=resume,
        add=add,
        sync=sync,
    )
    if done.cut:
        _note(
            f"{counted(done.cut, 'token')} cut off at the ends of texts, which are longer than the "
            "model reads at once"
        )
    if done.empty:
        _note(
            f"{done.empty} of the inputs left no rows: they have no tokens, or none of them is kept"
        )
    new = "with the new columns" if add else f"{done.new_rows} of them new"
    typer.echo(f"{done.rows} rows in {done.path}, {new}")


def info(path: str) -> None:
    """Show what a data set contains and where it comes from."""
    found = _open(path)
    if found.lost:
        _note(f"{found.lost}; {found.remedy}")
    lance = found.opened
    layout = layout_of(lance, path)
    with reading(path):
        rows = count_rows(lance)
    table = _table("site", "hook", "axes", "shape", "dtype", "bytes")
    table.columns[-1].justify = "right"
    for site in layout.sites:
        size = format_bytes(rows * site.nbytes)
        axes = " ".join(site.axes)
        cells = (site.name, site.hook, axes, str((rows, *site.shape)), site.dtype, size)
        table.add_row(*map(printable, cells))
    _print(table)
    state = "finished" if layout.finished else "not finished"
    name = printable(layout.model["name"] or layout.model["class"])
    typer.echo(f"{rows} rows, one per {layout.rows}, {state}, from {name}")
    carried = [f"{each.name} {each.type}" for each in lance.schema if each.name in layout.carried]
    written = ", ".join(f"{package} {each}" for package, each in layout.versions.items())
    facts = {"fingerprint": layout.model["fingerprint"], **layout.input}
    for key, value in {
        **facts,
        "carried": ", ".join(carried) or None,
        "versions": written,
    }.items():
        typer.echo(printable(f"  {key}: {value}"))


def verify(path: str) -> None:
    """Compare a data set with what was written."""
    found = _open(path)
    verified = check_whole(found.opened, path, lost=found.lost)
    for unchecked in verified.unchecked:
        _note(f"not compared: {unchecked}")
    names = f"{counted(len(verified.columns), 'column')} of {counted(verified.rows, 'row')}"
    typer.echo(f"{names} are as they were written")


def repair(path: str, *, dry_run: bool) -> None:
    """Drop what is damaged from a data set."""
    import_lance()
    rows, dropped, said = mend(local_path(path), dry_run=dry_run)
    for damage in said:
        _note(damage)
    done = "would be dropped" if dry_run else "dropped"
    if not said:
        done = "nothing to drop"
        typer.echo(f"{done}: {counted(rows, 'row')} are whole")
        return
    typer.echo(f"{counted(dropped, 'row')} {done}, {counted(rows, 'row')} kept")


def _open(path: str) -> NewestVersion:
    """Open a data set, whose newest versions may be damaged."""
    import_lance()
    is_there = "://" not in path and (Path(path) / "_versions").is_dir()
    return newest_whole(path) if is_there else NewestVersion(open_lance(path))


# What was asked.


def _slices(asked: Sequence[str]) -> dict[str, Index]:
    """Read the `--slice` options, such as `pos=-1`."""
    for option in asked:
        if option.partition("=")[0] == "batch":
            raise OptionError(
                f"--slice {option} is not supported: the command line makes the batches; give "
                "fewer texts"
            )
    return parse_words(asked)


def _drop(asked: Sequence[str]) -> dict[str, list[int]]:
    """Read the `--drop` options, such as `position=0`.

    Raises:
        OptionError: One of them is not valid.

    """
    found: dict[str, list[int]] = {}
    for option in asked:
        name, _, numbers = option.partition("=")
        try:
            found.setdefault(name, []).extend(int(number) for number in numbers.split(","))
        except ValueError:
            raise OptionError(
                f"--drop {option!r} is not WHAT=N; give one such as position=0 or token=50256,0"
            ) from None
    return found


def _torch(dtype: Dtype | None) -> torch.dtype | None:
    return None if dtype is None else getattr(torch, dtype)


def _check_out(out: Path | None, *, force: bool) -> None:
    """Refuse an output that cannot be written, before the model runs."""
    if out is None:
        return
    try:
        found = "it is a directory" if out.is_dir() else ""
        if not out.parent.is_dir():
            found = "its directory does not exist"
        if not found and out.exists() and not out.is_file():
            found = "it is a device or a pipe"
        if not found:
            with room_beside(out):
                pass
    except OSError as error:
        found = f"the system says {(error.strerror or str(error)).lower()!r}"
    if found:
        raise OptionError(f"cannot save to '{out}': {found}; give --out the path of a file")
    if out.exists() and not force:
        raise OptionError(f"'{out}' exists; give --force to replace it, or another --out")


def _read_texts(file: str | None, prompts: Sequence[str]) -> list[str]:
    if (file is None) == (not prompts):
        both = "both were given" if prompts else "neither was given"
        raise OptionError(f"give either --text FILE or --prompt TEXT to capture from; {both}")
    if file is None:
        if odd := [prompt for prompt in prompts if not is_utf8(prompt)]:
            raise OptionError(f"--prompt {odd[0]!r} is not UTF-8; give text that is")
        return list(prompts)
    try:
        text = sys.stdin.read() if file == "-" else Path(file).expanduser().read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise OptionError(
            f"cannot read --text {file!r}: {reason}; give a text file, or '-' for stdin"
        ) from None
    if not (texts := [*paragraphs(io.StringIO(text))]):
        raise OptionError(f"--text {file!r} contains no text; give a file that does")
    return texts


def _matching(model: nn.Module, pattern: str | None) -> list[Place]:
    """List the places that a pattern matches; raise an error if there are none."""
    places = Places(model)
    found = dict.fromkeys(places[name] for name in hook_names(model, pattern))
    if found or pattern is None:
        return list(found)
    return [request.place for request in resolve(model, pattern)]


# What is shown.


def _progress(batches: Sequence[TextBatch]) -> Iterable[TextBatch]:
    console = Console(stderr=True)
    hidden = len(batches) < 2 or not console.is_terminal  # noqa: PLR2004  a bar of one step
    return track(batches, description="batches", console=console, transient=True, disable=hidden)


def _note_what_was_lost(result: Result, sequences: Sequences) -> None:
    """Report on stderr what was cut off, filled or missing."""
    cut = [tokens for tokens in sequences.cut if tokens]
    if cut:
        _note(
            f"{counted(sum(cut), 'token')} cut off at the ends of {len(cut)} of the "
            f"{len(sequences.cut)} texts: the model reads {sequences.limit} at once"
        )
    if result.filled:
        lengths = [len(tokens) for tokens in sequences.tokens]
        _note(f"the texts have {min(lengths)} to {max(lengths)} tokens: shorter rows end in zeros")
    if result.missing:
        _note(f"matched, but never fired: {shortened(list(result.missing))}")


def _note(message: str) -> None:
    typer.echo(f"{typer.style('note:', fg='yellow', bold=True)} {message}", err=True)


def _table_of(places: Iterable[Place]) -> Table:
    table = _table("name", "aliases", "axes", header=Console().is_terminal)
    for place in places:
        axes = " ".join(place.axes) if place.axes else "not known"
        table.add_row(place.name, " ".join(place.names[1:]), axes)
    return table


def _print_sizes(acts: Activations, cache_bytes: int, texts: int) -> None:
    table = _table("site", "axes", "shape", "dtype", "bytes")
    table.columns[-1].justify = "right"
    for name, tensor in acts.items():
        dtype = dtype_name(tensor.dtype)
        size = format_bytes(tensor.nbytes)
        table.add_row(name, " ".join(acts.axes(name)), str(tuple(tensor.shape)), dtype, size)
    _print(table)
    typer.echo(
        f"{format_bytes(acts.nbytes)} captured; run_with_cache would have held "
        f"{format_bytes(cache_bytes)} for the same {texts} text{'s' * (texts != 1)}"
    )


def _table(*columns: str, header: bool = True) -> Table:
    table = Table(*columns, box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=header)
    for column in table.columns:
        column.no_wrap = column.header != "axes"  # a broken name could not be copied
    return table


def _print(table: Table) -> None:
    """Print a table as wide as the terminal; unbroken if there is none, or if it is too narrow."""
    for column in table.columns:
        if column.no_wrap:
            column.min_width = max(len(str(cell)) for cell in (column.header, *column.cells))
    console = Console(highlight=False, markup=False, emoji=False)
    needed = Measurement.get(console, console.options.update(max_width=_UNBROKEN), table)
    if console.is_terminal and needed.minimum <= console.width:
        console.print(table)
        return
    console.width = _UNBROKEN
    with console.capture() as drawn:
        console.print(table)
    for line in drawn.get().splitlines():
        typer.echo(line.rstrip())
