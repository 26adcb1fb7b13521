"""TensorBoard's events of a stage. Imported by who writes some: tensorboardX takes half a second to import, and imports
torch where it is, for two more."""

from __future__ import annotations

import pathlib
import time

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

_FLUSH_SECONDS = 30  # TensorBoard is at most so far behind


class Board:
    """An event file. It is written here, not by the thread of `SummaryWriter`: a full disk kills that one, and then
    every write hangs."""

    def __init__(self, folder: pathlib.Path, first: int):
        """`first`: what TensorBoard has of this step and later ones is void."""
        folder.mkdir(exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"), f".{time.time_ns()}")
        self._flush_at = 0.0
        self._write(first, session_log=SessionLog(status=SessionLog.START))

    def _write(self, step: int, **content) -> None:
        self._writer.write_event(Event(wall_time=time.time(), step=step, **content))

    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._write(step, summary=scalar(f"{kind}/{name}", value))
        if time.monotonic() > self._flush_at:
            self._flush_at = time.monotonic() + _FLUSH_SECONDS
            self.flush()

    def flush(self) -> None:
        """With an fsync."""
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
