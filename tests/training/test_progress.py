"""The rates that are shown and logged: over the time since the clock started, and only what is known."""

import io
import re
import time

import pytest

from alignx_jax.console import Screen
from alignx_jax.training import progress


class Clock:
    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)

    def slow(self, seconds: float, values):
        for value in values:
            self.now += seconds
            yield value


def run(monkeypatch, best_seconds: float | None) -> tuple[list[dict[str, float]], str]:
    """Five steps of 2 s, each of which waits 0.5 s for its batch; the clock restarts after the first."""
    clock, file = Clock(monkeypatch), io.StringIO()
    bar = progress.StageProgress(Screen(file=file), "stage", 0, 5, best_seconds)
    rates = []
    for step, _ in enumerate(bar.watch(clock.slow(0.5, range(5))), start=1):
        clock.now += 1.5
        rates.append(bar.step(step, {"tokens": 1000.0}))
        if step == 1:
            bar.restart_clock(1)
    return rates, file.getvalue()


def test_tokens_a_second_and_the_share_of_waiting(monkeypatch):
    (first, *rest), shown = run(monkeypatch, None)
    assert first == {"tokens_per_second": 500.0, "input_wait": 0.25}
    for one in rest:
        assert one == {"tokens_per_second": pytest.approx(500.0), "input_wait": pytest.approx(0.25)}
    assert "500 tokens/s" in shown and "MFU" not in shown


def test_mfu_is_the_time_at_the_peak_over_the_time_it_took(monkeypatch):
    (_, *rest), shown = run(monkeypatch, 0.9)
    assert [one["mfu"] for one in rest] == [pytest.approx(0.9 / 2)] * 4
    assert "MFU 45.0%" in shown


@pytest.mark.parametrize("width", [60, 80, 200])
def test_a_narrow_terminal_cuts_neither_the_step_nor_the_time_left(width):
    file = io.StringIO()
    screen = Screen(file=file, width=width, force_terminal=True, color_system=None)
    values = dict.fromkeys(("loss", "next_token", "contrastive", "language_matching"), 1.0) | {"tokens": 9.0}
    with progress.StageProgress(screen, "next-token only", 0, 12000) as bar:
        bar.step(11999, values)
    last = [line for line in file.getvalue().split("\x1b[2K") if "11999/12000" in line][-1]
    assert re.search(r"next-token only .*11999/12000 [-\d]+:[-\d]+:[-\d]+ loss 1.000", last)
    assert ("tokens/s" in last) == (width == 200)
