"""Against what the real package writes offline, read back by the format of its file: LevelDB's log of its messages."""

import dataclasses
import importlib
import importlib.util
import json

import pytest

from alignx_jax.config import Config, TrainingConfig
from alignx_jax.exits import UserError
from alignx_jax.training import wandb_log

needs_wandb = pytest.mark.skipif(
    importlib.util.find_spec("wandb") is None, reason="wandb is not installed; it is in requirements-dev.txt"
)
CONFIG = Config(training=TrainingConfig(wandb="languages"))


def messages(file):
    from wandb.proto import wandb_internal_pb2

    content, place, whole = file.read_bytes(), 7, b""  # behind the mark of the format
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:  # the end of a block, too short for a header
            place += 32768 - place % 32768
            continue
        size, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        whole += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(whole)
            whole = b""


def history(records):
    lines = [{i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in r.history.item} for r in records]
    return [{k: v for k, v in line.items() if not k.startswith("_")} for line in lines if line]


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = tmp_path / "sample" / "stage1"
    folder.mkdir(parents=True)
    return folder


@needs_wandb
def test_what_wandb_keeps_of_a_run_and_of_its_continuation(offline):
    told = []
    for steps in ((1, 2, 3), (3, 4)):  # killed after 3; the checkpoint was at 2
        log = wandb_log.WandbLog(CONFIG, offline, told.append)
        for step in steps:
            log.write("train", step, {"loss": step / 2, "mfu": float("nan")})
        log.write("validation", steps[-1], {"loss": 0.25})
        log.close()
    importlib.import_module("wandb").teardown()  # waits for its process, as the end of ours does
    first, second = (list(messages(file)) for file in sorted(offline.glob("wandb/offline-run-*/*.wandb")))
    assert history(first) == [
        *({"step": step, "train/loss": step / 2} for step in (1, 2, 3)),
        {"step": 3, "validation/loss": 0.25},
    ]
    assert [line["step"] for line in history(second)] == [3, 4, 4]
    (run,), (again,) = ([r.run for r in records if r.HasField("run")][:1] for records in (first, second))
    assert run.run_id == again.run_id == (offline / "wandb_id").read_text()
    assert (run.project, run.display_name) == ("languages", "sample/stage1")
    settings = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert settings["objective.contrastive.temperature"] == 0.1 and settings["training.rows"] == 32
    assert not told


@needs_wandb
def test_a_failure_is_told_once_and_stops_nothing(offline, monkeypatch):
    told = []
    log = wandb_log.WandbLog(CONFIG, offline, told.append)
    run = log._run
    monkeypatch.setattr(type(run), "log", lambda *args, **kwargs: 1 / 0)
    for step in (1, 2):
        log.write("train", step, {"loss": 1.0})
    log.close()
    run.finish()
    assert told == ["W&B: ZeroDivisionError: division by zero; going on without it"]
    (offline / "wandb_id").write_text("not/an id")
    assert wandb_log.WandbLog(CONFIG, offline, told.append)._run is None and len(told) == 2


def test_wandb_that_is_not_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="wandb needs wandb; install it"):
        wandb_log.check(CONFIG)
    wandb_log.check(dataclasses.replace(CONFIG, training=TrainingConfig()))
