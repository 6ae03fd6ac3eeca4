"""Make inputs of a few sizes for a model, to see what grows: tokens, images or sound."""

import functools
import inspect
import itertools
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from actctx._model.axes import hugging_face_config

Call = tuple[tuple[Any, ...], dict[str, Any]]

SEQUENCES = (2, 3)
"""The number of sequences of a call, and of a call with more."""

MANY = 13
"""The number of sequences of a call with more sequences than positions."""

_STEP = 4
"""The positions of a call are a multiple of this, unless a model attends in windows."""

_ANY_SIDE = 64
"""The height and width of an image for a model that takes any."""

_TARGET, _LONGER = 5, 7
"""The number of positions of a decoder in an encoder-decoder."""


@dataclass(frozen=True)
class Sample:
    """Calls of a model that differ in one size each.

    Attributes:
        grown: What has grown in each call after the first: `"batch"`, `"pos"`, and `"target"`, the
            positions of a decoder in an encoder-decoder. `"many"` means more sequences than
            positions, since a custom module may depend on that.
        calls: Makes the calls for a copy of the model, and may change on it what fixes a size.
        is_of_images: Whether it consists of images.

    """

    grown: tuple[str, ...]
    calls: Callable[[Any], Iterator[Call]]
    is_of_images: bool = False


def samples_of(model: nn.Module) -> list[Sample]:
    """List inputs that a model may accept, the most informative first.

    It may accept none of them.
    """
    whole: Any = getattr(model, "original_model", model)
    config: Any = hugging_face_config(model)
    reads = getattr(whole, "main_input_name", "input_ids")
    named = [*inspect.signature(whole.forward).parameters]
    if reads not in named:
        reads = next((name for name in named if name in _READERS), "input_ids")
    if config is None and "decoder_input_ids" in named:
        config = _CUSTOM_WITH_DECODER
    return [*_READERS.get(reads, _of_tokens)(config)]


_CUSTOM_WITH_DECODER = types.SimpleNamespace(is_encoder_decoder=True)
"""What is known of a custom model that also takes tokens for a decoder."""


def _of_tokens(config: Any) -> Iterator[Sample]:
    windows = getattr(config, "attention_window", None) or _STEP
    step = max(windows) if isinstance(windows, list | tuple) else int(windows)
    usual, longer = 2 * step, 3 * step
    longest = getattr(config, "max_position_embeddings", None)
    if step == _STEP and isinstance(longest, int) and 1 < longest < longer:
        usual, longer = longest - 1, longest
    yield _growing(config, _ids, usual, longer)


def _ids(batch: int, pos: int) -> Int64[Tensor, "batch pos"]:
    """Make token ids that are in every vocabulary, and not all equal."""
    return torch.arange(batch * pos).view(batch, pos) % 7 + 1


def _of_images(config: Any) -> Iterator[Sample]:
    size, patch = getattr(config, "image_size", None), _side(getattr(config, "patch_size", None))
    side = _ANY_SIDE if size is None else _side(size)
    if not side:
        return
    if patch:
        sizes, each = (side, side + patch), (side // patch, side // patch + 1)
    else:  # several stages, each of which divides the size further
        sizes, each = (side, 2 * side), (0, 0)
    channels = getattr(config, "num_channels", 3)
    positions = (each[0] ** 2, each[1] ** 2)
    images = _fixed(config, lambda b, s: torch.zeros(b, channels, s, s), sizes, positions)
    yield from (replace(sample, is_of_images=True) for sample in images)


def _of_sound(config: Any) -> Iterator[Sample]:
    mels, longest = getattr(config, "num_mel_bins", None), getattr(config, "max_length", None)
    if mels and longest and hasattr(config, "time_stride"):  # a spectrogram, cut into patches
        high = (mels - config.patch_size) // config.frequency_stride + 1
        wide = (longest - config.patch_size) // config.time_stride + 1
        sizes = (longest, longest + config.time_stride)
        patches = (high * wide, high * (wide + 1))
        yield from _fixed(config, lambda b, s: torch.zeros(b, s, mels), sizes, patches)
    else:
        yield _growing(config, torch.zeros, 4000, 6000)


def _of_features(config: Any) -> Iterator[Sample]:
    mels, frames = getattr(config, "num_mel_bins", None), getattr(config, "max_source_positions", 0)
    if mels and frames:  # Whisper and similar models halve the frames
        sizes, positions = (2 * frames, 2 * frames + 8), (frames, frames + 4)
        yield from _fixed(config, lambda b, s: torch.zeros(b, mels, s), sizes, positions)
    names = ("feature_projection_input_dim", "input_feat_per_channel", "num_mel_bins", "input_dim")
    for width in filter(None, (getattr(config, name, None) for name in names)):
        yield _growing(config, functools.partial(_features, width=width), 160, 240)


def _features(batch: int, pos: int, width: int) -> Float[Tensor, "batch pos width"]:
    return torch.zeros(batch, pos, width)


_READERS: Mapping[str, Callable[[Any], Iterator[Sample]]] = {
    "input_ids": _of_tokens,
    "pixel_values": _of_images,
    "input_values": _of_sound,
    "input_features": _of_features,
}


def _side(size: Any) -> int | None:
    """Return a size as one number, also if it is given as a pair."""
    sides = {*size} if isinstance(size, list | tuple) else {size}
    side = sides.pop() if len(sides) == 1 else None
    return side if isinstance(side, int) and side > 0 else None


def _growing(config: Any, make: Callable[[int, int], Any], usual: int, longer: int) -> Sample:
    """Yield inputs that may have any length."""
    return _sample(config, make, (usual, longer), lambda _hollow: None)


def _fixed(
    config: Any,
    make: Callable[[int, int], Any],
    sizes: tuple[int, int],
    positions: tuple[int, int],
) -> Iterator[Sample]:
    """Yield inputs of a size that the model may fix, by a table of positions."""
    usual, _ = sizes
    yield _sample(config, make, sizes, lambda _hollow: None)
    yield _sample(config, make, sizes, lambda hollow: _stretch(hollow, sizes, positions))
    yield _sample(config, make, (usual, usual), lambda _hollow: None)


def _sample(
    config: Any,
    make: Callable[[int, int], Any],
    sizes: tuple[int, int],
    prepare: Callable[[Any], None],
) -> Sample:
    usual, larger = sizes
    is_custom = config is None or config is _CUSTOM_WITH_DECODER
    has_decoder = bool(getattr(config, "is_encoder_decoder", False))

    def calls(hollow: Any) -> Iterator[Call]:
        call = functools.partial(_call, hollow, make, has_decoder=has_decoder)
        few, more = SEQUENCES
        yield call(few, usual)
        yield call(more, usual)
        if has_decoder:
            yield call(few, usual, target=_LONGER)
        if is_custom:
            yield call(MANY, usual)
        if larger != usual:
            prepare(hollow)
            yield call(few, larger)

    also = {"target": has_decoder, "many": is_custom, "pos": larger != usual}
    return Sample(("batch", *(name for name, is_so in also.items() if is_so)), calls)


def _call(
    hollow: Any,
    make: Callable[[int, int], Any],
    batch: int,
    size: int,
    *,
    has_decoder: bool,
    target: int = _TARGET,
) -> Call:
    named = inspect.signature(hollow.forward).parameters
    like = next(itertools.chain(hollow.parameters(), hollow.buffers()), torch.empty(0))
    first = make(batch, size).to(like.device)
    given: dict[str, Any] = {}
    if first.is_floating_point():
        first = first.to(like.dtype)
    elif "attention_mask" in named:  # without one, some models look for padding among the ids
        given["attention_mask"] = torch.ones_like(first)
    if "use_cache" in named:
        given["use_cache"] = False
    if has_decoder and ("decoder_input_ids" in named or hasattr(hollow, "original_model")):
        given["decoder_input_ids"] = _ids(batch, target).to(like.device)
    return (first,), given


def _stretch(hollow: nn.Module, sizes: tuple[int, int], positions: tuple[int, int]) -> None:
    """Make a copy without values accept inputs of another size than its tables allow."""
    of = {"image_size": sizes, "max_length": sizes}
    of |= {"max_source_positions": positions, "num_patches": positions}
    for module in hollow.modules():
        config = getattr(module, "config", None)
        for name, (usual, larger) in of.items():
            changes = {usual: larger, (usual, usual): (larger, larger)}
            for holder in (module, config):
                value = vars(holder).get(name) if hasattr(holder, "__dict__") else None
                value = tuple(value) if isinstance(value, list) else value
                if value in changes:
                    setattr(holder, name, changes[value])
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                longer = None if tensor is None else _longer(tensor.shape, *positions)
                if tensor is not None and longer is not None:
                    tensors[name] = tensor.new_empty(longer)  # type: ignore[assignment]
                    if isinstance(module, nn.Embedding):
                        module.num_embeddings = longer[0]


def _longer(shape: torch.Size, usual: int, larger: int) -> list[int] | None:
    """Return the shape of a longer table of positions, a few of which do not belong to patches."""
    for dim in range(min(2, len(shape) - (shape[:1] != (1,)))):
        if 0 <= shape[dim] - usual <= 2 and all(size == 1 for size in shape[:dim]):  # noqa: PLR2004
            return [*shape[:dim], shape[dim] + larger - usual, *shape[dim + 1 :]]
    return None
