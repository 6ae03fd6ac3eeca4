"""The arguments and options of the commands, and how errors are printed."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

from actctx._errors import ActctxError

try:
    import typer
except ModuleNotFoundError as error:
    sys.exit(
        f"error: the command line needs {error.name}, which is not installed; "
        "install it with: pip install 'actctx[cli]'"
    )


class Dtype(StrEnum):
    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


class Pooling(StrEnum):
    mean = "mean"
    max = "max"


def _path(given: str) -> Path:
    """Read a path, and expand `~`, which a shell does not expand after a `=`."""
    return Path(given).expanduser()


def _expanded(given: str) -> str:
    """Read the path or address of a data set."""
    from actctx._files import expanded

    return expanded(given)


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A hub name, the directory of a saved model, or `minilm`: the trained MiniLM of "
        "the demo extra, which needs no network. Its hidden states are trained; its logits are "
        "not, since its MLM head is initialised at random.",
    ),
]
Pattern = Annotated[
    str | None,
    typer.Argument(
        metavar="PATTERN",
        help="A name, the end of a name, or a glob in quotes: `*` stays within two dots, `**` "
        "spans them, `[8-11]` matches these numbers. Without a dot it matches the last part of a "
        "name.",
    ),
]
Hooks = Annotated[
    list[str],
    typer.Argument(
        metavar="HOOK",
        help="Hook names, ends of names, or globs in quotes; `actctx names MODEL` lists them.",
    ),
]
Text = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Read texts from a file, or from standard input with `-`. Each paragraph, up to a "
        "blank line, is one text.",
    ),
]
Prompt = Annotated[
    list[str] | None, typer.Option(metavar="TEXT", help="One text. Can be repeated.")
]
Slice = Annotated[
    list[str] | None,
    typer.Option(
        metavar="AXIS=INDEX",
        help="What to keep along an axis: `pos=-1`, the last token of each text; `pos=0:10`; "
        "`head=0,3`. Can be repeated for other axes.",
    ),
]
AsDtype = Annotated[Dtype | None, typer.Option(help="The dtype to keep. [default: the model's]")]
Out = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        parser=_path,
        help="Save to this safetensors file. [default: only the table]",
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing file.")]
BatchSize = Annotated[int, typer.Option(min=1, metavar="N", help="The most texts in a forward.")]
Batch = Annotated[int, typer.Option(min=1, metavar="N", help="The sequences in the forward.")]
Length = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="The tokens in a sequence. [default: 1024, or as many as the model reads]",
    ),
]
Device = Annotated[str, typer.Option(metavar="DEVICE", help="The device to run the model on.")]


# How the library's messages say how to switch a hook point on.
_SWITCH = re.compile(r" is off: call (model\..*) first")


# The options of Python calls in the library's messages, outside quotes.
_OPTION = re.compile(
    r"(?P<quoted>(?<!\w)'[^']*')"
    r"|give resume=True to resume it, or (?P<another>another)?"
    r"|\b(?P<flag>pack|add|equal_lengths|finite|resume)=(?P<set>True|False)\b"
    r"|\bdrop=\{'(?P<dropped>\w+)': \[(?P<what>\d+)\]\}"
    r"|\b(?P<name>(?:batch_size|context|dtype|slice|mask|pool|tokenizer)(?==)|max_tokens)"
    r"(?:=(?:torch\.)?(?P<value>'[^']*'|[\w.-]*\w)?)?"
)


def _as_typed(option: re.Match[str]) -> str:
    """Convert a Python option to a command-line option."""
    if option["quoted"]:
        return option[0]
    if option["flag"]:
        negated = "no-" if option["set"] == "False" else ""
        return f"--{negated}{option['flag'].replace('_', '-')}"
    if option["dropped"]:
        return f"--drop {option['dropped']}={option['what']}"
    if not option["name"]:
        rest = "give another" if option["another"] else ""
        return f"leave out --no-resume to resume it, or {rest}"
    value = (option["value"] or "").strip("'")
    return f"--{option['name'].replace('_', '-')} {value}".rstrip()


@contextmanager
def errors_as_messages(model: str) -> Iterator[None]:
    try:
        yield
    except ActctxError as error:
        message = str(error).replace("actctx.hook_names(model)", f"actctx names {model}")
        message = _SWITCH.sub(r" is off, which only Python can change, with \1", message)
        message = _OPTION.sub(_as_typed, message)
        typer.echo(f"{typer.style('error:', fg='red', bold=True)} {message}", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt as interrupt:
        for note in getattr(interrupt, "__notes__", ()):
            typer.echo(note, err=True)
        raise


Data = Annotated[
    Path,
    typer.Option(
        metavar="PATH",
        parser=_path,
        help="Read texts from a file, one per paragraph; from a `.jsonl` file, one object per "
        "line, with a `text` or `input_ids`; or from the directory of a Hugging Face dataset.",
    ),
]
Into = Annotated[
    str, typer.Option(metavar="DIRECTORY", help="Write to this data set, or resume it.")
]
MaxTokens = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Stop after exactly this many rows.")
]
Context = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="The most tokens in a sequence. [default: the model's]"),
]
Pack = Annotated[
    bool, typer.Option("--pack", help="Join the texts and cut them into --context tokens each.")
]
EqualLengths = Annotated[
    bool,
    typer.Option(
        "--equal-lengths",
        help="Run only texts of equal length together, so that no forward sees padding. For models "
        "in which padding changes the tokens next to it, such as CANINE and ConvBERT.",
    ),
]
Drop = Annotated[
    list[str] | None,
    typer.Option(
        metavar="WHAT=N",
        help="Drop tokens: `position=0`, the first of each sequence; `token=50256,0`. Can be "
        "repeated.",
    ),
]
Carry = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME", help="Keep this entry of each object, such as a label. Can be repeated."
    ),
]
MaskName = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="Keep the tokens for which this entry of each object is not 0, such as `loss_mask`.",
    ),
]
Pool = Annotated[
    Pooling | None,
    typer.Option(help="A row is a sequence, and holds the mean, or the maximum, of its tokens."),
]
Finite = Annotated[
    bool,
    typer.Option("--finite/--no-finite", help="Refuse NaN and infinite values, or write them."),
]
Resume = Annotated[
    bool,
    typer.Option("--resume/--no-resume", help="Resume an existing data set, or refuse to."),
]
Add = Annotated[
    bool,
    typer.Option(
        "--add",
        help="Add every HOOK to the rows of an existing data set, with the --data and the options "
        "that the rows came from.",
    ),
]
Sync = Annotated[
    bool,
    typer.Option(
        "--sync/--no-sync",
        help="Wait at each commit until it is on the disk, so that power loss cannot lose what was "
        "committed.",
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only report what would be dropped.")]
Tokenizer = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="The hub name, or the directory, of a tokenizer. [default: the model's]",
    ),
]
DataSet = Annotated[
    str,
    typer.Argument(
        metavar="DIRECTORY",
        parser=_expanded,
        help="What `actctx extract` wrote, or the address of a copy in an object store.",
    ),
]
