"""The metrics file: no gap and no duplicate however a run was stopped."""

import json
import os

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from alignx_jax.training import metrics


def log(folder, first: int, last: int, start: int | None = None) -> metrics.MetricsLog:
    """Writes steps `first` to `last`, as a run does that continues at `start`."""
    made = metrics.MetricsLog(folder, first - 1 if start is None else start)
    for step in range(first, last + 1):
        made.write("train", step, {"loss": float(step)})
    return made


def steps(folder) -> list[int]:
    return [record["step"] for record in metrics.read(folder, "train")]


def test_continuing_drops_what_came_after_the_checkpoint(tmp_path):
    log(tmp_path, 1, 7).close()
    log(tmp_path, 5, 6).close()
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6]
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]


def test_begun_again_before_the_first_checkpoint(tmp_path):
    first = metrics.MetricsLog(tmp_path, 0)
    first.write("validation", 0, {"loss": 9.0})
    first.close()
    log(tmp_path, 1, 3).close()
    log(tmp_path, 1, 2).close()
    assert steps(tmp_path) == [1, 2] and [r["step"] for r in metrics.read(tmp_path, "validation")] == [0]
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("train/loss")] == [1, 2]
    assert [event.step for event in board.Scalars("validation/loss")] == [0]


@pytest.mark.parametrize(
    "tail",
    [
        b'{"kind": "tra',
        b'{"kind": "train", "st\xff\xfe\n',
        b'{"kind": "train", "step": 4, "l\xffss": 1.0}\n',
        b"7\n",
        b'{"step": 4}\n',
        b"\x00\x00\n",
        b'{"kind": "train", "step": 4, "loss": "2"}\n',
        b'{"kind": "train", "step": true, "loss": 2}\n',
        b"[" * 100_000 + b"\n",
    ],
)
def test_half_a_line_and_a_spoilt_one_are_left_out(tmp_path, tail):
    log(tmp_path, 1, 3).close()
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(tail)
    assert steps(tmp_path) == [1, 2, 3]
    assert log(tmp_path, 4, 4).missing == [] and steps(tmp_path) == [1, 2, 3, 4]


def test_steps_that_are_missing_are_known(tmp_path):
    log(tmp_path, 1, 6).close()
    file = tmp_path / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:2] + lines[3:5]))
    assert metrics.MetricsLog(tmp_path, 6).missing == [3, 6]


def test_everything_is_on_disk_after_sync(tmp_path, monkeypatch):
    """What a checkpoint's step has to find: the power may go right after it is committed."""
    made, synced = log(tmp_path, 1, 2), []
    fsync = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda number: (synced.append(os.path.realpath(f"/proc/self/fd/{number}")), fsync(number))
    )
    made.sync()
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert synced == [str(tmp_path / "metrics.jsonl"), str(events)]
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("train/loss")] == [1, 2]


def test_what_is_not_finite_is_null(tmp_path):
    made = metrics.MetricsLog(tmp_path, 0)
    made.write("train", 1, {"loss": float("nan"), "norm": float("inf"), "tokens": 3.0})
    made.close()
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail) == {
        "kind": "train",
        "step": 1,
        "loss": None,
        "norm": None,
        "tokens": 3.0,
    }
