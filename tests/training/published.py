"""The published runs as our batches and weights; see shared/reference/SEMANTICS.md."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file

from alignx_jax.batch import Batch
from alignx_jax.config import ObjectiveConfig
from alignx_jax.models import huggingface
from alignx_jax.training import state, step


def batch(inputs, prefix: str = "", labels: np.ndarray | None = None, *, equal_weight: int = 0) -> Batch:
    """One example a row. `labels` are those with BOS masked unless given; rows of the published filter count nowhere.

    `equal_weight`: rows of a micro-batch whose labels are weighted to sum to 1, as a mean of means weighs them.
    """
    get = {k: np.asarray(inputs[prefix + k]) for k in ("input_ids", "attention_mask", "src_tgt_index")}
    index, mask = get["src_tgt_index"], get["attention_mask"]
    languages = [np.asarray(inputs[prefix + k])[:, None] for k in ("src_lang", "tgt_lang")]
    if labels is None:
        labels = mask_bos(np.asarray(inputs[prefix + "labels"]), mask)
    kept = index[:, -4] == 2
    weights = ((labels != -100) & kept[:, None]).astype(np.float64)
    if equal_weight:
        for first in range(0, len(weights), equal_weight):
            weights[first : first + equal_weight] /= weights[first : first + equal_weight, 1:].sum()
    rows, length = mask.shape
    numbers = np.arange(2 * rows, dtype=np.int32).reshape(2, rows, 1)
    return Batch(
        tokens=get["input_ids"],
        positions=np.tile(np.arange(length, dtype=np.int32), (rows, 1)),  # published: padding is counted
        segments=mask,
        loss_weights=weights,
        source_span=(index == 1).astype(np.int32),
        target_span=(index == 2).astype(np.int32),
        source_language=languages[0],
        target_language=languages[1],
        source_hash=numbers[0],
        target_hash=numbers[1],
        line_hash=numbers[0],
        valid=kept[:, None],
    )


def mask_bos(labels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Nothing predicts a sequence's first token."""
    labels = labels.copy()
    labels[np.arange(len(labels)), mask.argmax(axis=1)] = -100
    return labels


def stack(*batches: Batch) -> Batch:
    """One batch of all rows, the shorter ones padded on the right."""
    length = max(b.tokens.shape[1] for b in batches)

    def wide(x: np.ndarray) -> np.ndarray:
        return x if x.shape[1] == 1 else np.pad(x, ((0, 0), (0, length - x.shape[1])))

    return jax.tree.map(lambda *x: np.concatenate([wide(one) for one in x]), *batches)


@dataclasses.dataclass(frozen=True)
class Model:
    """Weights of a reference case in the tree that the step trains."""

    graph: nnx.GraphDef
    params: dict
    folder: pathlib.Path

    @property
    def align_layer(self) -> int:
        return json.loads((self.folder / "config.json").read_text())["align_layer"]


def model(folder: pathlib.Path, mesh, dtype) -> Model:
    decoder = huggingface.load(folder, mesh, dtype)
    weights = load_file(folder / "model.safetensors")
    classifier = state.PairClassifier(decoder.config.hidden_size, 128, rngs=nnx.Rngs(0), dtype=dtype)
    for name in ("gate", "up", "down"):
        kernel = weights[f"language_matching_classifier.{name}_proj.weight"].T
        setattr(classifier, name, nnx.Param(jnp.asarray(kernel, dtype)))
    graph, variables = nnx.split(state.AlignX(decoder, classifier), nnx.Param)
    return Model(graph, nnx.to_pure_dict(variables), folder)


def recipe(align_layer: int, layers: int, dtype, **changes) -> step.Recipe:
    """The published objective on one device."""
    settings = dict(
        objective=ObjectiveConfig(duplicates="keep", standardize="none"),
        contrastive_layer=align_layer,
        matching_layer=layers,
        pairs=True,
        groups=1,
        group_pairs=6,
        chunk=13,
        accumulation=1,
        compute_dtype=jnp.dtype(dtype),
        remat="block",
    )
    return step.Recipe(**settings | changes)


def named(params: dict, vocab_size: int) -> dict[str, np.ndarray]:
    """Our parameters under the published names and in their layouts; padded vocabulary rows cut."""
    decoder = jax.tree.map(np.asarray, params["decoder"])
    found = {"model.embed_tokens.weight": decoder["embedding"][:vocab_size], "model.norm.weight": decoder["norm"]}
    if decoder.get("output") is not None:
        found["lm_head.weight"] = decoder["output"][:vocab_size]
    layers = decoder["layers"]
    for n in range(len(layers["query"])):
        of = {name: array[n] for name, array in layers.items() if array is not None}
        here = {
            **{f"self_attn.{k[0]}_proj": of[k].reshape(of[k].shape[0], -1).T for k in ("query", "key", "value")},
            "self_attn.o_proj": of["attention_output"].reshape(-1, of["attention_output"].shape[-1]).T,
            **{f"mlp.{k}_proj": of[k].T for k in ("gate", "up", "down")},
            "input_layernorm": of["attention_norm"],
            "post_attention_layernorm": of["mlp_norm"],
        }
        found |= {f"model.layers.{n}.{name}.weight": array for name, array in here.items()}
    for name, kernel in params["classifier"].items():
        found[f"language_matching_classifier.{name}_proj.weight"] = np.asarray(kernel).T
    return found
