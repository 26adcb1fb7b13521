"""Bytes change of what a run reads: the model, the prepared data, what is compiled, and the run's own records.

Either the program stops with one sentence that names the file, before it has changed anything, and runs once the file
is mended; or it repairs the damage and ends bit for bit as undisturbed. It never trains on what is wrong.
"""

from __future__ import annotations

import pathlib
import random
import shutil

import numpy as np
import pytest

from alignx_jax.training import metrics
from tests.faults.conftest import SEED, STEPS
from tests.faults.damage import Damage, flip, remove, truncate
from tests.faults.program import Stage

pytestmark = pytest.mark.slow

_ID = {"ids": lambda value: getattr(value, "__name__", value)}


def flip_header(file: pathlib.Path, rng: random.Random) -> None:
    """In the first bytes, where a safetensors file says what it holds."""
    content = bytearray(file.read_bytes())
    content[rng.randrange(64)] ^= 0xFF
    file.write_bytes(content)


def other_number(file: pathlib.Path, rng: random.Random) -> None:
    """One bit of a digit: JSON as before, another number."""
    content = bytearray(file.read_bytes())
    place = rng.choice([n for n, byte in enumerate(content) if byte in b"2468"])
    content[place] ^= 1
    file.write_bytes(content)


def other_fingerprint(file: pathlib.Path, rng: random.Random) -> None:
    """A digit of the digest of the weights below the adapters is another."""
    content = bytearray(file.read_bytes())
    place = content.rindex(b'"weights": "') + len(b'"weights": "')
    content[place] = ord("0") if content[place] != ord("0") else ord("1")
    file.write_bytes(content)


def other_key(file: pathlib.Path, rng: random.Random) -> None:
    """One bit of one name of a field."""
    content = file.read_bytes()
    file.write_bytes(content.replace(b'"step"', b'"sTep"', 1))


def _spoil(folder: pathlib.Path, pattern: str, damage: Damage) -> dict[pathlib.Path, bytes]:
    """Damages all files of `pattern`; returns what they held."""
    rng = random.Random(f"{SEED} {pattern} {damage.__name__}")
    before = {file: file.read_bytes() for file in folder.glob(pattern)}
    assert before
    for file in before:
        damage(file, rng)
    return before


@pytest.mark.parametrize(
    ("pattern", "damage"),
    [
        ("model/model.safetensors", flip_header),
        ("model/model.safetensors", truncate),
        ("model/tokenizer.model", truncate),
        ("model/config.json", truncate),
        ("cache/parallel/**/*.array_record*", flip),
        ("cache/parallel/**/*.array_record*", truncate),
        ("cache/parallel/**/dataset_info.json", truncate),
        ("cache/encoded/*/tokens.int32", flip),
        ("cache/encoded/*/tokens.int32", truncate),
        ("cache/encoded/*/separate.npy", flip),
        ("cache/encoded/*/facts.json", truncate),
        ("cache/compiled/*-cache", flip),
        ("cache/compiled/*-cache", truncate),
    ],
    **_ID,
)
def test_what_a_run_begins_with(bench, tally, tmp_path, pattern, damage):
    model, cache, run = tmp_path / "model", tmp_path / "cache", tmp_path / "run"
    shutil.copytree(bench.model, model)
    shutil.copytree(bench.cache, cache)
    if "array_record" in pattern:
        shutil.rmtree(cache / "encoded")  # so that it is read
    before = _spoil(tmp_path, pattern, damage)
    with tally.verdict() as injected:
        injected.append(f"{pathlib.Path(pattern).parts[0]} file: {damage.__name__}")
        ended = bench.finish(run, 1, model=model, data__cache=cache)
        if ended.code:
            said = ended.sentence(1)
            assert any(str(path) in said for file in before for path in (file, file.parent)), said
            assert not run.exists(), "nothing is begun"
        else:
            bench.assert_undisturbed(run, 1)


@pytest.fixture(scope="module")
def begun(bench, tmp_path_factory) -> pathlib.Path:
    """A run that was killed half-way, with a copy of its model."""
    folder = tmp_path_factory.mktemp("begun")
    shutil.copytree(bench.model, folder / "model")
    with bench.start(folder / "run", 1, model=folder / "model") as running:
        assert running.kill_while(lambda: running.step >= STEPS // 2)
    return folder


@pytest.mark.parametrize(
    ("pattern", "damage"),
    [
        ("stage1/config.json", flip),
        ("stage1/config.json", truncate),
        ("stage1/config.json", other_number),
        ("stage1/lineage.json", truncate),
        ("stage1/lineage.json", remove),
        ("stage1/data.json", truncate),
        ("stage1/huggingface/config.json", other_number),
        ("stage1/huggingface/tokenizer.model", flip),
        ("stage1/huggingface/SHA256SUMS", truncate),
        ("stage1/checkpoints/latest.json", other_number),
        ("stage1/checkpoints/latest.json", truncate),
        ("stage1/metrics.jsonl", flip),
        ("stage1/metrics.jsonl", truncate),
    ],
    **_ID,
)
def test_the_records_of_a_run(bench, tally, begun, tmp_path, pattern, damage):
    run = tmp_path / "run"
    shutil.copytree(begun / "run", run)
    (spoilt,) = _spoil(run, pattern, damage)
    there = _contents(run)
    with tally.verdict() as injected:
        injected.append(f"record of a run: {damage.__name__}")
        kept = {record["step"] for record in metrics.read(run / "stage1", "train")}
        ended = bench.finish(run, 1, model=begun / "model")
        if ended.code:
            assert str(spoilt.parent) in ended.sentence(1)
            assert _contents(run) == there, "nothing is changed"
        elif (
            spoilt.name == "metrics.jsonl"
        ):  # what is lost up to the checkpoint cannot be had again; that has to be said
            lost = set(range(1, ended.continued_from + 1)) - kept
            assert (str(spoilt) in ended.out + ended.err) == bool(lost), ended
            np.testing.assert_equal(Stage(run / "stage1").state(STEPS), bench.whole(1).state(STEPS))
        else:
            bench.assert_undisturbed(run, 1)


@pytest.mark.parametrize(
    ("stage", "name", "damage"),
    [
        (2, "huggingface/config.json", other_number),
        ("evaluate", "huggingface/tokenizer.model", flip),
        ("export", "huggingface/config.json", other_number),
        ("export", "huggingface/tokenizer_config.json", remove),
        ("export", "data.json", truncate),  # for the model card
    ],
    **_ID,
)
def test_what_other_stages_read_of_a_run(bench, tally, tmp_path, stage, name, damage):
    trained = pathlib.Path(shutil.copytree(bench.whole(1).folder, tmp_path / "trained" / "stage1"))
    (spoilt,) = _spoil(trained, name, damage)
    with tally.verdict() as injected:
        injected.append(f"record of a run, for another stage: {damage.__name__}")
        bench.finish(tmp_path / "run", stage, model=trained).sentence(1, f"{spoilt} is ")
        assert not (tmp_path / "run").exists(), "nothing is begun"


@pytest.fixture(scope="module")
def adapted(bench, tmp_path_factory) -> pathlib.Path:
    """A run of adapters that was killed half-way."""
    run = tmp_path_factory.mktemp("adapted") / "run"
    with bench.start(run, 1, lora__rank=4) as running:
        assert running.kill_while(lambda: running.step >= STEPS // 2)
    return run


@pytest.mark.parametrize("damage", [other_fingerprint, other_key, truncate, remove], **_ID)
def test_the_record_of_the_model_below_adapters(bench, tally, adapted, tmp_path, damage):
    run = pathlib.Path(shutil.copytree(adapted, tmp_path / "run"))
    _spoil(run, "stage1/lineage.json", damage)
    there = _contents(run)
    with tally.verdict() as injected:
        injected.append(f"record of a run: {damage.__name__}")
        bench.finish(run, 1, lora__rank=4).sentence(
            1, str(run / "stage1"), *([] if damage is other_fingerprint else ["lineage.json"])
        )
        assert _contents(run) == there, "nothing is changed"


@pytest.mark.parametrize(("name", "damage"), [("config.json", other_number), ("tokenizer.model", flip)], **_ID)
def test_another_model_than_the_run_was_begun_with(bench, tally, begun, tmp_path, name, damage):
    """Every byte can be read, but it is no longer the model, or the tokenizer, of the steps before."""
    run = tmp_path / "run"
    shutil.copytree(begun / "run", run)
    there = _contents(run)
    before = _spoil(begun / "model", name, damage)
    with tally.verdict() as injected:
        injected.append(f"model file, run half-way: {damage.__name__}")
        try:
            bench.finish(run, 1, model=begun / "model").sentence(1, str(begun / "model"))
            assert _contents(run) == there, "nothing is changed"
        finally:
            for file, content in before.items():
                file.write_bytes(content)


def test_mended_it_goes_on_to_the_same_end(bench, begun):
    """The run whose copies were damaged above, with the model that was damaged and mended."""
    ended = bench.finish(begun / "run", 1, model=begun / "model")
    assert ended.code == 0, ended
    bench.assert_undisturbed(begun / "run", 1)


def _contents(run: pathlib.Path) -> dict[str, bytes]:
    """What a run is continued from."""
    parts = ("*.json*", "huggingface/**/*", "checkpoints/**/*")
    files = (file for part in parts for file in (run / "stage1").glob(part) if file.is_file())
    return {f"{file.relative_to(run)}": file.read_bytes() for file in files}
