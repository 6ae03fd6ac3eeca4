"""Identify a model by its weights, buffers and settings, so that data of two models are not mixed.

# NOTE [What it covers]
Every parameter and every buffer that is saved with the weights, exactly; buffers that a model
computes when it is created, up to rounding (see the note on digests). Then everything else that it
computes with: classes and attributes of its modules, its configs, active adapters, autocast, and
hooks of others. Compiling a model, in parts or as a whole, does not change its identity.

The fingerprint covers what is saved with the weights. If no buffers are, it covers the parameters
alone, which is all that data sets of earlier versions have.
"""

import hashlib
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

from torch import Tensor, nn

from actctx._model.digest import bits_of, digest_of, is_alike, kind_of, sketched
from actctx._model.foreign_hooks import list_hooks
from actctx._model.offloaded import buffers_of, weights_of
from actctx._model.places import uncompiled
from actctx._model.same_model import packed, unpacked
from actctx._model.settings import settings_of, without_compiled


def describe_model(model: nn.Module) -> dict[str, str]:
    """Describe the model for a data set: its name, class, fingerprint and settings.

    Raises:
        OptionError: Its weights are on the meta device, and nowhere else.

    """
    model = uncompiled(model)
    configs = [getattr(model, name, None) for name in ("cfg", "config")]
    names = [
        getattr(config, name, None)
        for config in configs
        for name in ("model_name", "_name_or_path")
    ]
    name = next((name for name in names if isinstance(name, str) and name), "")
    weights, buffers = _weights(model), _buffers(model)
    settings = {
        "parameters": _hashed(weights),
        "weights": {each.name: each.shown for each in weights},
        **buffers.sections,
        **settings_of(model),
        "hooks": list_hooks(model),
    }
    return {
        "name": name,
        "class": type(model).__name__,
        "fingerprint": _hashed([*weights, *buffers.saved]),
        "settings": packed(settings),
    }


def fingerprint(model: nn.Module) -> str:
    """Digest the weights of a model, and the buffers that are saved with them.

    Raises:
        OptionError: Its weights are on the meta device, and nowhere else.

    """
    model = uncompiled(model)
    return _hashed([*_weights(model), *_buffers(model).saved])


def settled(described: Mapping[str, str], model: nn.Module, changing: set[str]) -> dict[str, str]:
    """Remove from a description what the first forward changed: that is state, not a setting.

    Args:
        described: The model before its first forward.
        model: The model behind it.
        changing: The places whose hooks changed values.

    """
    model = uncompiled(model)
    found, hooks = unpacked(described), list_hooks(model)
    now = {**_buffers(model).sections, **settings_of(model)}
    states = [
        name
        for section in ("buffers", "computed", "attributes")
        for name in dict.fromkeys((*found[section], *now[section]))
        if not is_alike(found[section].get(name), now[section].get(name))
    ]
    for section in ("buffers", "computed", "attributes"):
        found[section] = {name: each for name, each in found[section].items() if name not in states}
    # Hooks that only read are dropped; of a hook with state, only the name is kept.
    found["hooks"] = {
        place: [each if each in hooks.get(place, []) else [each[0], ""] for each in there]
        for place, there in found["hooks"].items()
        if place in changing
    }
    settings = packed({**found, "states": states})
    return {**described, "settings": settings}


class _Digested(NamedTuple):
    """A tensor by its name: the description shown to users, and the digest."""

    name: str
    shown: str
    line: str


class _Buffers(NamedTuple):
    """The buffers of a model: those that are saved, and the sections of all of them."""

    saved: list[_Digested]
    sections: dict[str, dict[str, Any]]


def _weights(model: nn.Module) -> list[_Digested]:
    return [_digested(name, weights) for name, weights in weights_of(model)]


def _buffers(model: nn.Module) -> _Buffers:
    saved: list[_Digested] = []
    computed: dict[str, Any] = {}
    for name, buffer, is_saved in buffers_of(model):
        if is_saved:
            saved.append(_digested(name, buffer, kind="buffer "))
        elif not _is_dynamic(model, name):
            computed[without_compiled(name)] = sketched(buffer)
    sections = {"buffers": {each.name: each.shown for each in saved}, "computed": computed}
    return _Buffers(saved, sections)


def _digested(name: str, weights: Tensor, kind: str = "") -> _Digested:
    name, bits = without_compiled(name), bits_of(weights)
    line = f"{kind}{name} {tuple(weights.shape)} {weights.dtype} {bits}\n"
    return _Digested(name, f"{kind_of(weights)} {digest_of(bits)}", line)


def _hashed(digested: Iterable[_Digested]) -> str:
    lines = "".join(each.line for each in digested)
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def _is_dynamic(model: nn.Module, name: str) -> bool:
    """Return whether a buffer is of rotary frequencies that follow the longest sequence so far."""
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    kind = str(getattr(module, "rope_type", ""))
    is_kept = hasattr(module, key.replace("inv_freq", "original_inv_freq"))
    return key.endswith("inv_freq") and is_kept and ("dynamic" in kind or "longrope" in kind)


def versions() -> dict[str, str]:
    """Return the versions of what a data set depends on."""
    found = {}
    for package in ("actctx", "torch", "transformer_lens", "transformers", "peft", "pylance"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
