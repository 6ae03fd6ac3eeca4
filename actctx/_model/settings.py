"""What a model computes with besides its weights: classes, attributes, configs and modes.

# NOTE [What counts]
Numbers, flags, names and functions in modules and configs, under the model's names. Not included:
where a model came from, and what only its tokenizer, loss or generation uses. Private attributes
and tensors of library modules are not included, since they are caches and copies. Whatever the
first forward changes is not included either: it is state, such as a count.
"""

import argparse
import dataclasses
import inspect
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from actctx._model.offloaded import input_device
from actctx._model.places import is_hook_point
from actctx._model.plain_values import (
    LIBRARIES,
    SKIPPED,
    is_foreign,
    name_function,
    package_of,
    plain,
)

_OF_TORCH = {*vars(nn.Module())}
_ADAPTERS = {"_active_adapter", "_disable_adapters", "_adapters_disabled"}
"""Private attributes of peft that no public attribute shows."""

_OF_LIBRARIES = (
    *("_hf", "_is_hf", "_is_torch", "_is_fsdp", "_fsdp", "_ddp", "_torch"),
    *("_compiled", "_old_forward"),
)
"""Prefixes of private attributes that libraries add to other modules."""

_CONFIGS = {"config", "cfg", "args", "hparams"}
_IMPLEMENTATIONS = {
    "_attn_implementation": "attention implementation",
    "_experts_implementation": "experts implementation",
}
_NO_SETTINGS = {
    # where it came from, and with what
    *("name_or_path", "model_name", "tokenizer_name", "tokenizer_class", "base_model_name_or_path"),
    *("transformers_version", "architectures", "architecture", "original_architecture", "auto_map"),
    *("model_type", "revision", "from_checkpoint", "checkpoint_index", "checkpoint_label_type"),
    *("checkpoint_value", "trust_remote_code", "peft_version", "name"),
    # where it runs
    *("device", "n_devices", "hf_device_map", "device_map", "is_parallelizable"),
    # how it was made
    *("seed", "init_mode", "init_weights", "initializer_range", "initializer_factor", "n_params"),
    # what it returns, or how it is trained
    *("use_cache", "return_dict", "output_hidden_states", "output_attentions", "loss_type"),
    *("output_router_logits", "router_aux_loss_coef", "id2label", "label2id", "problem_type"),
    *("gradient_checkpointing", "torchscript", "inference_mode", "generation_config"),
    *(
        "task_specific_params",
        "model_card_data",
        "warnings_issued",
        "inplace",
        "all_tied_weights_keys",
    ),
    # what a tokenizer does
    *("default_prepend_bos", "tokenizer_prepends_bos", "tokenizer_appends_eos"),
    *("default_padding_side", "bos_token_id"),
    # traces of use: hooks, a cache, the longest sequence so far
    *("context_level", "is_caching", "max_seq_len_cached"),
}
_SECRETS = ("token", "secret", "password", "api_key", "credentials")


def settings_of(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Describe what a model computes with besides its weights, in sections.

    Args:
        model: The model, not as `torch.compile` wraps it.

    """
    modules = [(without_compiled(name), module) for name, module in _counted(model)]
    run: dict[str, Any] = {}
    attributes: dict[str, Any] = {}
    config: dict[str, Any] = {}
    seen: set[int] = set()
    roots = [("", model), ("", getattr(model, "original_model", None)), *modules]
    for name, module in roots:
        for key, value in _configs(module):
            _describe_config(_joined(name, key), value, seen, config, run)
    for name, module in modules:
        for key, value in _attributes(module):
            attributes[_joined(name, key)] = value
    run["float32 matmul precision"] = _matmul_precision()
    run["autocast"] = _autocast(model)
    run["modules in training mode"] = [name for name, module in modules if _is_training(module)]
    return {
        "python": {"version": ".".join(map(str, sys.version_info[:2]))},
        "modules": {name: type(module).__name__ for name, module in modules if name},
        "functions": dict(_replaced(modules)),
        "config": config,
        "attributes": attributes,
        "run": run,
    }


def _counted(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if not is_hook_point(module) and "_orig_mod" not in module._modules:
            yield name, module


def without_compiled(name: str) -> str:
    """Remove from a name what `torch.compile` adds to it."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _joined(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """List the settings among the attributes of a module."""
    is_ours = package_of(type(module)) not in LIBRARIES
    for key, value in vars(module).items():
        if key in _OF_TORCH or not _is_setting(key) or _is_config(key, value):
            continue
        is_hidden = key.startswith(_OF_LIBRARIES if is_ours else "_")
        if is_hidden and key not in _ADAPTERS:
            continue
        is_method = inspect.isroutine(value) and hasattr(type(module), key)
        found = SKIPPED if is_method else plain(value, tensors=is_ours)
        if found is not SKIPPED:
            yield key, found


def _replaced(modules: list[tuple[str, nn.Module]]) -> Iterator[tuple[str, str]]:
    """List the methods that were replaced on a module itself."""
    for name, module in modules:
        for key, value in vars(module).items():
            is_method = inspect.isroutine(getattr(type(module), key, None)) and callable(value)
            if is_method and is_foreign(value):
                yield _joined(name, key), name_function(value)


def _is_setting(key: str) -> bool:
    return key not in _NO_SETTINGS and not key.removeprefix("hf_").endswith(_SECRETS)


def _configs(module: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(module, nn.Module):
        for key, each in vars(module).items():
            if _is_setting(key) and _is_config(key, each):
                yield key, each


def _is_config(key: str, value: Any) -> bool:
    if not hasattr(value, "__dict__") or callable(value) or isinstance(value, type | Tensor):
        return False
    is_plain = isinstance(value, argparse.Namespace | types.SimpleNamespace)
    is_known = is_plain or hasattr(value, "to_dict") or dataclasses.is_dataclass(value)
    return is_known or key in _CONFIGS


def _describe_config(
    name: str, value: Any, seen: set[int], config: dict[str, Any], run: dict[str, Any]
) -> None:
    if id(value) in seen:
        return
    seen.add(id(value))
    for key, label in _IMPLEMENTATIONS.items():
        if isinstance(found := getattr(value, key, None), str):
            run[f"{label} of {name}"] = found
    is_of_transformers = hasattr(value, "model_type")
    for key, each in vars(value).items():
        # The dtype is that of the weights, whatever the config says; TransformerLens' config
        # counts.
        is_stale = key == "torch_dtype" or (key == "dtype" and is_of_transformers)
        if key.startswith("_") or is_stale or not _is_setting(key):
            continue
        if _is_config(key, each):
            _describe_config(f"{name}.{key}", each, seen, config, run)
        elif (found := plain(each, tensors=True)) is not SKIPPED:
            config[f"{name}.{key}"] = found


def _autocast(model: nn.Module) -> str | None:
    device = input_device(model).type
    try:
        return str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None
    except RuntimeError:  # of a device that has none
        return None


def _matmul_precision() -> str:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # set by a newer interface, one for each backend
        return str(torch.backends.cuda.matmul.fp32_precision)


def _is_training(module: nn.Module) -> bool:
    """Return whether a module computes as in training, apart from dropout, which is refused."""
    if not module.training or any("drop" in key for key in vars(module)):
        return False
    code = getattr(type(module).forward, "__code__", None)
    is_dropout = isinstance(module, nn.modules.dropout._DropoutNd)
    return code is not None and "training" in code.co_names and not is_dropout
