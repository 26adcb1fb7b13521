"""Makes everything embedded in this package again: `python -m alignx_jax.sample.make`.

First the corpus (corpus.py), then a sentencepiece tokenizer trained on it, then a Llama of 2 M parameters, pre-trained
from random weights on MONOLINGUAL text: sentences of the corpus's training split, one language a document, half of the
documents English. It sees no sentence beside its translation, so its languages are not aligned: that is the gap that
stage 1 closes. Everything is seeded; it took 26 minutes on 4 shared cores (2026-11-23).
"""

from __future__ import annotations

import argparse
import functools
import gzip
import io
import json
import pathlib
import random
import shutil
import tempfile
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
import sentencepiece
from flax import nnx

from alignx_jax import sharding
from alignx_jax.config import ObjectiveConfig, OptimizerConfig
from alignx_jax.console import Screen
from alignx_jax.data import packing, prompts, tokenizer
from alignx_jax.models import families, huggingface
from alignx_jax.models.decoder import Decoder
from alignx_jax.sample import corpus
from alignx_jax.training import optimizer, progress, state, step

HERE = pathlib.Path(__file__).resolve().parent
VOCABULARY = 4096
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "initializer_range": 0.02,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "bfloat16",
}
ENGLISH = 0.5  # share of the documents
ROWS, LENGTH, SLOTS = 16, 128, 16


def read(name: str) -> list[dict]:
    with gzip.open(HERE / "data" / name, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def train_tokenizer(sentences: list[dict[str, str]], folder: pathlib.Path) -> None:
    """Byte-fallback BPE as Llama's, on the training sentences, the instructions and the prompt."""
    template = prompts.load("alpaca")
    texts = [text for sentence in sentences for text in sentence.values()]
    texts += [record[field] for record in read("instructions.jsonl.gz") for field in ("instruction", "input", "output")]
    texts += [line for line in template.render("", " ", "").text.splitlines() for _ in range(200)]
    write_tokenizer(filter(None, texts), VOCABULARY, folder)


def write_tokenizer(texts: Iterable[str], vocabulary: int, folder: pathlib.Path, coverage: float = 1.0) -> None:
    """Trains byte-fallback BPE as Llama's, and writes it as Hugging Face folders have it.

    Args:
      coverage: share of the characters that get pieces of their own; the rest is written in bytes.
    """
    model = io.BytesIO()  # a file's path would be written into the model
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocabulary,
        character_coverage=coverage,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": False,
        **{f"{name}_token": text for name, text in (("bos", "<s>"), ("eos", "</s>"), ("unk", "<unk>"))},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "tokenizer.model").write_bytes(model.getvalue())


def documents(sentences: list[dict[str, str]], count: int, rng: random.Random) -> list[str]:
    """One to three sentences of one language each."""
    others = [code for code in sentences[0] if code != "en"]
    made = []
    for _ in range(count):
        code = "en" if rng.random() < ENGLISH else rng.choice(others)
        made.append(" ".join(s[code] for s in rng.sample(sentences, rng.randint(1, 3))))
    return made


def pretrain(sentences: list[dict[str, str]], encoder: tokenizer.Tokenizer, steps: int) -> Decoder:
    """Next-token training from random weights, with the step that stages 1 and 2 use."""
    mesh = sharding.make_mesh("1x1")
    config = families.decoder_config(LLAMA, "LLAMA")
    rng = random.Random(0)
    settings = OptimizerConfig(learning_rate=3e-3, warmup_steps=100, beta2=0.98, weight_decay=0.01)
    recipe = step.Recipe(
        objective=ObjectiveConfig(),
        contrastive_layer=0,
        matching_layer=0,
        pairs=False,
        groups=1,
        group_pairs=1,
        chunk=128,
        accumulation=1,
        compute_dtype=jnp.dtype("float32"),
        remat="attention",
    )
    with jax.set_mesh(mesh):
        decoder = Decoder(config, rngs=nnx.Rngs(0))
        graph, params, _ = state.split(state.build(decoder, None, seed=0))
        now = state.create(params, optimizer.build(settings, steps), mesh)
        update = step.compiled_for(now, graph=graph, recipe=recipe, config=settings)
        done = 0
        with progress.StageProgress(Screen(), "pre-training", 0, steps) as bar:
            while done < steps:
                for rows in _rows(encoder, documents(sentences, 2048, rng)):
                    placed = jax.tree.map(lambda x: sharding.place_rows(x, mesh), rows)
                    now, metrics = update(now, placed, steps)
                    done += 1
                    bar.step(done, {k: float(v) for k, v in metrics.items()})
                    if done == steps:
                        break
        return nnx.merge(graph, now.params).decoder


def _rows(encoder: tokenizer.Tokenizer, texts: list[str]):
    """Full batches of packed documents."""
    ids = [np.array([encoder.bos_id, *i, encoder.eos_id], np.int32)[:LENGTH] for i, _ in encoder.encode_batch(texts)]
    plan = packing.plan(np.array([len(i) for i in ids]), LENGTH, SLOTS, np.arange(len(ids)), [0])
    pack = functools.partial(packing.PackedExample, source=(0, 0), target=(0, 0), languages=(0, 0), hashes=(0, 0, 0))
    for first in range(0, len(plan) - ROWS + 1, ROWS):
        rows = [
            packing.assemble([pack(ids[n], np.ones(len(ids[n]), bool)) for n in plan[first + r]], LENGTH, SLOTS)
            for r in range(ROWS)
        ]
        yield jax.tree.map(lambda *x: np.stack(x), *rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000, help="pre-training steps of 16 rows x 128 tokens")
    arguments = parser.parse_args()
    corpus.write(HERE / "data")
    sentences = [record["text"] for record in read("parallel.train.jsonl.gz")]
    with tempfile.TemporaryDirectory() as folder:
        train_tokenizer(sentences, pathlib.Path(folder))
        decoder = pretrain(sentences, tokenizer.load(folder), arguments.steps)
        shutil.rmtree(HERE / "model", ignore_errors=True)
        huggingface.export(decoder, LLAMA, HERE / "model", "bfloat16", 1e9)
        shutil.copytree(folder, HERE / "model", dirs_exist_ok=True)


if __name__ == "__main__":
    main()
