"""The errors of actctx, all below one base.

ActctxError
├── OptionError (ValueError)            an option of `capture`, `captures` or `Site` makes no sense
├── HookNameError (LookupError)         a name matches no hook point and no module
├── AxisError (LookupError)             a slice or a join names an axis that the site does not have
├── SelectionError (IndexError)         a position lies outside the axis it selects from
├── OutputError (TypeError)             a site yields no tensor to capture
├── PlanError (RuntimeError)            a forward cannot be planned, since it depends on values
├── CaptureStateError (RuntimeError)    opened twice, closed while not open, shallowly copied
├── HooksRemovedError (RuntimeError)    somebody removed the hooks of an open capture
├── NeverFiredError (RuntimeError)      a site that was asked for by name never fired
├── StoppedError (RuntimeError)         a forward that stops early has no output and fills no cache
├── NotCapturedError (KeyError)         the buffer does not hold what was asked of it
├── SeveralFiringsError (ValueError)    a site fired more than once in a forward
├── JoinError (ValueError)              activations of several forwards do not join
├── CapacityError (ValueError)          more activations came than `capacity=` made room for
├── TypedError (TypeError)              a tensor is not what its annotation or the config says
├── DataError (ValueError)              a data set, its input or a file is not what it has to be
└── LoadError (OSError)                 the command line cannot load a model

Every message says what was asked, what was found and what to do.
"""


class ActctxError(Exception):
    """The base of every error that actctx raises on purpose."""

    def __str__(self) -> str:
        # KeyError, one of the built-in bases, would show the repr of the message.
        return Exception.__str__(self)


class OptionError(ActctxError, ValueError):
    """An option of `capture`, `captures` or `Site` makes no sense."""


class HookNameError(ActctxError, LookupError):
    """A name matches no hook point and no module of the model."""


class AxisError(ActctxError, LookupError):
    """A slice or a join names an axis that the site does not have."""


class SelectionError(ActctxError, IndexError):
    """A position lies outside the axis it selects from."""


class OutputError(ActctxError, TypeError):
    """A site yields no tensor to capture."""


class PlanError(ActctxError, RuntimeError):
    """A forward cannot be planned without running it."""


class CaptureStateError(ActctxError, RuntimeError):
    """A capture was opened twice or closed while not open, or a shallow copy of its model ran."""


class HooksRemovedError(ActctxError, RuntimeError):
    """The hooks of an open capture were removed by somebody else."""


class NeverFiredError(ActctxError, RuntimeError):
    """A site that was asked for by its name never fired, or never can."""


class StoppedError(ActctxError, RuntimeError):
    """A forward that stops early was to give an output, or to fill a cache."""


class NotCapturedError(ActctxError, KeyError):
    """The buffer does not hold what was asked of it."""


class SeveralFiringsError(ActctxError, ValueError):
    """A site fired more than once in a forward, so one tensor would be a silent choice."""


class CapacityError(ActctxError, ValueError):
    """More activations came than `capacity=` made room for."""


class JoinError(ActctxError, ValueError):
    """Activations of several forwards do not join into one tensor."""


class TypedError(ActctxError, TypeError):
    """A tensor is not what its annotation in a `Schema`, or the model's config, says."""


class DataError(ActctxError, ValueError):
    """A data set is not what was asked for, its input is no input, or a file cannot be written."""


class LoadError(ActctxError, OSError):
    """The command line cannot load the model that was asked for."""


for _error in (ActctxError, *ActctxError.__subclasses__()):
    _error.__module__ = "actctx"  # where users find them
del _error
