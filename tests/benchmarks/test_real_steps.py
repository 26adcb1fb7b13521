"""The first five optimizer steps of stage 1, as published, on two real models against the published step in PyTorch."""

import functools
import gc
import gzip
import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from alignx_jax import sharding
from alignx_jax.config import OptimizerConfig
from alignx_jax.data import prompts, tokenizer
from alignx_jax.models import huggingface
from alignx_jax.training import optimizer, state, step
from benchmarks.real import models
from benchmarks.torch_reference import AlignXTorch, Example, collate, optimizer_and_schedule, train_step
from tests.benchmarks.test_real_models import real  # noqa: F401
from tests.training import published

CODES = ("sw", "fi", "tr")
PAIRS, STEPS, TOTAL, LAYERS = 6, 5, 30, {"gemma3-270m": 11, "smollm2-135m": 15}
RATE = OptimizerConfig(learning_rate=2e-5, warmup_steps=2)
LOSSES = ("loss", "next_token", "contrastive", "language_matching")


def batches(folder: pathlib.Path, data: pathlib.Path) -> list[dict[str, torch.Tensor]]:
    """A micro-batch a step of real pairs in the translation prompt, left-padded as the published code does."""
    encoder, template, pairs = tokenizer.load(folder), prompts.load("alpaca"), []
    for code in CODES:
        with gzip.open(data / "train_parallel" / "pairs" / f"{code}-en.train.jsonl.gz", "rt", encoding="utf-8") as file:
            records = [json.loads(line) for line in itertools.islice(file, STEPS * PAIRS // len(CODES))]
        pairs.append([example(encoder, template, record, CODES.index(code)) for record in records])
    mixed = list(itertools.chain.from_iterable(zip(*pairs, strict=True)))
    made = [collate(mixed[n : n + PAIRS], pad_id=0) for n in range(0, len(mixed), PAIRS)]
    for inputs in made:
        begins = inputs["attention_mask"].argmax(dim=1)
        inputs["labels"][torch.arange(len(begins)), begins] = -100  # nothing predicts a row's first token
    return made


def example(encoder: tokenizer.Tokenizer, template: prompts.Template, record: dict, language: int) -> Example:
    """Each part of the prompt in tokens of its own, so that the spans are exact; the last token ends the text."""
    made = template.render_translation(record["src"], record["tgt"], record["src_lang"], record["tgt_lang"])
    (a, b), (c, d) = made.source, made.target
    parts = [made.text[:a], made.text[a:b], made.text[b:c], made.text[c:d]]
    first, *rest = (list(ids) for ids, _ in encoder.encode_batch(parts))
    ids = [encoder.begin(first), *(part[:40] for part in rest)]
    marks = [mark for mark, part in zip((0, 1, 0, 2), ids, strict=True) for _ in part]
    tokens = [token for part in ids for token in part]
    return {"input_ids": [*tokens, encoder.eos_id], "src_tgt_index": [*marks, 0], "src_lang": language, "tgt_lang": 9}


def theirs(
    folder: pathlib.Path, layer: int, rows: list[dict[str, torch.Tensor]]
) -> tuple[list[dict[str, float]], dict[str, np.ndarray]]:
    """Losses and norms of the gradient of each step, and the classifier's first weights."""
    torch.manual_seed(0)
    model = AlignXTorch(folder, layer, attn_implementation="eager")
    classifier = {
        name.partition("_")[0]: kernel.detach().numpy().T.copy()
        for name, kernel in model.language_matching_classifier.named_parameters()
    }
    adamw, schedule = optimizer_and_schedule(model, RATE.learning_rate, RATE.warmup_steps, TOTAL)
    made = (train_step(model, adamw, schedule, [inputs]) for inputs in rows)
    return [{name: float(np.mean(np.asarray(x))) for name, x in values.items()} for values in made], classifier


def ours(
    folder: pathlib.Path, layer: int, rows: list[dict[str, torch.Tensor]], classifier: dict[str, np.ndarray]
) -> list[dict[str, float]]:
    decoder = huggingface.load(folder, sharding.make_mesh("1x1"), jnp.float32)
    head = state.PairClassifier(decoder.config.hidden_size, 128, rngs=nnx.Rngs(0))
    for name, kernel in classifier.items():
        setattr(head, name, nnx.Param(jnp.asarray(kernel)))
    graph, params, frozen = state.split(state.AlignX(decoder, head))
    layers, options = decoder.config.num_layers, {"group_pairs": PAIRS, "chunk": 32, "remat": "none"}
    plan = published.recipe(layer, layers, jnp.float32, **options)
    del decoder, head
    tx = optimizer.build(RATE, TOTAL)
    now = state.TrainState(step=jnp.zeros((), jnp.int32), params=params, optimizer=tx.init(params), frozen=frozen)
    del params
    update = jax.jit(functools.partial(step.train_step, graph=graph, recipe=plan, config=RATE), donate_argnums=0)
    found = []
    for inputs in rows:
        batch = published.batch({name: x.numpy() for name, x in inputs.items()}, equal_weight=PAIRS)
        now, values = update(now, batch, TOTAL)
        found.append({name: float(x) for name, x in values.items()})
    return found


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize("name", models.SOURCES)
def test_five_steps_are_the_published_ones(real, shared, name):  # noqa: F811
    rows = batches(real / name, shared / "data")
    expected, classifier = theirs(real / name, LAYERS[name], rows)
    gc.collect()
    found = ours(real / name, LAYERS[name], rows, classifier)
    assert expected[0]["next_token"] - expected[-1]["next_token"] > 0.1, "they learn"
    for one, other in zip(found, expected, strict=True):
        for loss in LOSSES:
            np.testing.assert_allclose(one[loss], other[loss], rtol=1e-4, err_msg=loss)
        np.testing.assert_allclose(one["gradient_norm"], other["grad_norm"], rtol=1e-3)
