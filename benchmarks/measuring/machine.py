"""Describe the machine and the time of a measurement."""

import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import actctx

LIBRARIES = (
    "torch",
    "transformer_lens",
    "transformers",
    "nnsight",
    "torchlens",
    "sae_lens",
    "pylance",
    "datasets",
)


def machine(device: str = "cpu") -> dict[str, str]:
    """Describe the machine, its accelerator if that is the device, the software, and the time.

    Whatever is missing or unknown is left out.
    """
    found = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": _line("/proc/cpuinfo", r"model name\s+: (.+)") or platform.processor(),
        "cores": str(os.cpu_count()),
        "memory": _memory(),
        **_accelerator(torch.device(device)),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "actctx": " ".join(filter(None, (actctx.__version__, _commit()))),
        **{library: _version(library) for library in LIBRARIES},
    }
    return {what: each for what, each in found.items() if each}


def load() -> float | None:
    """Return how many processes were ready to run in the last minute; None if unknown."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _accelerator(device: torch.device) -> dict[str, str]:
    if device.type == "cpu":
        return {}
    library = torch.get_device_module(device)
    name = library.get_device_name(device) if hasattr(library, "get_device_name") else device.type
    return {"accelerator": name, "cuda": torch.version.cuda or ""}


@cache
def _commit() -> str:
    """Return the commit of this clone, and whether files differ from it."""
    folder = Path(__file__).parents[2]
    if not (folder / ".git").exists():
        return ""

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["git", *arguments]
        return subprocess.run(command, check=False, capture_output=True, cwd=folder, text=True)

    try:
        commit = git("rev-parse", "--short", "HEAD").stdout.strip()
        changed = git("diff", "--quiet", "HEAD", "--", "actctx", "benchmarks/*.py").returncode
    except OSError:  # there is no git
        return ""
    return f"{commit}{' and changes' if changed else ''}" if commit else ""


def _memory() -> str:
    found = _line("/proc/meminfo", r"MemTotal:\s+(\d+) kB")
    return f"{int(found) / 2**20:.1f} GiB" if found else ""


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return ""


def _line(path: str, pattern: str) -> str | None:
    file = Path(path)
    found = re.search(pattern, file.read_text()) if file.exists() else None
    return found[1] if found else None
