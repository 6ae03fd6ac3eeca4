"""The errors of actctx, all below one base.

ActctxError
├── OptionError (ValueError)            an option of `capture`, `captures` or `Site` makes no sense
├── HookNameError (LookupError)         a name matches no hook point and no module
├── AxisError (LookupError)             a slice or a join names an axis that the site does not have
├── SelectionError (IndexError)         a position is outside its axis
├── OutputError (TypeError)             a site yields no tensor to capture
├── PlanError (RuntimeError)            a forward cannot be planned, since it depends on values
├── CaptureStateError (RuntimeError)    opened twice, closed while not open, shallowly copied
├── HooksRemovedError (RuntimeError)    the hooks of an open capture were removed
├── NeverFiredError (RuntimeError)      a site that was requested by name never fired
├── StoppedError (RuntimeError)         a stopped forward has no output and fills no cache
├── NotCapturedError (KeyError)         the buffer does not have what was requested
├── SeveralFiringsError (ValueError)    a site fired more than once in a forward
├── JoinError (ValueError)              activations of several forwards do not join
├── CapacityError (ValueError)          there are more activations than `capacity=` allows
├── TypedError (TypeError)              a tensor is not what its annotation or the config says
├── DataError (ValueError)              a data set, its input or a file is not valid
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
    """A position is outside its axis."""


class OutputError(ActctxError, TypeError):
    """A site yields no tensor to capture."""


class PlanError(ActctxError, RuntimeError):
    """A forward cannot be planned without running it."""


class CaptureStateError(ActctxError, RuntimeError):
    """A capture was opened twice or closed while not open, or a shallow copy of its model ran."""


class HooksRemovedError(ActctxError, RuntimeError):
    """The hooks of an open capture were removed by other code."""


class NeverFiredError(ActctxError, RuntimeError):
    """A site that was requested by name never fired, or never can."""


class StoppedError(ActctxError, RuntimeError):
    """The output of a stopped forward was used, or it was given a cache."""


class NotCapturedError(ActctxError, KeyError):
    """The buffer does not have what was requested."""


class SeveralFiringsError(ActctxError, ValueError):
    """A site fired more than once in a forward, so it is not one tensor."""


class CapacityError(ActctxError, ValueError):
    """There are more activations than `capacity=` allows."""


class JoinError(ActctxError, ValueError):
    """Activations of several forwards do not join into one tensor."""


class TypedError(ActctxError, TypeError):
    """A tensor is not what its annotation in a `Schema`, or the model's config, says."""


class DataError(ActctxError, ValueError):
    """A data set or its input is not valid, or a file cannot be written."""


class LoadError(ActctxError, OSError):
    """The command line cannot load the requested model."""


for _error in (ActctxError, *ActctxError.__subclasses__()):
    _error.__module__ = "actctx"  # where users find them
del _error
