"""The metrics of a run: one JSON object a line, and TensorBoard."""

from __future__ import annotations

import json
import pathlib

from tensorboardX import SummaryWriter


class MetricsLog:
    """`metrics.jsonl` and TensorBoard events. Continuing at a step drops what was written after it."""

    def __init__(self, folder: pathlib.Path, step: int):
        path = folder / "metrics.jsonl"
        kept = [line for line in _lines(path) if json.loads(line)["step"] <= step]
        fresh = path.with_suffix(".new")
        fresh.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        fresh.replace(path)
        self._file = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        """One record, on disk when this returns."""
        self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        self._file.close()
        self._board.close()


def read(folder: pathlib.Path, kind: str) -> list[dict]:
    """All records of one kind, in order."""
    records = [json.loads(line) for line in _lines(folder / "metrics.jsonl")]
    return [record for record in records if record["kind"] == kind]


def _lines(path: pathlib.Path) -> list[str]:
    """Complete lines only: a process killed while writing leaves half of one."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return text[: text.rfind("\n") + 1].splitlines()
