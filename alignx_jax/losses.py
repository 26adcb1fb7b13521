"""The two pair losses of AlignX as means, for other trainers: padded batches, one pair a row, any model's states.

    loss += 0.3 * losses.contrastive(states[middle], source_BxT, target_BxT)
    loss += 0.4 * losses.language_matching(states[-1], source_BxT, target_BxT, language_Bx2, classifier)

`alignx_jax.objectives` has the same losses as sums over packed rows, which a step with micro-batches divides once.

Shapes: B rows, T tokens, D hidden size, W width of the classifier.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from alignx_jax import sharding
from alignx_jax.objectives import contrastive as contrastive_objective
from alignx_jax.objectives import language_matching as matching_objective
from alignx_jax.objectives import pooling, standardization
from alignx_jax.objectives.language_matching import Classifier
from alignx_jax.objectives.standardization import Standardize

__all__ = ["Classifier", "contrastive", "language_matching"]


def contrastive(
    hidden_BxTxD: jax.Array,
    source_BxT: jax.Array,
    target_BxT: jax.Array,
    *,
    sentence_Bx2: jax.Array | None = None,
    temperature: float = 0.1,
    form: Literal["published", "symmetric"] = "published",
    standardize: Standardize = "batch",
) -> jax.Array:
    """Multilingual semantic alignment (arXiv 2509.24338, section 3.1): InfoNCE between the two sentences of a row.

    Every row meets every other, over all devices. A row whose source or target has no token is no pair: it neither
    counts nor acts as a negative; without any pair the loss is 0.

    Args:
      hidden_BxTxD: states of the layer to align (published: a middle one), in any float type; sentences are averaged
        in float32 at least.
      source_BxT: bool or 0/1, 1 where the token is part of the source sentence.
      target_BxT: the same for the target sentence.
      sentence_Bx2: int ids of source and target; equal numbers mean equal sentences. Rows that share one are no
        negatives of each other. Unset: all rows are (published).
      temperature: tau of the softmax over cosines.
      form: each source against all targets, halved, as published; or the mean of both directions.
      standardize: each dimension gets mean 0 and deviation 1 over the sentences of the batch; none: as published.

    Returns:
      The mean over pairs, a scalar.

    Raises:
      ValueError: inside `jax.set_mesh` of a mesh with an axis "data", whose size does not divide B.
    """
    arrays = hidden_BxTxD, source_BxT, target_BxT, sentence_Bx2
    return _on_any_mesh(_contrastive, arrays, temperature=temperature, form=form, standardize=standardize)


def _contrastive(hidden_BxTxD, source_BxT, target_BxT, sentence_Bx2, *, temperature, form, standardize) -> jax.Array:
    valid_GxN = _in_groups(_pairs(source_BxT, target_BxT))
    duplicates = "keep" if sentence_Bx2 is None else "mask"
    sentence_Bx2 = jnp.zeros((len(source_BxT), 2), int) if sentence_Bx2 is None else sentence_Bx2
    total = contrastive_objective.contrastive(
        *jnp.split(_sentences(hidden_BxTxD, (source_BxT, target_BxT), valid_GxN, standardize), 2, axis=1),
        valid_GxN,
        _in_groups(sentence_Bx2[:, 0]),
        _in_groups(sentence_Bx2[:, 1]),
        temperature=temperature,
        form=form,
        scope="global",
        duplicates=duplicates,
    )
    return total / jnp.maximum(contrastive_objective.weight(valid_GxN), 1)


def language_matching(
    hidden_BxTxD: jax.Array,
    source_BxT: jax.Array,
    target_BxT: jax.Array,
    language_Bx2: jax.Array,
    classifier: Classifier,
    *,
    activation: Callable[[jax.Array], jax.Array] = jax.nn.silu,
    standardize: Standardize = "batch",
) -> jax.Array:
    """Language feature integration (arXiv 2509.24338, section 3.2): are two sentences of the batch in one language?

    All ordered pairs of the 2B sentences are classified, over all devices. As published, a sentence is the mean of the
    states that PREDICT its tokens, one position to the left. A row whose source or target has no token is left out.

    Args:
      hidden_BxTxD: states of the layer to match (published: the last, after the final norm), in any float type.
      source_BxT: bool or 0/1, 1 where the token is part of the source sentence.
      target_BxT: the same for the target sentence.
      language_Bx2: int ids of the languages of source and target; only equality matters.
      classifier: weights to train beside the model, `PairClassifier(D, 128, rngs=rngs).weights()` for example.
      activation: of the classifier (published: that of the model's MLP).
      standardize: each dimension gets mean 0 and deviation 1 over the sentences of the batch; none: as published.

    Returns:
      The mean over ordered pairs, a scalar; 0 without any.

    Raises:
      ValueError: inside `jax.set_mesh` of a mesh with an axis "data", whose size does not divide B.
    """
    arrays = hidden_BxTxD, source_BxT, target_BxT, language_Bx2, classifier
    return _on_any_mesh(_language_matching, arrays, activation=activation, standardize=standardize)


def _language_matching(
    hidden_BxTxD, source_BxT, target_BxT, language_Bx2, classifier, *, activation, standardize
) -> jax.Array:
    one_example = jnp.ones(source_BxT.shape, int)
    before = [pooling.predicting(jnp.asarray(span, int), one_example) for span in (source_BxT, target_BxT)]
    valid_GxN = _in_groups(_pairs(*before))
    valid_Gx2N = jnp.tile(valid_GxN, (1, 2))
    total = matching_objective.language_matching(
        _sentences(hidden_BxTxD, before, valid_GxN, standardize),
        jnp.concatenate([_in_groups(language_Bx2[:, side]) for side in (0, 1)], axis=1),
        valid_Gx2N,
        classifier,
        activation=activation,
        scope="global",
    )
    return total / jnp.maximum(matching_objective.weight(valid_Gx2N, "global"), 1)


def _on_any_mesh(loss: Callable[..., jax.Array], arrays: tuple[Any, ...], **options: Any) -> jax.Array:
    """`loss(*arrays, **options)`; the compiler shards what is inside, also over axes that are Explicit outside."""
    meshes = (jax.sharding.get_abstract_mesh(), *(jax.typeof(x).sharding.mesh for x in jax.tree.leaves(arrays)))
    mesh = next((mesh for mesh in meshes if not mesh.empty), meshes[0])
    if AxisType.Explicit not in mesh.axis_types:
        return loss(*arrays, **options)
    return _on_explicit_axes(loss, mesh, tuple(options.items()), *arrays)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))  # axes change their type only where JAX traces
def _on_explicit_axes(loss, mesh: AbstractMesh, options: tuple[tuple[str, Any], ...], *arrays) -> jax.Array:
    scalar = jax.NamedSharding(mesh, jax.P())
    return jax.sharding.auto_axes(functools.partial(loss, **dict(options)), out_sharding=scalar)(*arrays)


def _sentences(
    hidden_BxTxD: jax.Array, spans: Sequence[jax.Array], valid_GxN: jax.Array, standardize: Standardize
) -> jax.Array:
    """[G,2N,D]: the means over two spans, standardized if asked for."""
    x_Gx2NxD = jnp.concatenate([_in_groups(_means(hidden_BxTxD, span)) for span in spans], axis=1)
    if standardize == "none":
        return x_Gx2NxD
    return standardization.standardize(x_Gx2NxD, jnp.tile(valid_GxN, (1, 2)), "global")


def _means(hidden_BxTxD: jax.Array, span_BxT: jax.Array) -> jax.Array:
    high = jnp.promote_types(hidden_BxTxD.dtype, jnp.float32)
    weights_Bx1xT = pooling.span_means(jnp.asarray(span_BxT, int), 1, high)
    return jnp.einsum("bst,btd->bd", weights_Bx1xT, hidden_BxTxD.astype(high), precision=jax.lax.Precision.HIGHEST)


def _pairs(source_BxT: jax.Array, target_BxT: jax.Array) -> jax.Array:
    return jnp.any(source_BxT != 0, axis=1) & jnp.any(target_BxT != 0, axis=1)


def _in_groups(x_Bx___: jax.Array) -> jax.Array:
    """[G,B/G,...]: a group for each device of the mesh's data axes, as the objectives want them; else one."""
    groups = sharding.data_shards(jax.sharding.get_abstract_mesh())
    if len(x_Bx___) % groups:
        raise ValueError(f"{len(x_Bx___)} rows do not divide over the {groups} data shards of the mesh")
    return x_Bx___.reshape(groups, -1, *x_Bx___.shape[1:])
