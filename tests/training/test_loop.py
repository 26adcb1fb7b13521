"""What the loop does when it is stopped, continued elsewhere, fed with NaN, kept waiting, or cannot write."""

import concurrent.futures
import dataclasses
import io
import itertools
import json
import pathlib
import re
import shutil
import time
import types
import warnings

import jax
import numpy as np
import pytest
from flax import nnx
from orbax.checkpoint import v1 as ocp

from alignx_jax import config_files as configs
from alignx_jax import exits, sharding, storage
from alignx_jax.console import Screen
from alignx_jax.data import pipeline, tokenizer
from alignx_jax.models import families, huggingface
from alignx_jax.models.decoder import Decoder
from alignx_jax.runs import companions, lineage, loading
from alignx_jax.training import balance, begin, build, checkpoints, compiling, loop, metrics, profiling
from alignx_jax.training.stopping import Stop

ROOT = pathlib.Path(__file__).resolve().parents[2]
STEPS = 6


class StopAfter(Stop):
    """Asked to stop in the course of a step, counted from the start."""

    def __init__(self, steps: int | None = None):
        super().__init__()
        self._steps = steps

    def reached(self) -> bool:
        if self._steps is not None:
            self._steps -= 1
        return self._steps == 0


class Spoilt:
    """Training data whose batch of one step is another one, or comes late."""

    def __init__(self, split: pipeline.Split, step: int, change):
        self._split, self._step, self._change = split, step, change

    def __getattr__(self, name: str):
        return getattr(self._split, name)

    def batches(self, start: int = 0, *processes: int):
        for step, batch in enumerate(self._split.batches(start, *processes), start + 1):
            yield self._change(batch) if step == self._step else batch


def with_nan(batch):
    weights = batch.loss_weights.copy()
    weights[0, 5] = np.nan
    return dataclasses.replace(batch, loss_weights=weights)


@dataclasses.dataclass
class Trainer:
    """Trains a tiny model on a few lines, in this process."""

    config: configs.Config
    source: loading.Source
    data: pipeline.Data
    out: io.StringIO = dataclasses.field(default_factory=io.StringIO)

    def __call__(
        self, folder, mesh: str = "2x1", stop: int | None = None, data=None, ahead: bool = False, **training
    ) -> loop.Result:
        top = {k: training.pop(k) for k in ("on_nonfinite",) if k in training}
        config = dataclasses.replace(
            self.config, run=str(folder), **top, training=dataclasses.replace(self.config.training, **training)
        )
        made = sharding.make_mesh(mesh)
        with jax.set_mesh(made):
            return begin.train(
                config,
                folder / "stage1",
                build.Weights(self.source, config, made),
                data or self.data,
                made,
                Screen(file=self.out, width=1000),
                "test",
                StopAfter(stop),
                build.compile_ahead(config, folder / "stage1", self.source, made) if ahead else None,
            )

    def spoilt(self, step: int, change) -> pipeline.Data:
        return dataclasses.replace(self.data, train=Spoilt(self.data.train, step, change))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    sample = loading.find("sample").huggingface
    settings = huggingface.read_config(sample)
    settings |= dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, head_dim=8)
    model = folder / "model"
    decoder = Decoder(families.decoder_config(settings, "test"), rngs=nnx.Rngs(0))
    huggingface.export(decoder, settings, model, np.float32, 1e9)
    companions.copy(sample, model)
    languages = [("de", "Der Hund schläft", "The dog sleeps"), ("fr", "Le chat mange", "The cat eats")]
    with (folder / "few.jsonl").open("w", encoding="utf-8") as file:
        for n, (code, theirs, english) in zip(range(120), itertools.cycle(languages), strict=False):
            record = {"src_lang": code, "tgt_lang": "en", "src": f"{theirs} {n}.", "tgt": f"{english} {n}."}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    base = configs.load(str(ROOT / "configs" / "sample.py"))
    contrastive = dataclasses.replace(base.objective.contrastive, layer=1)
    config = dataclasses.replace(
        base,
        model=str(model),
        objective=dataclasses.replace(base.objective, contrastive=contrastive),
        data=dataclasses.replace(
            base.data, parallel=(str(folder / "few.jsonl"),), cache=str(folder / "cache"), validation=8, row_length=128
        ),
        training=dataclasses.replace(
            base.training,
            rows=8,
            steps=STEPS,
            epochs=1.0,
            save_every=2,
            validate_every=4,
            keep=2,
            compute_dtype="float32",
        ),
    )
    source = loading.find(str(model))
    data = pipeline.build(config, "1", tokenizer.load(source.huggingface))
    return config, source, data


@pytest.fixture
def train(prepared):
    return Trainer(*prepared)


@pytest.fixture(scope="module")
def undisturbed(prepared, tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    Trainer(*prepared)(folder)
    return folder / "stage1"


def saved(folder: pathlib.Path) -> list[int]:
    return sorted(int(f.name) for f in (folder / "checkpoints").iterdir() if f.name.isdigit())


def arrays(folder: pathlib.Path, step: int, part: str | None = None) -> list[np.ndarray]:
    """Of a checkpoint, read by Orbax alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the shardings are those of the file
        found = ocp.load_checkpointables(folder / "checkpoints" / str(step))
    return [np.asarray(x) for x in jax.tree.leaves(found[part] if part else found)]


def records(folder: pathlib.Path) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if not k.endswith(("per_second", "input_wait"))} for line in lines
    ]


def test_a_run_asked_to_stop_saves_and_ends_bit_for_bit_where_it_would_have(train, tmp_path, undisturbed):
    with pytest.raises(exits.Interrupted, match=rf"after step 3 of {STEPS}, which is saved"):
        train(tmp_path, stop=3)
    there = tmp_path / "stage1"
    assert saved(there)[-1] == 3 and [r["step"] for r in records(there) if r["kind"] == "train"] == [1, 2, 3]
    with (there / "metrics.jsonl").open("a") as file:  # as if it had gone on and been killed before the next save
        file.write('{"kind": "train", "step": 4, "loss": 0.0}\n{"kind": "validation", "step": 4, "lo')
    train(tmp_path)
    assert f"continuing {there} from step 3 of {STEPS}" in train.out.getvalue()
    assert records(there) == records(undisturbed)
    for a, b in zip(arrays(there, STEPS), arrays(undisturbed, STEPS), strict=True):
        np.testing.assert_array_equal(a, b)
    before = {f: f.read_bytes() for f in there.rglob("*") if f.is_file() and "tensorboard" not in f.parts}
    result = train(tmp_path)
    assert f"all {STEPS} steps are done already" in train.out.getvalue() and result.after["loss"] > 0
    assert {f: f.read_bytes() for f in there.rglob("*") if f.is_file() and "tensorboard" not in f.parts} == before


def test_the_losses_are_weighed_before_the_first_step_and_now_and_then(train, tmp_path, undisturbed, monkeypatch):
    """After a fifth of the steps and at validations; shown once, also where a run goes on."""
    assert [r["step"] for r in records(undisturbed) if r["kind"] == "balance"] == [0, 2, 4, STEPS]
    monkeypatch.setattr(balance, "is_at_chance", lambda values: True)
    with pytest.raises(exits.Interrupted):
        train(tmp_path, stop=3)
    train(tmp_path)
    said = train.out.getvalue()
    assert said.count("the losses before the first step") == said.count("layer 1: mean cosine of translations") == 1
    assert said.count("after a fifth of the run the contrastive loss is") == 1 and "WARNING: step 2: " in said


def test_states_that_are_all_equal_are_refused_before_the_first_step(train, tmp_path, monkeypatch):
    monkeypatch.setattr(balance, "is_dead", lambda values: True)
    with pytest.raises(exits.UserError, match=r"^--objective.contrastive.layer=1: the pooled states of all sentences"):
        train(tmp_path)
    assert [r["kind"] for r in records(tmp_path / "stage1")] == ["validation", "balance"]


def test_changed_settings_are_written_down_once_a_step_was_made_with_them(prepared, undisturbed, tmp_path, monkeypatch):
    """Until then the former command goes on, whatever becomes of the changed one."""
    train = Trainer(*prepared)
    with pytest.raises(exits.Interrupted):
        train(tmp_path, stop=2)
    there = tmp_path / "stage1"
    before = {name: (there / name).read_bytes() for name in ("config.json", "lineage.json", "data.json")}
    faster = dataclasses.replace(train.config.optimizer, learning_rate=1.0)
    changed = dataclasses.replace(train.config, optimizer=faster, accept_changes=True)

    def fails(*_):
        raise RuntimeError("the first step fails")

    with monkeypatch.context() as patch:
        instead(patch, lambda step: fails)
        with pytest.raises(RuntimeError, match="the first step fails"):
            dataclasses.replace(train, config=changed)(tmp_path)
    assert {name: (there / name).read_bytes() for name in before} == before
    whole = shutil.copytree(there, tmp_path / "copy" / "stage1")
    dataclasses.replace(train, config=changed)(tmp_path)
    assert (there / "config.1.json").read_bytes() == before["config.json"]
    assert configs.load(str(there)).optimizer.learning_rate == 1.0
    train(whole.parent)
    assert records(whole) == records(undisturbed)


def test_a_stage_is_compared_with_what_it_began_with_alone(prepared, undisturbed, tmp_path):
    _, source, _ = prepared
    stage = loading.find(str(undisturbed))
    assert stage.start == str(source.huggingface) and stage.lineage.start.weights == source.weights
    loading.check_lineage([source, stage])
    folder = pathlib.Path(shutil.copytree(undisturbed, tmp_path / "stage1"))
    other = dataclasses.replace(stage.lineage, start=dataclasses.replace(stage.lineage.start, weights="0"))
    (folder / lineage.FILE).write_text(lineage.text(other))
    loading.check_lineage([loading.find("sample"), loading.find(str(folder))])
    with pytest.raises(exits.UserError, match=rf"^{folder} was trained from other weights than .*digest 0 then, "):
        loading.check_lineage([source, loading.find(str(folder))])


@pytest.mark.slow
def test_other_meshes_go_on_with_the_same_data(train, tmp_path, undisturbed):
    for mesh in ("8x1", "4x2"):
        with pytest.raises(exits.Interrupted):
            train(tmp_path, mesh, stop=2)
    train(tmp_path, "2x1")
    mixed, whole = records(tmp_path / "stage1"), records(undisturbed)
    assert [(r["kind"], r["step"], r.get("tokens"), r.get("pairs")) for r in mixed] == [
        (r["kind"], r["step"], r.get("tokens"), r.get("pairs")) for r in whole
    ]
    for a, b in zip(mixed, whole, strict=True):
        for name in ("loss", "next_token", "contrastive", "language_matching"):
            np.testing.assert_allclose(a[name], b[name], rtol=2e-5)


def test_a_checkpoint_never_has_fewer_metrics_than_its_own(train, tmp_path, monkeypatch):
    """They are on disk before its writing begins: whatever is lost later, none up to its step is."""
    log, happened = metrics.MetricsLog.sync, []

    def sync(self):
        log(self)
        happened.append((tmp_path / "stage1" / "metrics.jsonl").read_text().count('"train"'))

    save = checkpoints.Checkpoints.save
    monkeypatch.setattr(metrics.MetricsLog, "sync", sync)
    monkeypatch.setattr(
        checkpoints.Checkpoints, "save", lambda self, step, *rest: (happened.append(-step), save(self, step, *rest))
    )
    train(tmp_path)
    assert happened == [2, -2, 4, -4, 6, -6]


def test_what_is_not_finite_stops_the_run_and_is_kept(train, tmp_path):
    with pytest.raises(exits.Diverged) as stopped:
        train(tmp_path, data=train.spoilt(4, with_nan))
    there, ids = tmp_path / "stage1", train.data.train.example_ids(3)
    message = str(stopped.value)
    assert message.startswith("step 4: gradient_norm, loss, next_token, tokens not finite; ")
    assert f"examples {', '.join(ids[:3])} and {len(ids) - 3} more" in message
    assert f"last good checkpoint: {there}/checkpoints/2;" in message and "--on-nonfinite=skip" in message
    assert saved(there) == [2]
    batch = np.load(there / "nonfinite-4" / "batch.npz", allow_pickle=False)
    np.testing.assert_array_equal(batch["tokens"], next(iter(train.data.train.batches(3))).tokens)
    assert np.isnan(batch["loss_weights"][0, 5])
    lines = (there / "nonfinite-4" / "examples.jsonl").read_text().splitlines()
    assert [json.loads(line)["origin"] for line in lines] == ids and "source" in json.loads(lines[0])


def test_a_full_disk_does_not_hide_what_is_not_finite(train, tmp_path, monkeypatch):
    """Neither the save under way nor the examples can be written; the step and the examples are named all the same."""
    Full(monkeypatch, 2)
    monkeypatch.setattr(checkpoints.Checkpoints, "poll", lambda self: None)

    def full(path, **arrays):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(exits.Diverged) as stopped:
        train(tmp_path, data=train.spoilt(3, with_nan))
    there, ids = tmp_path / "stage1", train.data.train.example_ids(2)
    assert str(stopped.value).startswith(
        f"step 3: gradient_norm, loss, next_token, tokens not finite; examples {', '.join(ids[:3])} and {len(ids) - 3} "
        f"more could not be kept in {there}/nonfinite-3 (No space left on device); last good checkpoint: none; "
    )
    (note,) = stopped.value.__notes__
    assert note.startswith(f"{there}/checkpoints/2: the checkpoint could not be written (No space left on device); ")


def test_what_is_not_finite_is_left_out_if_asked_for(train, tmp_path):
    every = dict(data=train.spoilt(3, with_nan), save_every=1, keep=STEPS)
    with pytest.raises(exits.Diverged):
        train(tmp_path, **every)
    result = train(tmp_path, **every, on_nonfinite="skip")  # the same run goes on
    for a, b, c in zip(*(arrays(tmp_path / "stage1", n, "decoder") for n in (2, 3, 4)), strict=True):
        np.testing.assert_array_equal(a, b)
        assert not np.array_equal(b, c)
    assert result.skipped == 1 and result.best_step
    there = {r["step"]: r for r in records(tmp_path / "stage1") if r["kind"] == "train"}
    assert sorted(there) == list(range(1, STEPS + 1)) and there[3]["loss"] is None
    assert [there[n].get("skipped") for n in range(3, STEPS + 1)] == [1, 0, 0, 0]
    assert (
        "step 3: gradient_norm, loss, next_token, tokens not finite" in train.out.getvalue()
        and "update left out (1 so far)" in train.out.getvalue()
    )


def instead(monkeypatch, of):
    """The stage takes `of(compiled step)` for its step."""
    beside = compiling.beside

    def compiled(*args):
        other = concurrent.futures.Future()
        other.set_result(of(beside(*args).result()))
        return other

    monkeypatch.setattr(compiling, "beside", compiled)


def test_the_step_compiled_ahead_is_the_one_that_trains(train, undisturbed, tmp_path, monkeypatch):
    made, beside = [], compiling.beside
    monkeypatch.setattr(compiling, "beside", lambda *given: made.append(beside(*given)) or made[-1])
    train(tmp_path, ahead=True)
    assert len(made) == 1 and made[0].done()
    assert records(tmp_path / "stage1") == records(undisturbed)
    train(tmp_path, ahead=True)
    assert len(made) == 1  # a finished stage needs no step


def test_a_step_compiled_ahead_without_room_for_the_pairs_is_compiled_again(train, undisturbed, tmp_path, monkeypatch):
    made, beside = [], compiling.beside
    monkeypatch.setattr(compiling, "beside", lambda *given: made.append(given) or beside(*given))
    monkeypatch.setattr(build, "expected_pairs", lambda config, mesh: 4)
    train(tmp_path, ahead=True)
    assert len(made) == 2
    for one, other in zip(records(tmp_path / "stage1"), records(undisturbed), strict=True):
        assert one.pop("kind") == other.pop("kind") and one == pytest.approx(other, rel=1e-4)


def test_a_layer_that_is_still_to_be_chosen_compiles_nothing_ahead(train, tmp_path):
    auto = dataclasses.replace(train.config.objective.contrastive, layer="auto")
    config = dataclasses.replace(train.config, objective=dataclasses.replace(train.config.objective, contrastive=auto))
    assert build.compile_ahead(config, tmp_path, train.source, sharding.make_mesh("2x1")) is None


@pytest.fixture
def checks():
    """`_check` of a stage whose earlier steps had these records; its values are those of the contrastive loss."""

    def checks(*before: dict):
        one = loop.Stage.__new__(loop.Stage)
        one.plan = types.SimpleNamespace(weights={"next_token": 1.0, "contrastive": 1.0})
        one.connected, one.silent = set(loop._connected(before)), set()

        def check(step: int, loss: float, reach: float, pairs: int = 8) -> None:
            one._check(step, {"contrastive": loss, "reach/contrastive": reach, "pairs": pairs})

        return check

    return checks


def test_a_loss_that_is_learnt_is_not_disconnected(checks):
    check = checks()
    for step, size in enumerate([0.7, 1e-21, 1e-44, 0.0, 0.0, 0.0], start=1):
        check(step, size, size)
    again = checks({"step": 4, "reach/contrastive": None}, {"step": 3, "reach/contrastive": 1e-44})
    again(5, 0.0, 0.0)
    again(6, 0.0, 0.0)


def test_a_loss_that_is_rounded_to_0_reaches_the_model(checks):
    check = checks()
    for step in (1, 2, 3):
        check(step, 0.0, 1e-9)


@pytest.mark.parametrize("loss", [0.7, 0.0])
def test_a_loss_that_never_reached_the_model_stops_the_run(checks, loss):
    check = checks({"step": 1, "reach/contrastive": 0.0, "reach/language_matching": 0.3})
    check(1, loss, 0.0)
    check(2, loss, 0.0, pairs=1)  # nothing to compare with
    check(3, loss, 0.0)
    with pytest.raises(exits.Diverged, match=r"steps 3 and 4: contrastive is .* does not reach the model"):
        check(4, loss, 0.0)


def test_a_state_that_is_not_finite_is_not_saved(train, tmp_path, monkeypatch):
    def spoiling(step):
        def train_step(state, *rest):
            state, values = step(state, *rest)
            norm = state.params["decoder"]["norm"]
            nan = jax.device_put(norm.at[3].set(np.nan), norm.sharding)
            params = {**state.params, "decoder": {**state.params["decoder"], "norm": nan}}
            return (dataclasses.replace(state, params=params) if state.step == 2 else state), values

        return train_step

    instead(monkeypatch, spoiling)
    with pytest.raises(exits.Diverged, match="step 2: the state after it is not finite"):
        train(tmp_path)
    assert saved(tmp_path / "stage1") == []


@pytest.mark.parametrize("where", ["data", "device"])
def test_a_stall_is_told(train, tmp_path, monkeypatch, where):
    data = None

    def slow_call(value):
        time.sleep(1.5)
        return value

    def slow(step):
        count = itertools.count(1)
        return lambda *given: (slow_call if next(count) == 3 else lambda x: x)(step(*given))

    if where == "data":
        data = train.spoilt(3, slow_call)
    else:
        instead(monkeypatch, slow)
    train(tmp_path, data=data, stall_seconds=1.0)
    said = re.findall(r"stalled: (waiting for the \w+) (?:of|at) step 3 of 6 for", train.out.getvalue())
    assert said == [f"waiting for the {where}"]
    assert "in slow_call" in (tmp_path / "stage1" / "stalls.txt").read_text()


class Full:
    """A disk without room for checksums from some step on."""

    def __init__(self, monkeypatch, step: int):
        self._write, self._step = storage.write, step
        monkeypatch.setattr(storage, "write", self)

    def __call__(self, path: pathlib.Path, text: str) -> None:
        if path.name == checkpoints.CHECKSUMS and int(path.parent.name.split(".")[0]) >= self._step:
            raise OSError(28, "No space left on device", str(path))
        self._write(path, text)


def test_a_save_that_fails_stops_the_run_before_the_next_one(train, tmp_path, monkeypatch):
    Full(monkeypatch, 4)
    with pytest.raises(exits.StorageError, match=r"checkpoints/4: .*No space left on device.* step 2 is intact"):
        train(tmp_path, save_every=2)
    assert saved(tmp_path / "stage1") == [2]
    monkeypatch.undo()
    train(tmp_path)
    assert saved(tmp_path / "stage1")[-1] == STEPS


def fails(error: Exception):
    """A method that raises `error` where object storage is called."""
    gcsfs = {"__name__": "gcsfs.core", "error": error}
    exec("def fail(*given): raise error", gcsfs)
    return gcsfs["fail"]


@pytest.mark.parametrize("broken", [True, False], ids=["after another error", "alone"])
def test_closing_hides_no_error(train, tmp_path, monkeypatch, broken):
    """A save under way, the metrics and the profiler's trace: each is closed, and each that fails is told."""
    if broken:
        Full(monkeypatch, 2)
        monkeypatch.setattr(checkpoints.Checkpoints, "poll", lambda self: None)
    monkeypatch.setattr(metrics.MetricsLog, "close", fails(ValueError("Forbidden")))
    monkeypatch.setattr(profiling.Profiler, "close", fails(ConnectionError("no network")))

    def breaks(batch):
        raise RuntimeError("the data source broke")

    with pytest.raises(RuntimeError) as stopped:
        train(tmp_path, data=train.spoilt(3, breaks) if broken else None)
    told = [str(stopped.value), *stopped.value.__notes__]
    if broken:
        assert told.pop(0) == "the data source broke"
        assert "checkpoints/2: the checkpoint could not be written (No space left on device)" in told.pop(0)
    else:
        assert isinstance(stopped.value, exits.StorageError) and saved(tmp_path / "stage1")[-1] == STEPS
    forbidden, unconnected = told
    assert forbidden.startswith(f"{tmp_path}/stage1: ValueError: Forbidden; what was saved is kept; ")
    assert unconnected.startswith(f"{tmp_path}/stage1: ConnectionError: no network; what was saved is kept; ")


def test_metrics_that_cannot_be_written_stop_the_run_with_a_sentence(train, tmp_path, monkeypatch):
    write = metrics.MetricsLog.write

    def full(self, kind, step, values):
        if step == 3:
            raise OSError(28, "No space left on device")
        write(self, kind, step, values)

    def still_full(self):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(metrics.MetricsLog, "write", full)
    monkeypatch.setattr(metrics.MetricsLog, "close", still_full)
    with pytest.raises(
        exits.StorageError, match=rf"^{tmp_path}/stage1: No space left on device; what was saved is kept"
    ) as stopped:
        train(tmp_path)
    assert not hasattr(stopped.value, "__notes__"), "it is told once"
    assert saved(tmp_path / "stage1") == [2]


def test_a_folder_that_is_gone_is_not_begun_anew(train, tmp_path):
    there = tmp_path / "stage1"

    def deletes(batch):
        shutil.rmtree(there)
        return batch

    with pytest.raises(exits.StorageError, match=rf"{there} is gone: nothing can be saved"):
        train(tmp_path, data=train.spoilt(2, deletes))  # nothing is being saved
    assert not there.exists()
