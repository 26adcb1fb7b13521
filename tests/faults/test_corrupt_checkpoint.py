"""Bytes of checkpoints change, or are gone: the run goes back to the one before, says so, and ends the same."""

from __future__ import annotations

import random
import shutil

import pytest

from tests.faults.conftest import SAVE_EVERY, SEED, STEPS
from tests.faults.damage import flip, remove, truncate
from tests.faults.program import Stage

pytestmark = pytest.mark.slow

# A pattern of every kind of file of a checkpoint, or the folder itself.
KINDS = [
    ("decoder/d/*", flip),
    ("decoder/ocdbt.process_0/d/*", truncate),
    ("decoder/ocdbt.process_0/manifest.ocdbt", truncate),
    ("decoder/manifest.ocdbt", flip),
    ("decoder/_METADATA", truncate),
    ("decoder/_sharding", flip),
    ("classifier/array_metadatas/process_0", flip),
    ("optimizer/d/*", flip),
    ("count/d/*", flip),
    ("_CHECKPOINT_METADATA", truncate),
    ("checksums.json", flip),
    ("checksums.json", remove),
    (".", remove),
]


@pytest.fixture
def run(bench, tmp_path):
    """A copy of the undisturbed run, whose last checkpoint will be damaged."""
    shutil.copytree(bench.whole(1).folder, tmp_path / "run" / "stage1")
    return tmp_path / "run"


@pytest.mark.parametrize(("pattern", "damage"), KINDS, ids=lambda value: getattr(value, "__name__", value))
def test_a_damaged_checkpoint_is_not_restored_from(bench, tally, run, pattern, damage):
    rng = random.Random(f"{SEED} {pattern} {damage.__name__}")
    stage = Stage(run / "stage1")
    for path in [stage.checkpoint(STEPS)] if pattern == "." else list(stage.checkpoint(STEPS).glob(pattern)):
        damage(path, rng)
    with tally.verdict() as injected:
        injected.append(f"checkpoint: {damage.__name__}")
        ended = bench.finish(run, 1)
        assert ended.code == 0, ended
        assert ended.continued_from == STEPS - SAVE_EVERY, ended
        assert f"{stage.checkpoint(STEPS)}" in ended.err and "warning" in ended.err, ended
        bench.assert_undisturbed(run, 1)


def test_all_checkpoints_are_damaged(bench, tally, run):
    stage = Stage(run / "stage1")
    before = {file: file.read_bytes() for step in stage.saved for file in stage.checkpoint(step).glob("optimizer/d/*")}
    assert len(stage.saved) > 1
    for file in before:
        flip(file, random.Random(SEED))
    with tally.verdict() as injected:
        injected.append("checkpoint: all damaged")
        bench.finish(run, 1).sentence(74, str(stage.folder))
        for file, content in before.items():  # from a copy, as the sentence says
            file.write_bytes(content)
        ended = bench.finish(run, 1)
        assert ended.code == 0, ended
        bench.assert_undisturbed(run, 1)


@pytest.mark.parametrize("stage", ["2", "export"])
def test_what_reads_a_damaged_checkpoint_says_so(bench, tally, run, tmp_path, stage):
    """Export and stage 2 read the best checkpoint of stage 1, here the last one."""
    there = Stage(run / "stage1")
    for file in there.checkpoint(STEPS).glob("decoder/d/*"):
        flip(file, random.Random(SEED))
    with tally.verdict() as injected:
        injected.append("checkpoint: read by another stage")
        ended = bench.finish(tmp_path / "other", stage, model=there.folder, training__steps=2)
        said = f"{there.checkpoint(STEPS)}"
        if ended.code:
            ended.sentence(74, said)
        else:
            assert said in ended.err and "warning" in ended.err, ended
