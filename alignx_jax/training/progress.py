"""What a person sees while a stage runs: a live line on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table
from rich.text import Text

from alignx_jax.console import Screen, say

SHORT = {"loss": "loss", "next_token": "next-token", "contrastive": "contrastive", "language_matching": "matching"}
Batch = TypeVar("Batch")
_WIDE = 110  # columns of a terminal that has room for a bar
_LINES = 20  # a run prints about this many lines where there is no terminal


def losses(values: dict[str, float]) -> str:
    return "  ".join(f"{name} {values[key]:.3f}" for key, name in SHORT.items() if key in values)


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class _Cut(ProgressColumn):
    """The one column that gets shorter on a narrow terminal."""

    def render(self, task: Task) -> Text:
        return Text(task.fields["text"], no_wrap=True, overflow="ellipsis")


class StageProgress:
    """Progress of one stage's steps, from `first` to `last`.

    Args:
      best_seconds: what a step's model FLOPs take at the devices' peak, for the MFU; None where that is not known.
    """

    def __init__(self, console: Screen, title: str, first: int, last: int, best_seconds: float | None = None):
        self._console, self._title, self._first, self._last = console, title, first, last
        self._best_seconds, self._waited = best_seconds, 0.0
        self._every = max(1, (last - first) // _LINES)
        self._tokens, self._start = 0.0, time.monotonic()
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            *([BarColumn(20, table_column=Column(no_wrap=True))] if console.width >= _WIDE else []),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TimeRemainingColumn(table_column=Column(no_wrap=True)),
            _Cut(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task(title, total=last, completed=first, text="compiling")

    def __enter__(self) -> StageProgress:
        self._bar.start()
        return self

    def __exit__(self, *error) -> None:
        self._bar.stop()

    def restart_clock(self, step: int) -> None:
        """Called after the first step, so that compilation does not count as training time."""
        self._first, self._tokens, self._waited, self._start = step, 0.0, 0.0, time.monotonic()

    def watch(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """`batches`; measures how long a step waits for its own."""
        batches = iter(batches)
        while True:
            asked = time.monotonic()
            batch = next(batches, None)
            self._waited += time.monotonic() - asked
            if batch is None:
                return
            yield batch

    def step(self, step: int, metrics: dict[str, float]) -> dict[str, float]:
        """Shows a finished step. Returns, since the clock started: label tokens a second, the share of the time that
        steps waited for their batches, and the MFU (docs/plan.md) where the devices' peak is known."""
        self._tokens += 0.0 if metrics.get("skipped") else metrics["tokens"]
        elapsed = max(time.monotonic() - self._start, 1e-9)
        speed = self._tokens / elapsed
        rates = {"tokens_per_second": speed, "input_wait": min(self._waited / elapsed, 1.0)}
        text = f"{losses(metrics)}  {speed:,.0f} tokens/s"
        if self._best_seconds and step > self._first:
            rates["mfu"] = self._best_seconds * (step - self._first) / elapsed
            text += f"  MFU {rates['mfu']:.1%}"
        self._bar.update(self._task, completed=step, text=text)
        if self._console.is_terminal:
            self._console.moved()
        elif step % self._every == 0 or step == self._last:
            left = elapsed / max(step - self._first, 1) * (self._last - step)
            self.note(f"{self._title} {step}/{self._last}  {text}  {duration(left)} left")
        return rates

    def note(self, text: str) -> None:
        say(self._console, text)


def change_table(title: str, before: dict[str, float], after: dict[str, float]) -> Table:
    """Validation losses before and after training, with their differences."""
    table = Table(title=title, title_justify="left")
    for name in ("", "before", "after", "change"):
        table.add_column(name, justify="right" if name else "left")
    for key, name in SHORT.items():
        if key in before and key in after:
            change = after[key] - before[key]
            table.add_row(name, f"{before[key]:.4f}", f"{after[key]:.4f}", f"{change:+.4f}")
    return table
