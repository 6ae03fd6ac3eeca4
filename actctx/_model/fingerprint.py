"""What a model is: its weights, its buffers and its settings, so that data of two are not mixed.

# NOTE [What is compared]
Every parameter and every buffer that is saved with the weights, to the bit; buffers that a model
computes when it is made, up to rounding; see the note on digests. Then what it computes with
beside them: the classes and attributes of its modules, its configs, adapters that are on, autocast,
and hooks of others that change what passes. A model that was compiled, in parts or as a whole, is
the one that it was before.

The fingerprint is one of what is saved. Data sets of before have nothing else, and theirs is one of
the parameters alone.
"""

import base64
import hashlib
import json
import zlib
from collections.abc import Collection, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeAlias

from torch import nn

from actctx._model.digest import bits_of, digest_of, is_alike, kind_of, sketched
from actctx._errors import DataError
from actctx._model.foreign_hooks import list_hooks
from actctx._model.offloaded import buffers_of, weights_of
from actctx._model.places import uncompiled
from actctx._model.settings import settings_of

Fact: TypeAlias = tuple[str, Any, Any]
"""What it is called, what it was, and what it is now."""

_COMPILED = "_orig_mod."
"""What `torch.compile` puts before the names of a module that it wraps."""

_MOST_BYTES = 2**28  # of settings that are unpacked

ANEW = (
    "a model of which a part is initialised at random when it is loaded, such as a head that was "
    "not saved, is another each time, so call torch.manual_seed() before loading it; a model in "
    "another dtype is another, too"
)
"""What to do where a model is the same and its weights are not."""

_NAMES = {
    "weights": "weight {!r}",
    "buffers": "buffer {!r}",
    "computed": "buffer {!r}",
    "modules": "class of {!r}",
    "functions": "function {!r}",
    "config": "setting {!r}",
    "attributes": "setting {!r}",
    "run": "{}",
}
"""The sections of a description, and how an entry is called in messages."""

_OPTIONAL = {"attributes", "run"}
"""Where an entry that only one has is no difference: attributes come with the first use."""

_OF_VERSIONS = {"computed", "modules", "config"}
"""Where an entry that only one has may be one of another version of a library."""


def describe_model(model: nn.Module) -> dict[str, str]:
    """Tell what a data set says of the model: its name, class, fingerprint and settings."""
    model = uncompiled(model)
    configs = [getattr(model, name, None) for name in ("cfg", "config")]
    names = [
        getattr(config, name, None)
        for config in configs
        for name in ("model_name", "_name_or_path")
    ]
    name = next((name for name in names if isinstance(name, str) and name), "")
    whole, parameters, tensors = _digests(model)
    settings = {"parameters": parameters, **tensors, **_volatile(model), **settings_of(model)}
    return {
        "name": name,
        "class": type(model).__name__,
        "fingerprint": whole,
        "settings": _packed({**settings, "hooks": list_hooks(model)}),
    }


def fingerprint(model: nn.Module) -> str:
    """Digest the weights of a model, and the buffers that are saved with them.

    Raises:
        OptionError: It has none, as on the meta device.

    """
    return _digests(uncompiled(model))[0]


def settled(described: Mapping[str, str], model: nn.Module, changing: set[str]) -> dict[str, str]:
    """Leave out of a description what the first forward changed: that is a state, no setting.

    Args:
        described: The model before its first forward.
        model: The model behind it.
        changing: The places whose hooks changed what passed.

    """
    model = uncompiled(model)
    found = _unpacked(described)
    now = {**_volatile(model), **settings_of(model)}
    states = []
    for section in ("buffers", "computed", "attributes"):
        was = found[section]
        for name in [*was, *now[section]]:
            if not is_alike(was.get(name), now[section].get(name)):
                was.pop(name, None)
                states.append(name)
    hooks = {
        place: [each if each in now_there else [each[0], ""] for each in there]
        for place, there in found["hooks"].items()
        for now_there in [list_hooks(model).get(place, [])]
    }
    states = sorted({*states})
    changed = {**found, "hooks": hooks, "states": states, "changing": sorted(changing)}
    return {**described, "settings": _packed(changed)}


def differences(
    was: Mapping[str, Any],
    now: Mapping[str, Any],
    *,
    versions_differ: bool,
    runs: bool = True,
    changing: Collection[str] = (),
    spared: Collection[str] = (),
) -> Iterator[Fact]:
    """Compare two descriptions of models.

    Args:
        was: What a data set says.
        now: What `describe_model` says.
        versions_differ: Whether another version of a library wrote the data set.
        runs: Whether it matters how the model is run: autocast, and hooks of others.
        changing: The places whose hooks have changed what passed, as far as it has run.
        spared: The names of settings that may differ.

    Raises:
        DataError: What the data set says is damaged.

    """
    here = _unpacked(now)
    if "settings" not in was:
        if was["fingerprint"] != here["parameters"]:
            yield "model's fingerprint", was["fingerprint"], here["parameters"]
        return
    there = _unpacked(was)
    states = {*there.get("states", ())}
    for section, name in _NAMES.items():
        if section == "run" and not runs:
            continue
        old, new = there.get(section, {}), here[section]
        may_lack = section in _OPTIONAL or (versions_differ and section in _OF_VERSIONS)
        for key in dict.fromkeys((*old, *new)):
            if key in states or key in spared or (may_lack and (key not in old or key not in new)):
                continue
            if not is_alike(old.get(key), new.get(key)):
                yield name.format(key), *_shown(old.get(key), new.get(key))
    if runs:
        yield from _of_hooks(there, here, changing)


def _of_hooks(
    there: Mapping[str, Any], here: Mapping[str, Any], changing: Collection[str]
) -> Iterator[Fact]:
    for place in dict.fromkeys((*there.get("changing", ()), *changing)):
        old, new = there["hooks"].get(place, []), here["hooks"].get(place, [])
        known = [  # a digest that changes by itself tells nothing
            [name, digest if len(old) == len(new) and old[number][1] else ""]
            for number, (name, digest) in enumerate(new)
        ]
        if old != known:
            yield f"hooks on the {place}", _names_of(old), _names_of(new)


def _names_of(hooks: list[list[str]]) -> list[str]:
    return [" ".join(filter(None, hook)) for hook in hooks]


def _shown(*values: Any) -> list[Any]:
    """Show two values, of tensors that are the same up to rounding what tells them apart."""
    return [value[0] + f" ~{value[1]}" if _is_sketch(value) else value for value in values]


def _is_sketch(value: Any) -> bool:
    return isinstance(value, list) and [type(each) for each in value] == [str, float]


def _digests(model: nn.Module) -> tuple[str, str, dict[str, dict[str, str]]]:
    """Digest all that is saved, the parameters alone, and each of them."""
    digest = hashlib.sha256()
    parameters: dict[str, str] = {}
    for name, weights in weights_of(model):
        name, bits = name.replace(_COMPILED, ""), bits_of(weights)
        parameters[name] = f"{kind_of(weights)} {digest_of(bits)}"
        digest.update(f"{name} {tuple(weights.shape)} {weights.dtype} {bits}\n".encode())
    alone = digest.hexdigest()[:16]
    for name, buffer, is_saved in buffers_of(model):
        if is_saved:
            facts = f"buffer {name.replace(_COMPILED, '')} {tuple(buffer.shape)} {buffer.dtype}"
            digest.update(f"{facts} {bits_of(buffer)}\n".encode())
    return digest.hexdigest()[:16], alone, {"weights": parameters}


def _volatile(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Describe the buffers, which a forward may change."""
    saved: dict[str, Any] = {}
    computed: dict[str, Any] = {}
    for name, buffer, is_saved in buffers_of(model):
        key = name.replace(_COMPILED, "")
        if is_saved:
            saved[key] = f"{kind_of(buffer)} {digest_of(bits_of(buffer))}"
        elif not _is_dynamic(model, name):
            computed[key] = sketched(buffer)
    return {"buffers": saved, "computed": computed}


def _is_dynamic(model: nn.Module, name: str) -> bool:
    """Tell whether a buffer is of rotary frequencies that follow the longest sequence so far."""
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    kind = str(getattr(module, "rope_type", ""))
    is_kept = hasattr(module, key.replace("inv_freq", "original_inv_freq"))
    return key.endswith("inv_freq") and is_kept and ("dynamic" in kind or "longrope" in kind)


def _packed(settings: Mapping[str, Any]) -> str:
    written = json.dumps(settings, separators=(",", ":")).encode()
    return base64.b64encode(zlib.compress(written, 9)).decode()


def _unpacked(described: Mapping[str, Any]) -> dict[str, Any]:
    try:
        packed = base64.b64decode(described["settings"], validate=True)
        unpacked = zlib.decompressobj().decompress(packed, _MOST_BYTES)
        found = json.loads(unpacked)
        kinds = {**dict.fromkeys(_NAMES, dict), "hooks": dict, "states": list, "changing": list}
        if not all(isinstance(found.get(key, kind()), kind) for key, kind in kinds.items()):
            raise TypeError("a section is of another kind")
    except (ValueError, TypeError, AttributeError, zlib.error) as error:
        raise DataError(
            f"what the data set says of its model is damaged ({error}), so that it cannot be "
            "compared; read it as it is, or give another path"
        ) from error
    return dict(found)


def versions() -> dict[str, str]:
    """Tell the versions of what a data set depends on."""
    found = {}
    for package in ("actctx", "torch", "transformer_lens", "transformers", "peft", "pylance"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
