"""The command line, `actctx`, also as `python -m actctx`.

What the commands do is imported when one of them runs, so that help and completion need no torch.
"""

import sys
from importlib.metadata import version
from typing import Annotated

from actctx._cli.options import (
    Add,
    AsDtype,
    Batch,
    BatchSize,
    Carry,
    Context,
    Data,
    DataSet,
    Device,
    Drop,
    DryRun,
    EqualLengths,
    Finite,
    Force,
    Hooks,
    Into,
    Length,
    MaskName,
    MaxTokens,
    Model,
    Out,
    Pack,
    Pattern,
    Pool,
    Prompt,
    Resume,
    Slice,
    Sync,
    Text,
    Tokenizer,
    errors_as_messages,
)

try:
    import rich  # noqa: F401  the commands draw with it
    import typer
except ModuleNotFoundError as error:
    sys.exit(
        f"error: the command line needs {error.name}, which is not installed; "
        "install it with: pip install 'actctx[cli]'"
    )

app = typer.Typer(
    help="Capture activations from chosen places of a transformer model, and only those.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


def _show_version(*, asked: bool) -> bool:
    if asked:
        typer.echo(f"actctx {version('actctx')}")
        raise typer.Exit
    return asked


@app.callback()
def _actctx(
    *,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    pass


@app.command("names")
def _names(model: Model, pattern: Pattern = None) -> None:
    """List what can be captured from MODEL: names, their aliases, their axes.

    Every place has a line. A pipe gets the lines unbroken and without a header, for grep.
    """
    with errors_as_messages(model):
        from actctx._cli import commands

        commands.names(model, pattern)


@app.command("capture")
def _capture(
    model: Model,
    hook: Hooks,
    *,
    text: Text = None,
    prompt: Prompt = None,
    slice: Slice = None,  # noqa: A002  as in `capture`
    dtype: AsDtype = None,
    out: Out = None,
    force: Force = False,
    batch_size: BatchSize = 8,
    tokenizer: Tokenizer = None,
    device: Device = "cpu",
) -> None:
    """Run texts through MODEL, capture what every HOOK leaves, show its size and save it.

    A text becomes tokens as in TransformerLens, with a BOS token where the model has one. A
    forward stops once the last HOOK has fired. Texts of one length run together, so no forward
    sees padding; the rows are in the order of the texts. Where texts differ in length, shorter
    rows are filled up with zeros at their end, and `lengths` in the metadata tells them apart.
    """
    with errors_as_messages(model):
        from actctx._cli import commands

        commands.capture(
            model,
            hook,
            text=text,
            prompts=prompt or [],
            slices=slice or [],
            dtype=dtype,
            out=out,
            force=force,
            batch_size=batch_size,
            tokenizer=tokenizer,
            device=device,
        )


@app.command("plan")
def _plan(
    model: Model,
    hook: Hooks,
    *,
    batch: Batch = 8,
    length: Length = None,
    slice: Slice = None,  # noqa: A002  as in `capture`
    dtype: AsDtype = None,
) -> None:
    """Show what every HOOK would leave of a forward of MODEL, and its size, without running it.

    Only the config of MODEL is read, no weights. The sizes are those of a model in float32, and
    of a forward without padding.
    """
    with errors_as_messages(model):
        from actctx._cli import commands

        commands.plan(model, hook, batch=batch, length=length, slices=slice or [], dtype=dtype)


@app.command("extract")
def _extract(
    model: Model,
    hook: Hooks,
    *,
    data: Data,
    out: Into,
    slice: Slice = None,  # noqa: A002  as in `capture`
    dtype: AsDtype = None,
    max_tokens: MaxTokens = None,
    batch_size: BatchSize = 8,
    context: Context = None,
    equal_lengths: EqualLengths = False,
    pack: Pack = False,
    drop: Drop = None,
    carry: Carry = None,
    mask: MaskName = "attention",
    pool: Pool = None,
    finite: Finite = True,
    resume: Resume = True,
    add: Add = False,
    sync: Sync = True,
    tokenizer: Tokenizer = None,
    device: Device = "cpu",
) -> None:
    """Run a corpus through MODEL and write what every HOOK leaves to a data set on disk.

    A row is a token; with `--slice pos=-1` or `--pool` a row is a sequence. However it ends, what
    was written stays, and the same command goes on after it.
    """
    with errors_as_messages(model):
        from actctx._cli import commands

        commands.extract(
            model,
            hook,
            data=data,
            out=out,
            slices=slice or [],
            dtype=dtype,
            max_tokens=max_tokens,
            batch_size=batch_size,
            context=context,
            equal_lengths=equal_lengths,
            pack=pack,
            drop=drop or [],
            carry=carry or [],
            mask=mask,
            pool=pool,
            finite=finite,
            resume=resume,
            add=add,
            sync=sync,
            tokenizer=tokenizer,
            device=device,
        )


@app.command("info")
def _info(path: DataSet) -> None:
    """Show what a data set holds, and what it came from: sites, rows, model, input, versions."""
    with errors_as_messages(""):
        from actctx._cli import commands

        commands.info(path)


@app.command("verify")
def _verify(path: DataSet) -> None:
    """Compare all that a data set holds with what was written, and name what is damaged."""
    with errors_as_messages(""):
        from actctx._cli import commands

        commands.verify(path)


@app.command("repair")
def _repair(path: DataSet, *, dry_run: DryRun = False) -> None:
    """Drop from a data set the first row that is damaged and all after it.

    `actctx extract`, called as before, writes them again.
    """
    with errors_as_messages(""):
        from actctx._cli import commands

        commands.repair(path, dry_run=dry_run)


def main() -> None:
    """Run the command line; what it refuses ends in a message and the exit status 2."""
    app(prog_name="actctx")
