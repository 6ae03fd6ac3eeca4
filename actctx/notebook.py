"""The cell magic `%%capture_activations`, for IPython and Jupyter: `%load_ext actctx`."""

import ast
import functools
from keyword import iskeyword
from typing import Any

import torch
from IPython.core.getipython import get_ipython
from IPython.core.interactiveshell import InteractiveShell
from IPython.core.magic import output_can_be_silenced
from IPython.core.magic_arguments import argument, magic_arguments, parse_argstring

from actctx._capture.capture import capture
from actctx._errors import OptionError
from actctx._select.slices import parse_words

_DTYPES = ("float16", "bfloat16", "float32", "float64")


def load_ipython_extension(shell: InteractiveShell) -> None:
    """Add the magic to a shell; `%load_ext actctx` calls it."""
    shell.register_magic_function(capture_activations, "cell")


def _unquoted(word: str) -> str:
    """Remove the quotes that IPython leaves around the words of a line."""
    quoted = len(word) > 1 and word[0] == word[-1] and word[0] in "\"'"
    return word[1:-1] if quoted else word


_word = functools.partial(argument, type=_unquoted)


@output_can_be_silenced
@magic_arguments()
@_word("model", help="The model: a variable or an expression, in quotes if it has spaces.")
@_word("names", nargs="+", help="Hook names, module names or globs, in quotes or not.")
@_word(
    "--slice",
    action="append",
    metavar="AXIS=INDEX",
    help="What to keep along an axis: pos=-1, pos=0:10 or head=0,3. Repeatable.",
)
@_word("--dtype", choices=_DTYPES, help="The dtype to keep; by default the model's.")
@_word("--device", help="The device to move the activations to; by default the model's.")
@_word("--mask", choices=("attention",), help="Keep the rows of real tokens only.")
@_word("--join", default="batch", help="The axis that forwards are joined along, or none.")
@argument("--capacity", type=int, metavar="N", help="Allocate N rows at the first forward.")
@argument(
    "--grad", action="store_true", help="Keep the graph, for gradients through the activations."
)
@_word("--reduce", metavar="EXPRESSION", help="A statistic to compute, such as Moments().")
@_word("--map", metavar="EXPRESSION", help="A function whose results are kept instead.")
@_word("--map-axis", default="feature", help="The last axis of these results, or none.")
@argument("--stop", action="store_true", help="End each forward once all names have fired.")
@_word("--as", dest="variable", default="acts", metavar="NAME", help="By default acts.")
def capture_activations(line: str, cell: str) -> object:
    """Run the cell in a capture.

    The buffer exists under its name from the start of the cell, and stays afterwards. The hooks are
    removed when the cell ends, even if it raises or is interrupted. The value of the cell's last
    line is displayed, as usual. It does not work with a top-level `await`; use `capture(...)`
    there.

    Example:
        %%capture_activations model "blocks.*.hook_resid_post" --slice pos=-1 --as resid
        model(tokens)

    """
    shell: Any = get_ipython()
    args = parse_argstring(capture_activations, line)
    _check_variable(args.variable, args.model)
    capturing = capture(
        _evaluate(shell, args.model),
        args.names,
        slice=parse_words(args.slice or []) or None,
        dtype=getattr(torch, args.dtype) if args.dtype else None,
        device=args.device,
        mask=args.mask,
        join=None if args.join.lower() == "none" else args.join,
        capacity=args.capacity,
        grad=args.grad,
        reduce=_value(shell, "--reduce", args.reduce),
        map=_value(shell, "--map", args.map),
        map_axis=None if args.map_axis.lower() == "none" else args.map_axis,
        stop=args.stop,
    )
    with capturing as shell.user_ns[args.variable]:
        return _run(shell, cell)


def _check_variable(variable: str, model: str) -> None:
    """Refuse a name that is not a valid variable name, or is the name of the model.

    Raises:
        OptionError: It is such a name.

    """
    if not variable.isidentifier() or iskeyword(variable):
        raise OptionError(f"--as {variable!r} is not a valid variable name; give one such as acts")
    if variable in _names_in(model):
        raise OptionError(
            f"--as {variable!r} would overwrite the model; give another name, such as acts"
        )


def _names_in(expression: str) -> set[str]:
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except SyntaxError:  # which is said once it is evaluated
        return set()
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def _evaluate(shell: Any, model: str) -> Any:
    """Find the model.

    Raises:
        OptionError: There is none under this name.

    """
    try:
        return shell.ev(model)
    except (NameError, SyntaxError, AttributeError, LookupError, TypeError) as error:
        raise OptionError(
            f"the first word after %%capture_activations must be the model, but {model!r} is not "
            f"one: {type(error).__name__}: {error}; give a variable that holds one, or an "
            "expression, in quotes if it has spaces"
        ) from None


def _value(shell: Any, option: str, expression: str | None) -> Any:
    """Evaluate what an option is given.

    Raises:
        OptionError: It cannot be.

    """
    if expression is None:
        return None
    try:
        return shell.ev(expression)
    except Exception as error:
        raise OptionError(
            f"{option} {expression!r} cannot be evaluated: {type(error).__name__}: {error}; give "
            "an expression of what the notebook has, in quotes if it has spaces"
        ) from error


def _run(shell: Any, cell: str) -> object:
    """Run a cell in the user's namespace, and return the value of its last line.

    `run_cell` is not used, because it shows an error and then continues as if there were none.
    """
    source = shell.transform_cell(cell)
    name = shell.compile.cache(source, shell.execution_count, raw_code=cell)
    body = shell.transform_ast(shell.compile.ast_parse(source, filename=name)).body
    last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
    names = shell.user_ns
    # The shell's own `compile` knows the `from __future__` of earlier cells.
    exec(shell.compile(ast.Module(body, []), name, "exec"), names)  # noqa: S102  the user's cell
    if last is None:
        return None
    return eval(shell.compile(ast.Expression(last.value), name, "eval"), names)  # noqa: S307  as above
