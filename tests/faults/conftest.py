"""What all runs of the bench start from, made once: a tiny model, a few lines of text, and where nothing disturbs."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import subprocess
import tempfile
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from alignx_jax.models import families, huggingface
from alignx_jax.models.decoder import Decoder
from alignx_jax.runs import companions, loading
from tests import processes
from tests.faults import program
from tests.faults.program import ROOT, Ended, Running, Stage
from tests.faults.tally import tally  # noqa: F401, a fixture

STEPS, SAVE_EVERY = 40, 2
SEED = int(os.environ.get("ALIGNX_FAULTS_SEED", "0"))


@dataclasses.dataclass(frozen=True)
class Bench:
    """Model, text, cache, and both stages as they end when nothing happens."""

    folder: pathlib.Path

    @property
    def model(self) -> pathlib.Path:
        return self.folder / "model"

    @property
    def cache(self) -> pathlib.Path:
        return self.folder / "cache"

    def whole(self, stage: int) -> Stage:
        return Stage(self.folder / "whole" / f"stage{stage}")

    def flags(self, run: pathlib.Path, stage: int | str, **flags) -> dict[str, object]:
        """Both stages train from models of their own, so that each can be run alone."""
        return {
            "config": ROOT / "configs" / "sample.py",
            "stage": stage,
            "mesh": "2x1",
            "model": self.whole(1).folder if stage == 2 else self.model,
            "run": run,
            "data.parallel": self.folder / "pairs.jsonl",
            "data.instructions": self.folder / "answers.jsonl",
            "data.instruction-weights": 1,
            "data.cache": self.cache,
            "data.validation": 8,
            "data.row-length": 64,
            "data.cutoff": 64,
            "training.rows": 8,
            "training.steps": STEPS,
            "training.save-every": SAVE_EVERY,
            "training.validate-every": 8,
            "training.keep": 2,
        } | {name.replace("__", ".").replace("_", "-"): value for name, value in flags.items()}

    def start(self, run: pathlib.Path, stage: int | str, **flags) -> Running:
        return self.started(self.flags(run, stage, **flags))

    def started(self, flags: dict[str, object]) -> Running:
        folder = pathlib.Path(tempfile.mkdtemp(dir=self.folder, prefix="process"))
        return Running(program.command(flags), folder, processes.environment())

    def finish(self, run: pathlib.Path, stage: int | str, **flags) -> Ended:
        with self.start(run, stage, **flags) as running:
            return running.wait()

    @contextlib.contextmanager
    def piped(self, run: pathlib.Path, stage: int | str, stdout=subprocess.PIPE) -> Iterator[subprocess.Popen]:
        """Started with pipes, or `stdout`, in the place of files; at the end it is gone."""
        command = program.command(self.flags(run, stage))
        process = subprocess.Popen(
            command, stdout=stdout, stderr=subprocess.PIPE, text=True, cwd=self.folder, env=processes.environment()
        )
        with process:
            try:
                yield process
            finally:
                process.kill()

    def assert_undisturbed(self, run: pathlib.Path, stage: int) -> None:
        """`run` ends as the undisturbed one: every array bit for bit, every record, none missing, none twice."""
        there, here = self.whole(stage), Stage(run / f"stage{stage}")
        assert here.metrics() == there.metrics()
        np.testing.assert_equal(here.state(STEPS), there.state(STEPS))
        assert here.saved[-1] == STEPS and not here.saving


@pytest.fixture(scope="session")
def bench(tmp_path_factory) -> Bench:
    """Made by the first process of the tests that needs it; the others wait."""
    base = tmp_path_factory.getbasetemp()
    made = Bench((base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "faults")
    made.folder.mkdir(exist_ok=True)
    with (made.folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (made.folder / "done").exists():
            _make(made)
            (made.folder / "done").touch()
    return made


def _make(bench: Bench) -> None:
    sample = loading.find("sample").huggingface
    settings = huggingface.read_config(sample)
    settings |= dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, head_dim=16)
    decoder = Decoder(families.decoder_config(settings, "test"), rngs=nnx.Rngs(0))
    huggingface.export(decoder, settings, bench.model, jnp.float32, 1e9)
    companions.copy(sample, bench.model)
    said = [("de", "Der Hund schläft", "The dog sleeps"), ("fr", "Le chat mange", "The cat eats")]
    pairs = [
        {"src_lang": code, "tgt_lang": "en", "src": f"{theirs} {n}.", "tgt": f"{english} {n}."}
        for n, (code, theirs, english) in enumerate(said * 60)
    ]
    answers = [{"instruction": f"Say {n}.", "output": f"I say {n} times."} for n in range(60)]
    for name, records in (("pairs", pairs), ("answers", answers)):
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (bench.folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    for stage in (1, 2):
        ended = bench.finish(bench.folder / "whole", stage)
        assert ended.code == 0, ended
        steps = [r["step"] for r in bench.whole(stage).metrics() if r["kind"] == "train"]
        assert steps == list(range(1, STEPS + 1))
