"""The example in the trainer of another project: short, and its losses fall."""

import pathlib

import numpy as np
import optax
from flax import nnx

from alignx_jax.data import pipeline
from examples import another_trainer


def test_every_loss_falls_on_the_sample():
    sentences = pipeline.multiway("sample", ("de", "en", "fr"))
    rng, languages = np.random.default_rng(0), np.array(["de", "en", "fr"])
    model = another_trainer.TheirModel(32, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    history = []
    for _ in range(40):
        sides = np.stack([rng.permutation(3)[:2] for _ in range(16)])
        lines = rng.choice(len(sentences["en"]), 16, replace=False)
        pairs = [tuple(sentences[languages[s]][n].encode() for s in side) for side, n in zip(sides, lines, strict=True)]
        text, source, target = another_trainer.padded(pairs, 192)
        assert [bytes(text[0][span[0] == 1].tolist()) for span in (source, target)] == list(pairs[0])
        history.append(another_trainer.train_step(model, optimizer, text, source, target, sides))
    before, after = np.mean(history[:5], axis=0), np.mean(history[-5:], axis=0)
    assert (after < before).all(), (before, after)


def test_it_is_as_short_as_the_documentation_says():
    lines = pathlib.Path(another_trainer.__file__).read_text(encoding="utf-8").splitlines()
    assert len([line for line in lines if line.strip()]) < 40
