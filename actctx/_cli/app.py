"""The command line, `actctx`, also as `python -m actctx`.

The implementation of a command is imported when it runs, so that help and completion need no torch.
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
    help="Capture chosen activations of a transformer model, and nothing else.",
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
    """List what can be captured from MODEL, with aliases and axes.

    There is one line for each place. In a pipe, lines are unbroken and without a header, for grep.
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
    """Run texts through MODEL, capture every HOOK, show the sizes and save the activations.

    Texts become tokens as in TransformerLens, with a BOS token if the model has one. A forward
    stops once the last HOOK has fired. Texts of equal length run together, so no forward sees
    padding. The rows are in the order of the texts. If texts differ in length, shorter rows are
    filled with zeros at the end, and `lengths` in the metadata gives their lengths.
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
    """Run a corpus through MODEL and write the activations of every HOOK to a data set on disk.

    A row is a token; with `--slice pos=-1` or `--pool` a row is a sequence. If it is interrupted,
    everything that was written is kept, and the same command resumes.
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
    """Show what a data set contains and where it comes from: sites, rows, model and input."""
    with errors_as_messages(""):
        from actctx._cli import commands

        commands.info(path)


@app.command("verify")
def _verify(path: DataSet) -> None:
    """Compare a data set with what was written, and name what is damaged."""
    with errors_as_messages(""):
        from actctx._cli import commands

        commands.verify(path)


@app.command("repair")
def _repair(path: DataSet, *, dry_run: DryRun = False) -> None:
    """Drop the first damaged row of a data set and everything after it.

    `actctx extract`, called as before, writes these rows again.
    """
    with errors_as_messages(""):
        from actctx._cli import commands

        commands.repair(path, dry_run=dry_run)


def main() -> None:
    """Run the command line; invalid requests end with a message and exit status 2."""
    app(prog_name="actctx")
