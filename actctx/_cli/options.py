"""What the commands take: their arguments and options, and how what is refused is said."""

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
    """Read a path, of which a shell leaves `~` as it is behind a `=`."""
    return Path(given).expanduser()


def _expanded(given: str) -> str:
    """Read the path, or the address, of a data set."""
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
        help="A name, the end of one, or a glob in quotes: `*` stays within two dots, `**` spans "
        "them, `[8-11]` is those numbers. Without a dot it matches the last part of a name.",
    ),
]
Hooks = Annotated[
    list[str],
    typer.Argument(
        metavar="HOOK",
        help="Hook names, ends of them, or globs in quotes; `actctx names MODEL` lists them.",
    ),
]
Text = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Read texts from a file, or from the standard input with `-`: each paragraph, up "
        "to a blank line, is one.",
    ),
]
Prompt = Annotated[
    list[str] | None, typer.Option(metavar="TEXT", help="One text. Can be given again.")
]
Slice = Annotated[
    list[str] | None,
    typer.Option(
        metavar="AXIS=INDEX",
        help="What to keep along an axis: `pos=-1`, the last token of each text; `pos=0:10`; "
        "`head=0,3`. Can be given again, for another axis.",
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
Force = Annotated[bool, typer.Option("--force", help="Replace the file, if there is one.")]
BatchSize = Annotated[int, typer.Option(min=1, metavar="N", help="Texts in a forward, at most.")]
Batch = Annotated[int, typer.Option(min=1, metavar="N", help="Sequences in the forward.")]
Length = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Tokens in a sequence. [default: 1024, or the most that the model reads]",
    ),
]
Device = Annotated[str, typer.Option(metavar="DEVICE", help="Where the model runs.")]


# Where the library says how to switch a hook point on.
_SWITCH = re.compile(r" is off: call (model\..*) first")


# The options of Python's calls, which the library's messages name, outside of quotes.
_OPTION = re.compile(
    r"(?P<quoted>(?<!\w)'[^']*')"
    r"|give resume=True to go on with it, or (?P<another>another)?"
    r"|\b(?P<flag>pack|add|equal_lengths|finite|resume)=(?P<set>True|False)\b"
    r"|\bdrop=\{'(?P<dropped>\w+)': \[(?P<what>\d+)\]\}"
    r"|\b(?P<name>(?:batch_size|context|dtype|slice|mask|pool|tokenizer)(?==)|max_tokens)"
    r"(?:=(?:torch\.)?(?P<value>'[^']*'|[\w.-]*\w)?)?"
)


def _as_typed(option: re.Match[str]) -> str:
    """Write an option of Python's as it is typed."""
    if option["quoted"]:
        return option[0]
    if option["flag"]:
        negated = "no-" if option["set"] == "False" else ""
        return f"--{negated}{option['flag'].replace('_', '-')}"
    if option["dropped"]:
        return f"--drop {option['dropped']}={option['what']}"
    if not option["name"]:
        rest = "give another" if option["another"] else ""
        return f"leave out --no-resume to go on with it, or {rest}"
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
        help="Read texts from a file, each paragraph one; from a `.jsonl` file, an object a line, "
        "with its `text` or its `input_ids`; or from the directory of a Hugging Face dataset.",
    ),
]
Into = Annotated[
    str, typer.Option(metavar="DIRECTORY", help="Write to this data set, or go on with it.")
]
MaxTokens = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Stop at exactly so many rows.")
]
Context = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Tokens in a sequence, at most. [default: the model's]"),
]
Pack = Annotated[
    bool, typer.Option("--pack", help="Join the texts and cut them into --context tokens each.")
]
EqualLengths = Annotated[
    bool,
    typer.Option(
        "--equal-lengths",
        help="Run only texts of one length together, so that no forward sees padding: for models "
        "that let it into the tokens beside it, such as CANINE and ConvBERT.",
    ),
]
Drop = Annotated[
    list[str] | None,
    typer.Option(
        metavar="WHAT=N",
        help="Leave out tokens: `position=0`, the first of each sequence; `token=50256,0`. Can be "
        "given again.",
    ),
]
Carry = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME", help="Keep this of each object, such as a label. Can be given again."
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
    typer.Option("--resume/--no-resume", help="Go on with a data set that is there, or refuse to."),
]
Add = Annotated[
    bool,
    typer.Option(
        "--add",
        help="Add every HOOK to the rows of the data set that is there, from the --data and with "
        "the options that they came from.",
    ),
]
Sync = Annotated[
    bool,
    typer.Option(
        "--sync/--no-sync",
        help="Wait at each commit until it is on the disk itself, so that a cut of power costs "
        "nothing that was committed.",
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be dropped.")]
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
