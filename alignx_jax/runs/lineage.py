"""What a stage stands on, by digest of its contents: the weights that it began with, its data, its template.

One place decides what is the same: contents count, not where they lie. A stage's folder has it as `lineage.json`, an
export too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pydantic

from alignx_jax import console, storage
from alignx_jax.data import cache
from alignx_jax.exits import UserError
from alignx_jax.runs import saved

FILE = "lineage.json"
_LARGE = 2_000_000_000  # bytes, whose digest takes seconds
_BESIDE = "../"
_HINT = "restore it, or give another --run"
_STRICT = pydantic.ConfigDict(extra="forbid")


@dataclasses.dataclass(frozen=True)
class Origin:
    """A model's weights, at one moment."""

    __pydantic_config__ = _STRICT

    model: str
    """Where it was: `sample`, an absolute path, or `../stage1`, another stage of the same run."""
    weights: str
    """Digest of them."""
    step: int | None = None
    """Of the stage's checkpoint that is meant, if it is one."""


@dataclasses.dataclass(frozen=True)
class Content:
    """Of data, or of the template."""

    __pydantic_config__ = _STRICT

    kind: str
    source: str
    """As the configuration names it."""
    digest: str


@dataclasses.dataclass(frozen=True)
class Lineage:
    """Of a stage."""

    __pydantic_config__ = _STRICT

    start: Origin
    data: tuple[Content, ...]
    below: Origin | None = None
    """Of adapters: the model that has the weights which they are trained on."""


@dataclasses.dataclass(frozen=True)
class _Exported:
    """What is read back of an export's record."""

    weights: str


@functools.cache
def _adapter() -> pydantic.TypeAdapter[Lineage]:
    return pydantic.TypeAdapter(Lineage)


def text(lineage: Lineage) -> str:
    """What `read` reads."""
    return json.dumps(dataclasses.asdict(lineage), indent=2) + "\n"


def read(folder: storage.Path) -> Lineage:
    """Of a stage's folder.

    Raises:
      UserError: it is gone or damaged.
    """
    return _adapter().validate_python(saved.read(folder / FILE, Lineage, _HINT))


def damaged(folder: storage.Path, problem: str) -> UserError:
    """For raising."""
    return UserError(f"{folder / FILE} is damaged ({problem}); {_HINT}")


def place(model: str, folder: storage.Path) -> str:
    """Where a model is, for the record of the stage in `folder`: a run that is moved takes its own stages along."""
    if model == "sample":
        return model
    path, run = storage.absolute(storage.path(model)), storage.absolute(folder).parent
    return f"{_BESIDE}{path.name}" if path.parent == run else str(path)


def resolve(model: str, folder: storage.Path) -> str:
    """The path that `place` has made `model` of, now."""
    return str(folder.parent / model.removeprefix(_BESIDE)) if model.startswith(_BESIDE) else model


def digest(files: Sequence[pathlib.Path], kept: pathlib.Path) -> str:
    """Of the contents of files, whatever their names and places: SHA-256 of their sorted SHA-256, 20 hex digits.

    Args:
      kept: a folder where the digests of files are kept; one that has the same size, times and place is not read again.
    """
    record = kept.expanduser() / f"{cache.fingerprint([str(file.resolve()) for file in files])}.json"
    known: dict[str, list] = {}
    with contextlib.suppress(OSError, UserError):
        known = saved.read(record, dict[str, tuple[tuple[int, int, int, int], str]], "")
    states = {file: _state(file) for file in files}
    digests = {file: known[file.name][1] for file in files if known.get(file.name, [])[:1] == [states[file]]}
    unknown = [file for file in files if file not in digests]
    if (size := sum(states[file][0] for file in unknown)) > _LARGE:
        console.note(f"{files[0].parent}: reading its {size / 1e9:,.1f} GB of weights once, for their digest")
    with ThreadPoolExecutor(8) as pool:  # hashing lets other threads run
        digests |= zip(unknown, pool.map(cache.digest, unknown), strict=True)
    if unknown:
        with contextlib.suppress(OSError):  # then they are read again next time
            record.parent.mkdir(parents=True, exist_ok=True)
            storage.write(record, json.dumps({file.name: [states[file], digests[file]] for file in files}))
    return combined(digests.values())


def exported(folder: storage.Path) -> str | None:
    """Digest of the weights in the folder of an export; None where it has no record."""
    with contextlib.suppress(UserError):
        return saved.read(folder / FILE, _Exported, "")["weights"]
    return None


def combined(digests: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()[:20]


def _state(file: pathlib.Path) -> list[int]:
    """Size, times, and place on its disk."""
    about = file.stat()
    return [about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino]
