"""What every benchmark says of itself: the command, the machine, the versions, the day."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import statistics
import sys
from typing import Any

from rich.console import Console


def spread(values: list[float], digits: int) -> str:
    """Median and range."""
    return f"{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f}-{max(values):,.{digits}f})"


def of_this_run(name: str) -> dict[str, Any]:
    """Day, machine, versions, and the command `python -m benchmarks.<name>`, its paths by their last names."""
    shown = [argument if "/" not in argument else _last_name(argument) for argument in sys.argv[1:]]
    cores = len(os.sched_getaffinity(0))
    packages = "jax", "jaxlib", "libtpu", "torch", "numpy"
    return {
        "command": f"python -m benchmarks.{name} {shlex.join(shown)}".strip(),
        "date": str(datetime.date.today()),
        "machine": f"{_processor()}, {platform.machine()}, {cores} cores, load {os.getloadavg()[0]:.1f}",
        "versions": {k: importlib.metadata.version(k) for k in packages if _there(k)},
    }


def save(to: str | None, name: str, options: Any, results: dict[str, Any], console: Console) -> None:
    """Prints where and when `python -m benchmarks.<name>` ran; with a file, writes it there with the results."""
    facts = of_this_run(name)
    console.print(f"{facts['date']}, {facts['machine']}", highlight=False)
    if to:
        chosen = {k: v for k, v in dataclasses.asdict(options).items() if "/" not in str(v)}
        text = json.dumps(facts | {"options": chosen} | results, indent=1)
        pathlib.Path(to).write_text(text + "\n", encoding="utf-8")


def _last_name(argument: str) -> str:
    flag, _, value = argument.rpartition("=")
    return f"{flag}={pathlib.Path(value).name}" if flag else pathlib.Path(argument).name


def _processor() -> str:
    names = [x for x in pathlib.Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
    return names[0].partition(":")[2].strip() if names else platform.processor()


def _there(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
