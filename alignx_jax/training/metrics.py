"""The metrics of a run: one JSON object a line, and TensorBoard."""

from __future__ import annotations

import json
import math
import os

from alignx_jax import storage


class MetricsLog:
    """`metrics.jsonl` and TensorBoard events. Continuing at a step drops what was written after it.

    `sync` before a checkpoint of the same step makes sure that nothing is missing up to it. In object storage, where
    nothing can be appended to, it brings both there, whole.

    Attributes:
      missing: steps up to that step that the file has no training record of, though it should.
    """

    def __init__(self, folder: storage.Path, step: int):
        from alignx_jax.training.board import Board  # 0.5 to 2.5 s, of the one process that writes

        kept = [record for record in _records(folder / "metrics.jsonl") if record["step"] <= step]
        self._folder, self._written = folder, storage.staging(folder)
        path = self._written / "metrics.jsonl"
        storage.write(path, "".join(f"{json.dumps(record)}\n" for record in kept))
        self.missing = sorted(set(range(1, step + 1)) - {r["step"] for r in kept if r["kind"] == "train"})
        self._file = path.open("a", encoding="utf-8")
        self._board = Board(self._written / "tensorboard", step + 1 if kept else 0)

    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        """One record, given to the system when this returns: it outlives the process. What is not finite is null."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"kind": kind, "step": step, **finite}) + "\n")
        self._file.flush()
        self._board.write(kind, step, {name: value for name, value in finite.items() if value is not None})

    def sync(self) -> None:
        """All records are on disk, or in object storage, when this returns: they outlive the machine."""
        os.fsync(self._file.fileno())
        self._board.flush()  # with an fsync of its own
        storage.publish(self._written, self._folder)

    def close(self) -> None:
        self._file.close()
        self._board.close()
        storage.publish(self._written, self._folder)


def read(folder: storage.Path, kind: str) -> list[dict]:
    """All records of one kind, in order."""
    return [record for record in _records(folder / "metrics.jsonl") if record["kind"] == kind]


def _records(path: storage.Path) -> list[dict]:
    """Of complete lines that can be read: a process killed while writing leaves half of one."""
    if not path.exists():
        return []
    content, found = path.read_bytes(), []
    for line in content[: content.rfind(b"\n") + 1].splitlines():
        try:
            record = json.loads(line)
            numbers = [value for name, value in record.items() if name != "kind"]
        except (ValueError, AttributeError, RecursionError):
            continue
        if type(record.get("step")) is int and isinstance(record.get("kind"), str) and all(map(_is_number, numbers)):
            found.append(record)
    return found


def _is_number(value: object) -> bool:
    return value is None or type(value) in (int, float)
