"""A run that was moved goes on; one whose model, data or earlier stage is no longer what it was is refused, or made
anew with the former one beside it."""

from __future__ import annotations

import pathlib
import shutil

import pytest

from alignx_jax.config_files import from_json
from alignx_jax.runs import lineage, loading
from tests.faults.conftest import STEPS
from tests.faults.program import Stage

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def begun(bench, tmp_path_factory) -> pathlib.Path:
    """A run that was killed half-way."""
    run = tmp_path_factory.mktemp("begun") / "run"
    with bench.start(run, 1) as running:
        assert running.kill_while(lambda: running.step >= STEPS // 2)
    return run


def other_weights(model: pathlib.Path) -> None:
    """One bit of one number; sizes as before."""
    content = bytearray((model / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (model / "model.safetensors").write_bytes(content)


def contents(run: pathlib.Path) -> dict[pathlib.Path, bytes]:
    """But for the lock that a killed run leaves."""
    files = [file for file in run.rglob("*") if file.is_file() and file.suffix != ".lock"]
    return {file: file.read_bytes() for file in files}


def test_a_run_that_was_moved_goes_on(bench, tally, begun, tmp_path):
    """With its model and its data, from another working directory."""
    run, model, pairs = tmp_path / "elsewhere" / "renamed", tmp_path / "model", tmp_path / "data" / "pairs.jsonl"
    shutil.copytree(begun, run)
    shutil.copytree(bench.model, model)
    pairs.parent.mkdir()
    shutil.copy(bench.folder / "pairs.jsonl", pairs)
    with tally.verdict() as injected:
        injected.append("run, model and data moved")
        ended = bench.finish(run, 1, model=model, data__parallel=pairs)
        assert ended.code == 0 and ended.continued_from, ended
        bench.assert_undisturbed(run, 1)


def test_other_weights_of_the_model_are_refused(bench, tally, begun, tmp_path):
    run, model = pathlib.Path(shutil.copytree(begun, tmp_path / "run")), tmp_path / "model"
    shutil.copytree(bench.model, model)
    other_weights(model)
    before = contents(run)
    with tally.verdict() as injected:
        injected.append("replaced base model")
        for flags in ({}, {"accept_changes": True}):
            bench.finish(run, 1, model=model, **flags).sentence(1, str(run / "stage1"), str(model), "digest")
        assert contents(run) == before


def test_a_change_that_cannot_work_changes_nothing(bench, tally, begun, tmp_path):
    run = pathlib.Path(shutil.copytree(begun, tmp_path / "run"))
    with tally.verdict() as injected:
        injected.append("another optimizer")
        bench.finish(run, 1, accept_changes=True, optimizer__kind="adafactor").sentence(1, "optimizer.kind")
        ended = bench.finish(run, 1)
        assert ended.code == 0 and ended.continued_from, ended
        bench.assert_undisturbed(run, 1)


def test_what_stands_on_former_weights_is_made_anew(bench, tally, tmp_path):
    """`--stage=all` again, with more steps; then a stage alone, after the one before it is another."""
    run = tmp_path / "run"
    few = dict(
        training__save_every=4,
        evaluation__limit=20,
        evaluation__translation__directions="none",
        evaluation__resamples=100,
    )
    model = pathlib.Path(shutil.copytree(bench.model, tmp_path / "model"))
    with tally.verdict() as injected:
        assert bench.finish(run, "all", model=model, training__steps=4, **few).code == 0
        first = {name: loading.find(str(run / name)).weights for name in ("stage1", "stage2")}
        again = bench.finish(run, "all", model=model, training__steps=4, **few)
        assert again.code == 0 and "anew" not in again.out, again
        assert {name: loading.find(str(run / name)).weights for name in first} == first

        injected.append("changed stage 1")
        longer = bench.finish(run, "all", model=model, training__steps=8, accept_changes=True, **few)
        assert longer.code == 0 and f"it is kept as {run}/stage2.1, and made anew" in longer.out, longer
        now = {name: loading.find(str(run / name)) for name in first}
        assert now["stage1"].weights != first["stage1"] and now["stage2"].weights != first["stage2"]
        assert now["stage2"].lineage.start == lineage.Origin("../stage1", now["stage1"].weights, now["stage1"].step)
        assert loading.find(str(run / "stage2.1")).weights == first["stage2"]
        assert Stage(run / "control").logged == 8, "goes on: its model is what it was"
        assert lineage.exported(run / "export") == now["stage2"].weights
        assert lineage.exported(run / "export.1") == first["stage2"]
        assert from_json((run / "stage1" / "config.1.json").read_bytes(), "").training.steps == 4

        shutil.rmtree(run / "stage1")
        assert bench.finish(run, 1, model=model, seed=1, training__steps=4, **few).code == 0
        said = bench.finish(run, 2, model=run / "stage1", seed=0, training__steps=8, **few)
        said.sentence(1, f"{run}/stage2 was begun with another model than {run}/stage1 is now")
        evaluated(bench, run, few).sentence(1, f"{run}/stage2 was trained from other weights than stage 1 has now")
        other_weights(model)
        evaluated(bench, run, few).sentence(1, "was trained from other weights than model has now")


def evaluated(bench, run: pathlib.Path, few: dict):
    """All stages of a run, and the model that it began with."""
    flags = bench.flags(run, "evaluate", **few)
    del flags["model"]
    with bench.started(flags) as running:
        return running.wait()
