"""Evaluations have folders with names: each appears whole, and none is lost."""

import contextlib
import dataclasses
import os
import pathlib

import pytest

from alignx_jax import config_files
from alignx_jax.config import Config, EvaluationConfig
from alignx_jax.evaluation import folders
from alignx_jax.evaluation.rows import Results
from alignx_jax.exits import UserError
from tests.evaluation import examples

FILES = {"evaluation.json", "report.html", "tensorboard"}


def results(**changes) -> Results:
    found = examples.results(models=2, languages=2, layers=2)
    return dataclasses.replace(found, sentences=dataclasses.replace(found.sentences, **changes))


def fill(folder: pathlib.Path) -> None:
    (folder / "report.html").write_text("page")
    (folder / "tensorboard").mkdir()
    (folder / "tensorboard" / "events").write_bytes(b"events")


def names(run: pathlib.Path) -> list[str]:
    return sorted(file.name for file in (run / "evaluation").iterdir())


@pytest.mark.parametrize(
    "sentences, name",
    [
        ("flores200:devtest", "flores200-devtest"),
        ("ntrex128:test", "ntrex128-test"),
        ("sample", "sample"),
        ("/data/my dev.v2.jsonl.gz", "my-dev.v2"),
        ("/data/flores200/devtest/", "devtest"),
        ("..hidden.lock", "hidden"),
        ("/data/Sätze.jsonl", "Sätze"),
        ("///", "sentences"),
        ("x" * 300, "x" * 60),
    ],
)
def test_an_evaluation_is_called_after_its_sentences(tmp_path, sentences, name):
    assert folders.place(tmp_path, EvaluationConfig(sentences=sentences)) == tmp_path / "evaluation" / name
    config_files.check(Config(evaluation=EvaluationConfig(name=name)))
    assert folders.place(tmp_path, EvaluationConfig(name="mine", sentences=sentences)).name == "mine"


@pytest.mark.parametrize("name", [".", "..", ".x", "a/b", "../up", "a b", "-x", "x.lock", "x" * 61, "a\n"])
def test_another_name_is_refused(name):
    with pytest.raises(
        UserError, match=r"^--evaluation.name=.*: has to be at most 60 letters, digits, dots, - and _, "
    ):
        config_files.check(Config(evaluation=EvaluationConfig(name=name)))


def test_flores_then_ntrex_and_both_are_there(tmp_path):
    for name in ("flores200:devtest", "ntrex128:test"):
        place = folders.place(tmp_path, EvaluationConfig(sentences=name))
        assert folders.write(results(file=name), place, fill) is None
        assert {file.name for file in place.iterdir()} == FILES
    assert names(tmp_path) == ["flores200-devtest", "ntrex128-test"]
    found = folders.of_run(tmp_path)
    assert {name: of.sentences.file for name, of in found.items()} == {
        "flores200-devtest": "flores200:devtest",
        "ntrex128-test": "ntrex128:test",
    }


def test_the_same_is_replaced_and_another_is_kept(tmp_path):
    place = tmp_path / "evaluation" / "dev"
    first = results()
    assert folders.write(first, place, fill) is None
    config = first.config | {"mesh": "1x1"}
    again = dataclasses.replace(first, date="2026-12-01", machine="another", config=config)
    assert folders.write(again, place, fill) is None
    assert names(tmp_path) == ["dev"] and folders.read(place).machine == "another"
    changed = [
        results(sha256="1" * 64),
        dataclasses.replace(first, config=first.config | {"seed": 1}),
        examples.with_model(first, 1, step=200),
        examples.with_model(first, 1, weights="0af1"),
    ]
    for n, other in enumerate(changed, 1):
        assert folders.write(other, place, fill) == tmp_path / "evaluation" / f"dev.{n}"
    assert names(tmp_path) == ["dev", "dev.1", "dev.2", "dev.3", "dev.4"]
    assert folders.read(tmp_path / "evaluation" / "dev.1").machine == "another"
    assert folders.read(place).models[1].weights == "0af1"
    (place / "evaluation.json").write_text("{")  # nobody can tell what it was
    assert folders.write(first, place, fill) == tmp_path / "evaluation" / "dev.5"


@pytest.mark.parametrize("again", [True, False])
def test_killed_at_any_moment_there_is_the_old_set_or_the_new_one(tmp_path, monkeypatch, again):
    """Ends before each change of the file system in turn; a reader gets whole sets, and the next one is written."""
    old, new = results(), results() if again else results(sha256="1" * 64)
    new = dataclasses.replace(new, machine="new")

    class Killed(BaseException):
        pass

    def run_until(last: int, folder: pathlib.Path) -> int:
        calls = 0

        def counted(real):
            def call(*arguments, **options):
                nonlocal calls
                calls += 1
                if calls > last:
                    raise Killed
                return real(*arguments, **options)

            return call

        with monkeypatch.context() as patch:
            for owner, name in (
                *((os, name) for name in ("replace", "rename", "unlink", "rmdir", "mkdir", "fsync")),
                *((pathlib.Path, name) for name in ("replace", "unlink", "mkdir", "write_text", "write_bytes")),
            ):
                patch.setattr(owner, name, counted(getattr(owner, name)))
            with contextlib.suppress(Killed):
                folders.write(new, folder, fill)
        return calls

    last, seen = 0, set()
    while True:
        run = tmp_path / f"{last}"
        place = run / "evaluation" / "dev"
        folders.write(old, place, fill)
        calls = run_until(last, place)
        found = folders.of_run(run)
        for name in found:
            assert {file.name for file in (run / "evaluation" / name).iterdir()} == FILES
        machines = {of.machine for of in found.values()}
        seen.add(frozenset(machines))
        assert machines and (again or old.machine in machines), last
        folders.write(new, place, fill)
        assert folders.read(place).machine == "new" and not (place.parent / ".dev.partial").exists()
        if calls <= last:
            break
        last += 1
    assert last > 8 and {frozenset({old.machine})} < seen


def test_results_of_an_earlier_version_are_refused_and_kept(tmp_path):
    place = tmp_path / "evaluation" / "dev"
    place.mkdir(parents=True)
    (place / "evaluation.json").write_text('{"format": 1, "models": []}')
    with pytest.raises(
        UserError, match=r"evaluation\.json is damaged \(format: has to be 2, .*\); evaluate again, or del"
    ):
        folders.read(place)
    assert folders.write(results(), place, fill) == tmp_path / "evaluation" / "dev.1"
    assert folders.read(place) == results()
