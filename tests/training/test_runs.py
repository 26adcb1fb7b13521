"""A whole stage as a user starts it: what it says, and what it leaves behind."""

import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from alignx_jax import sharding
from alignx_jax.models import families, huggingface
from alignx_jax.models.decoder import Decoder
from alignx_jax.runs import companions, loading
from alignx_jax.training import metrics
from alignx_jax.training.checkpoints import Checkpoints
from tests import processes

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> pathlib.Path:
    """A random Llama with the sample's tokenizer, in a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    sample = loading.find("sample").huggingface
    settings = huggingface.read_config(sample)
    settings |= dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, head_dim=16)
    decoder = Decoder(families.decoder_config(settings, "test"), rngs=nnx.Rngs(0))
    huggingface.export(decoder, settings, folder, jnp.float32, 1e9)
    companions.copy(sample, folder)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> pathlib.Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def command(tiny, cache):
    """The program on a corpus of a few lines, 24 steps on two devices."""
    pairs = cache / "few.jsonl"
    languages = [("de", "Der Hund schläft", "The dog sleeps"), ("fr", "Le chat mange", "The cat eats")]
    with pairs.open("w", encoding="utf-8") as file:
        for n in range(120):
            code, theirs, english = languages[n % 2]
            record = {"src_lang": code, "tgt_lang": "en", "src": f"{theirs} {n}.", "tgt": f"{english} {n}."}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def make(run: pathlib.Path, **flags) -> list[str]:
        settings = {
            "config": ROOT / "configs" / "sample.py",
            "stage": 1,
            "mesh": "2x1",
            "model": tiny,
            "run": run,
            "data.parallel": pairs,
            "data.cache": cache,
            "data.validation": 8,
            "training.rows": 4,
            "training.steps": 24,
            "training.save-every": 4,
            "training.validate-every": 8,
            "training.keep": 1,
            "data.instruction-weights": 1,
        }
        settings |= {k.replace("__", "."): v for k, v in flags.items()}
        return [sys.executable, str(ROOT / "run.py"), *(f"--{k}={v}" for k, v in settings.items())]

    return make


def finish(command: list[str]) -> str:
    environment = processes.environment()
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def parameters(folder: pathlib.Path, step: int) -> list[np.ndarray]:
    """Every array of a checkpoint's decoder."""
    mesh = sharding.make_mesh("1x1")
    _, params = loading.abstract_decoder(loading.find(str(folder)).decoder_config())
    like = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        params,
        sharding.parameter_shardings(params, mesh),
    )
    checkpoints = Checkpoints(folder / "checkpoints")
    return jax.tree.leaves(jax.device_get(checkpoints.restore_part(step, {"decoder": like})))


@pytest.mark.slow
def test_what_negatives_of_the_whole_step_cost_is_said_first(tmp_path, command):
    said = "each step runs the layers forward once more"
    few = {"training__accumulation": 2, "training__steps": 2}
    assert said in finish(command(tmp_path / "step", objective__negatives="step", **few))
    assert said not in finish(command(tmp_path / "global", **few))
    weights = {"objective__contrastive__weight": 0, "objective__language-matching__weight": 0}
    assert said not in finish(command(tmp_path / "none", objective__negatives="step", **weights, **few))


@pytest.mark.slow
def test_both_stages_and_what_they_leave_behind(tmp_path, command, cache):
    answers = cache / "answers.json"
    answers.write_text(json.dumps([{"instruction": f"Say {n}.", "output": f"I say {n} times."} for n in range(60)]))
    run = tmp_path / "run"
    out = finish(command(run, profile="3-4"))
    assert list(run.glob("stage1/profile/plugins/profile/*/*.xplane.pb")) and "first step" in out
    assert "next-token" in out and "contrastive" in out and "tokens/s" in out and str(run / "stage1") in out
    finish(command(run, stage=2, data__instructions=answers, model="None", optimizer__kind="adafactor"))
    for stage in ("stage1", "stage2"):
        folder = run / stage
        steps = [r["step"] for r in metrics.read(folder, "train")]
        rates = metrics.read(folder, "train")[-1]
        assert 0 <= rates["input_wait"] <= 1 and rates["host_tokens_per_second"] > 0 and "mfu" not in rates, "on a CPU"
        assert steps == list(range(1, 25)), "no gap, no step twice"
        assert [r["step"] for r in metrics.read(folder, "validation")] == [0, 8, 16, 24]
        assert list((folder / "tensorboard").glob("events.*"))
        assert loading.find(str(folder)).run
    first, last = (metrics.read(run / "stage1", "validation")[n] for n in (0, -1))
    assert last["loss"] < first["loss"]
    assert {"next_token", "contrastive", "language_matching"} <= set(first)
    assert set(metrics.read(run / "stage2", "train")[0]) & {"contrastive", "language_matching"} == set()
    finish(command(run, stage="export", model="None"))
    card = (run / "export" / "README.md").read_text(encoding="utf-8")
    assert (
        "### Stage 1" in card
        and "### Stage 2" in card
        and "24 steps" in card
        and str(tmp_path) not in card.split("## How")[0]
    )
    finish(command(run, stage="export", model=run / "stage1", export__to=run / "first"))
    import torch
    import transformers

    exported = transformers.AutoModelForCausalLM.from_pretrained(run / "first", dtype=torch.float32)
    (trained,) = [a for a in parameters(run / "stage1", 24) if a.shape == (32,)]
    np.testing.assert_array_equal(exported.model.norm.weight.detach().numpy(), trained)
