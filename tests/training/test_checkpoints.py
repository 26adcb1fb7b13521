"""Saving, restoring on another mesh, which checkpoints stay, and half-written ones."""

import dataclasses
import errno
import pathlib
import shutil
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore
from flax import nnx

from alignx_jax import sharding, storage
from alignx_jax.config import OptimizerConfig
from alignx_jax.exits import StorageError, UserError
from alignx_jax.models.decoder import Decoder
from alignx_jax.models.families import decoder_config
from alignx_jax.training import checkpoints as module
from alignx_jax.training import optimizer, state, written
from alignx_jax.training.checkpoints import Checkpoints

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = decoder_config(
    {
        "model_type": "llama",
        "vocab_size": 100,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "test",
)


def fresh(spec: str, seed: int = 0):
    mesh = sharding.make_mesh(spec)
    model = state.build(Decoder(CONFIG, rngs=nnx.Rngs(seed)), 8, seed=seed)
    return state.create(state.split(model)[1], optimizer.build(OptimizerConfig(), 10), mesh)


def numbered(like, step: int):
    return dataclasses.replace(
        like, step=jnp.asarray(step, jnp.int32), optimizer=jax.tree.map(lambda x: x + 1, like.optimizer)
    )


def test_any_mesh_restores_what_another_saved(tmp_path):
    saved = numbered(fresh("8x1"), 7)
    checkpoints = Checkpoints(tmp_path, writable=True)
    checkpoints.save(7, saved, None)
    checkpoints.wait()
    like = fresh("2x2", seed=1)
    again = Checkpoints(tmp_path)
    restored = again.restore(7, like)
    for a, b, there in zip(*map(jax.tree.leaves, (saved, restored, like)), strict=True):
        np.testing.assert_array_equal(a, b)
        assert b.dtype == a.dtype and (b.ndim == 0 or b.sharding == there.sharding)


def test_a_folder_may_be_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoints = Checkpoints(pathlib.Path("run/checkpoints"), writable=True)
    checkpoints.save(7, numbered(fresh("1x1"), 7), None)
    checkpoints.wait()
    again = Checkpoints(tmp_path / "run" / "checkpoints")
    assert again.latest == 7


def test_the_latest_and_the_best_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2, writable=True)
    now = fresh("1x1")
    for step, loss in enumerate([3.0, 1.0, None, 2.0, 2.5, None], start=1):
        checkpoints.save(step, now, loss)
    checkpoints.wait()
    assert sorted(int(p.name) for p in tmp_path.iterdir() if p.is_dir()) == [2, 5, 6]
    again = Checkpoints(tmp_path)
    assert (again.latest, again.best) == (6, 2)


@pytest.mark.parametrize("name", ["mk[v2]", "a*b", "why?", "a\\b"])
def test_a_path_that_orbax_takes_for_a_pattern_is_refused(tmp_path, name):
    """It would write checkpoints that nobody can read."""
    with pytest.raises(UserError, match=r"^--run=.*: checkpoints cannot be written where the path has [*?[\\]"):
        Checkpoints(tmp_path / name / "checkpoints", writable=True)
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("name", ["{a}", "a::b", "pct%41 #x", "ünï", "x.orbax-checkpoint-tmp-7", "file:a"])
def test_any_other_path_is_written_and_read(tmp_path, name):
    (tmp_path / name).mkdir()
    states = saved(tmp_path / name, {7: None})
    restored = Checkpoints(tmp_path / name).restore(7, fresh("1x1", seed=1))
    for a, b in zip(*map(jax.tree.leaves, (states[7], restored)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_checkpoint_without_its_arrays_is_none(tmp_path, monkeypatch):
    """Orbax finds nothing to write an index of, warns, and says that it has saved."""
    monkeypatch.setattr(storage, "check_place", lambda folder: None)
    checkpoints = Checkpoints(tmp_path / "mk[v2]", writable=True)
    checkpoints.save(7, fresh("1x1"), None)
    with pytest.raises(StorageError, match=r"mk\[v2\]/7: .*could not be written \(\w+/manifest.ocdbt is missing\)"):
        checkpoints.wait()
    assert Checkpoints(tmp_path / "mk[v2]").latest is None


def _other_shape(items):
    items["decoder"]["norm"] = jnp.zeros((17,))


def _one_more(items):
    items["classifier"]["more"] = jnp.zeros(())


@pytest.mark.parametrize("change", [_other_shape, _one_more])
def test_other_arrays_than_the_state_has_are_no_checkpoint_of_it(tmp_path, change):
    state = fresh("4x2")
    saved(tmp_path, {7: None})
    items = {name: dict(params) for name, params in state.params.items()}
    sizes = storage.files(tmp_path / "7")
    assert written.incomplete(tmp_path / "7", sizes, written.kinds(items)) is None
    change(items)
    assert "has not the arrays" in written.incomplete(tmp_path / "7", sizes, written.kinds(items))


def test_a_part_of_an_array_that_is_not_in_the_index_is_missed(tmp_path):
    """As where a process's part came too late for the index."""
    checkpoints, state = Checkpoints(tmp_path, writable=True), fresh("4x2")
    checkpoints.save(7, state, None)
    checkpoints.wait()
    base = {"driver": "file", "path": f"{tmp_path}/7/decoder/"}
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
    store.delete_range(tensorstore.KvStore.KeyRange("embedding/c/1/3", "embedding/c/1/4")).result()
    sizes, kinds = storage.files(tmp_path / "7"), written.kinds({"decoder": state.params["decoder"]})
    assert written.incomplete(tmp_path / "7", sizes, kinds) == "decoder has 7 of 8 parts of embedding"


def deletes(folder: pathlib.Path, step: int) -> None:
    """What a run that trains does: the checksums first."""
    (folder / f"{step}" / module.CHECKSUMS).unlink()
    (folder / f"{step}" / "decoder" / "manifest.ocdbt").unlink()


def test_a_step_that_is_deleted_while_it_is_verified_gives_way_without_a_warning(tmp_path):
    saved(tmp_path, {1: 3.0, 2: 1.0, 3: 2.0})
    warnings = []
    reader = Checkpoints(tmp_path, warn=warnings.append)
    deletes(tmp_path, 2)
    assert reader.sound("best", ("decoder",)) == 3 and not warnings


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of reads given up half-way
def test_a_step_that_is_deleted_while_it_is_read_is_told_as_such(tmp_path):
    states = saved(tmp_path, {1: None, 2: None})
    reader = Checkpoints(tmp_path)
    deletes(tmp_path, 1)
    with pytest.raises(module.Deleted, match="/1"):
        reader.restore_part(1, {"decoder": states[1].params["decoder"]})


def test_without_validation_the_latest_is_the_best(tmp_path):
    checkpoints = Checkpoints(tmp_path, writable=True)
    assert checkpoints.latest is None and checkpoints.best is None
    checkpoints.save(1, fresh("1x1"), None)
    checkpoints.wait()
    again = Checkpoints(tmp_path)
    assert again.best == 1


def saved(folder: pathlib.Path, losses: dict[int, float | None], keep: int = 3):
    """Checkpoints of a state that tells the step; and the states."""
    checkpoints, states = Checkpoints(folder, keep, writable=True), {}
    for step, loss in losses.items():
        states[step] = numbered(fresh("1x1", seed=step), step)
        checkpoints.save(step, states[step], loss)
    checkpoints.wait()
    return states


def warned(folder: pathlib.Path, which: str = "latest", **options) -> tuple[int, list[str]]:
    """The sound checkpoint, and the warnings that finding it gave."""
    warnings = []
    return Checkpoints(folder, warn=warnings.append, **options).sound(which), warnings


def test_a_half_written_checkpoint_does_not_count(tmp_path):
    saved(tmp_path, {1: None, 2: None})
    (tmp_path / "2" / module.CHECKSUMS).unlink()
    (tmp_path / "3.orbax-checkpoint-tmp-7").mkdir()
    (tmp_path / "latest.json").write_text("1")
    assert warned(tmp_path, writable=True) == (1, [])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "latest.json"], "what is left of it is cleaned up"


def flip(file: pathlib.Path, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def test_a_flipped_bit_in_any_file_is_found(tmp_path):
    saved(tmp_path / "good", {1: None, 2: None})
    rng = np.random.default_rng(0)
    for number, file in enumerate(sorted((tmp_path / "good" / "2").rglob("*"))):
        if not file.is_file() or not file.stat().st_size:
            continue
        folder = pathlib.Path(shutil.copytree(tmp_path / "good", tmp_path / f"bad{number}"))
        flip(folder / file.relative_to(tmp_path / "good"), int(rng.integers(8 * file.stat().st_size)))
        step, warnings = warned(folder)
        assert step == 1, file
        (warning,) = warnings
        assert f"damaged checkpoint {folder}/2: {file.relative_to(tmp_path / 'good' / '2')} is" in warning
        assert "going back to step 1" in warning
    assert number > 20


def _truncated(folder):
    file = max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1])


def _file_missing(folder):
    (folder / "optimizer" / "manifest.ocdbt").unlink()


def _checksums_missing(folder):
    (folder / module.CHECKSUMS).unlink()


def _checksums_damaged(folder):
    (folder / module.CHECKSUMS).write_text("")


def _set_aside(folder):
    (folder / module.CHECKSUMS).rename(folder / "damaged.txt")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (_truncated, "bytes instead of"),
        (_file_missing, "optimizer/manifest.ocdbt is missing"),
        (_checksums_missing, "checksums.json is missing"),
        (shutil.rmtree, "it is gone"),
    ],
)
def test_what_is_damaged_is_set_aside_and_saved_again(tmp_path, spoil, says):
    saved(tmp_path, {1: None, 2: None, 3: None}, keep=2)
    spoil(tmp_path / "3")
    step, (warning,) = warned(tmp_path, writable=True)
    assert step == 2 and f"{tmp_path}/3: " in warning and says in warning
    assert not (tmp_path / "3").exists() or says in (tmp_path / "3" / "damaged.txt").read_text()
    assert warned(tmp_path, writable=True)[0] == 2
    saved(tmp_path, {3: None}, keep=2)  # the good one of step 2 was not crowded out
    assert warned(tmp_path) == (3, [])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "3", "latest.json"]
    assert not (tmp_path / "3" / "damaged.txt").exists()


def test_the_best_that_is_damaged_gives_way_to_the_next_best(tmp_path):
    saved(tmp_path, {1: 2.0, 2: 1.0, 3: 3.0})
    (tmp_path / "2" / "optimizer" / "manifest.ocdbt").unlink()
    decoder_only = Checkpoints(tmp_path).sound("best", ("decoder",))
    assert decoder_only == 2, "what is not read is not looked at"
    step, (warning,) = warned(tmp_path, "best")
    assert step == 1 and "/2: optimizer/manifest.ocdbt is missing; going back to step 1" in warning
    assert (tmp_path / "2").is_dir(), "who only reads moves nothing"


def test_none_left_is_an_error_and_none_ever_saved_is_not(tmp_path):
    assert warned(tmp_path / "new", writable=True) == (None, [])
    saved(tmp_path, {1: None, 2: None})
    for step in "12":
        _truncated(tmp_path / step)
    with pytest.raises(StorageError, match=r"no checkpoint is left \(.*/2: .* instead of .*/1: .* to begin again"):
        warned(tmp_path)
    shutil.rmtree(tmp_path / "1")
    shutil.rmtree(tmp_path / "2")
    with pytest.raises(StorageError, match="/2: it is gone"):
        warned(tmp_path)


@pytest.mark.parametrize("record", [None, "", "1x"], ids=["gone", "empty", "damaged"])
@pytest.mark.parametrize("spoil", [_truncated, _checksums_damaged, _set_aside])
def test_none_left_is_an_error_whatever_became_of_the_record(tmp_path, spoil, record):
    saved(tmp_path, {1: None})
    spoil(tmp_path / "1")
    (tmp_path / "latest.json").unlink()
    if record is not None:
        (tmp_path / "latest.json").write_text(record)
    for writable in (True, False):
        with pytest.raises(StorageError, match="no checkpoint is left"):
            warned(tmp_path, writable=writable)


@pytest.mark.parametrize("writable", [True, False])
def test_a_damaged_record_alone_tells_that_something_was_saved(tmp_path, writable):
    (tmp_path / "latest.json").write_text("")
    with pytest.raises(StorageError, match=r"no checkpoint is left \(what was saved is damaged or gone\)"):
        warned(tmp_path, writable=writable)


def test_an_error_of_a_save_surfaces_and_leaves_the_one_before(tmp_path, monkeypatch):
    saved(tmp_path, {1: 1.0})
    checkpoints = Checkpoints(tmp_path, writable=True)

    def full(path, text):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write", full)
        checkpoints.save(2, fresh("1x1"), None)
        says = rf"{tmp_path}/2: the checkpoint could .* \(.*No space left on device.*step 1 is intact; make room"
        end = time.monotonic() + 30
        with pytest.raises(StorageError, match=says):
            while time.monotonic() < end:
                checkpoints.poll()  # as after every step
    assert warned(tmp_path) == (1, []) and not list(tmp_path.glob("2*")), "the disk is not left full"
    checkpoints.save(2, fresh("1x1"), None)
    checkpoints.wait()
    assert warned(tmp_path) == (2, [])


def test_polling_does_not_wait(tmp_path, monkeypatch):
    checkpoints, go_on = Checkpoints(tmp_path, writable=True), threading.Event()
    write = storage.write
    monkeypatch.setattr(storage, "write", lambda *args: (go_on.wait(30), write(*args)))
    checkpoints.save(1, fresh("1x1"), None)
    checkpoints.poll()
    assert checkpoints.latest is None
    go_on.set()
    checkpoints.wait()
    assert checkpoints.latest == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of reads given up half-way
def test_another_model_is_told_apart(tmp_path):
    checkpoints = Checkpoints(tmp_path, writable=True)
    now = fresh("1x1")
    checkpoints.save(1, now, None)
    checkpoints.wait()
    wrong = dict(now.params["decoder"], norm=jnp.zeros((17,)))
    with pytest.raises(UserError, match="not of this model"):
        Checkpoints(tmp_path).restore_part(1, {"decoder": wrong})


def test_what_the_system_says_is_found_in_what_tensorstore_says():
    text = "RESOURCE_EXHAUSTED: \"/x/d\": Failed to write 9 bytes [os_error_code='28'] [source locations='a"
    assert module.reason(ValueError(text)) == "No space left on device"
    assert module.reason(OSError(30, "Read-only file system", "x")) == "Read-only file system"
    assert module.reason(ValueError("two\nlines")) == "two lines"


# A write that ends when the event loop which waits for it is closed, as after the error of another write.
LATE = """
import asyncio, sys, tensorstore
from alignx_jax.training import checkpoints

async def begin():
    promise, written = tensorstore.Promise.new()
    async def wait():
        await written
    begun.append(asyncio.ensure_future(wait()))
    await asyncio.sleep(0)
    return promise

begun, loop = [], asyncio.new_event_loop()
promise = loop.run_until_complete(begin())
loop.close()
if sys.argv[1:] == ["hidden"]:
    checkpoints.hide_late_writes()
promise.set_result(None)
class Other:
    def __del__(self):
        raise ValueError("another error")
Other()
"""


@pytest.mark.parametrize("hidden", [False, True])
def test_the_late_writes_of_a_failed_save_print_no_traceback_and_other_errors_do(hidden):
    ended = subprocess.run(
        [sys.executable, "-c", LATE, *["hidden"] * hidden], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert ("Event loop is closed" in ended.stderr) is not hidden, ended.stderr
    assert "another error" in ended.stderr
