"""The training step: `(state, batch) -> (state, metrics)`, one function for both stages."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from alignx_jax import sharding
from alignx_jax.batch import Batch
from alignx_jax.config import ObjectiveConfig, OptimizerConfig
from alignx_jax.models import attention
from alignx_jax.objectives import contrastive, language_matching, next_token, pooling, standardization
from alignx_jax.training import optimizer
from alignx_jax.training.state import AlignX, Params, TrainState

LOSSES = ("next_token", "contrastive", "language_matching")
Metrics = dict[str, jax.Array]
Arrays = TypeVar("Arrays")
"""A tree of arrays that share their leading axis."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything static that shapes the compiled step."""

    objective: ObjectiveConfig
    contrastive_layer: int
    """Layers run before the state that is aligned."""
    matching_layer: int
    """Layers run before the state whose language is matched."""
    pairs: bool
    """Whether batches hold pairs (stage 1); without them only the next-token loss exists."""
    groups: int
    """Groups of rows for the pair losses: one a device of the data axes."""
    group_pairs: int
    """Most pairs that meet in one group: of one micro-batch, or of the whole step where `two_passes`."""
    chunk: int
    """Positions of each row whose logits exist at a time."""
    accumulation: int
    compute_dtype: jnp.dtype
    remat: str
    attention: attention.Kernel = "xla"

    @property
    def weights(self) -> dict[str, float]:
        """The factor of each loss; losses with factor 0 are not computed."""
        lambdas = {
            "contrastive": self.objective.contrastive.weight,
            "language_matching": self.objective.language_matching.weight,
        }
        return {"next_token": 1.0} | {k: w for k, w in lambdas.items() if self.pairs and w}

    @property
    def taps(self) -> tuple[int, ...]:
        """The layers whose pooled states the losses need."""
        layers = {"contrastive": self.contrastive_layer, "language_matching": self.matching_layer}
        return tuple(sorted({layers[k] for k in self.weights if k in layers}))

    @property
    def scope(self) -> pooling.Scope:
        """Whom a pair meets among those that one call of the pair losses gets."""
        return "micro-batch" if self.objective.negatives == "micro-batch" else "global"

    @property
    def two_passes(self) -> bool:
        """Whether pairs meet those of all micro-batches, so that a forward pass over all comes before the gradients."""
        return self.objective.negatives == "step" and bool(self.taps)


def split(batch: Arrays, recipe: Recipe) -> Arrays:
    """[R,...] -> [A,R/A,...]: every micro-batch takes its rows from every group, so that no row changes its device."""

    def micro(x: jax.Array) -> jax.Array:
        groups, steps = recipe.groups, recipe.accumulation
        x = x.reshape(groups, steps, x.shape[0] // (groups * steps), *x.shape[1:]).swapaxes(0, 1)
        return sharding.constrain_micro_batches(x.reshape(steps, -1, *x.shape[3:]))

    return jax.tree.map(micro, batch)


def join(x_AxRx___: jax.Array, recipe: Recipe) -> jax.Array:
    """[A,R/A,...] -> [R,...], what `split` was given."""
    x = x_AxRx___.reshape(recipe.accumulation, recipe.groups, -1, *x_AxRx___.shape[2:]).swapaxes(0, 1)
    return sharding.constrain(x.reshape(-1, *x.shape[3:]), "rows")


def loss_weights(batch: Batch, recipe: Recipe) -> dict[str, jax.Array]:
    """What each loss's sum over the step is divided by: known from the batch before any forward pass."""
    counts = {
        "next_token": next_token.weight,
        "contrastive": contrastive.weight,
        "language_matching": lambda valid_GxN: language_matching.weight(jnp.tile(valid_GxN, (1, 2)), recipe.scope),
    }

    def weigh(batch: Batch) -> dict[str, jax.Array]:
        valid_GxN = batch.valid.reshape(recipe.groups, -1)
        return {k: counts[k](batch.loss_weights if k == "next_token" else valid_GxN) for k in recipe.weights}

    that_meet = jax.tree.map(lambda x: x[None], batch) if recipe.two_passes else split(batch, recipe)
    return jax.tree.map(lambda w: jnp.sum(w, axis=0).astype(float), jax.vmap(weigh)(that_meet))


def forward(model: AlignX, batch: Batch, recipe: Recipe) -> tuple[jax.Array, jax.Array | None]:
    """The sum of the next-token loss over the rows of one micro-batch, and their pooled states [R,P,K,D] at
    `recipe.taps`, if any."""
    slots, decoder = batch.valid.shape[1], model.decoder
    high = jnp.promote_types(recipe.compute_dtype, jnp.float32)
    pool_RxKxT = None
    if recipe.taps:
        pool_RxKxT = jnp.concatenate([pooling.span_means(s, slots, high) for s in _spans(batch)], axis=1)
    out = decoder(
        batch.tokens,
        batch.positions,
        batch.segments,
        compute_dtype=recipe.compute_dtype,
        remat=recipe.remat,
        kernel=recipe.attention,
        pool_RxKxT=pool_RxKxT,
        pooled_layers=recipe.taps,
    )
    total = next_token.next_token(
        out.hidden_RxTxD,
        decoder.output_embedding,
        batch.tokens,
        batch.loss_weights,
        vocab_size=decoder.config.vocab_size,
        chunk=recipe.chunk,
        cap=decoder.config.logit_cap,
    )
    return total, jnp.swapaxes(out.pooled_PxRxKxD, 0, 1) if recipe.taps else None


class Pairs(NamedTuple):
    """What the pair losses take of rows that meet: G groups of N slots, whose pairs are in front."""

    valid_GxN: jax.Array
    ids: tuple[jax.Array, jax.Array, jax.Array]
    """[G,N] of the sources, of the targets and of their lines."""
    language_Gx2N: jax.Array
    aligned_Gx2NxD: jax.Array | None
    """Pooled sources, then targets, standardized where that is asked for; None without the contrastive loss."""
    matched_Gx2NxD: jax.Array | None
    """The same of the states that predict them; None without language matching."""

    @property
    def valid_Gx2N(self) -> jax.Array:
        return jnp.tile(self.valid_GxN, (1, 2))


def pairs(pooled_RxPxKxD: jax.Array, batch: Batch, recipe: Recipe) -> Pairs:
    """The pairs of rows that meet: of a micro-batch, or of the step where `recipe.two_passes`."""
    kinds = jnp.split(pooled_RxPxKxD, len(_spans(batch)), axis=2)
    index = pooling.compact(batch.valid.reshape(recipe.groups, -1), recipe.group_pairs)

    def gather(x_RxSx___: jax.Array) -> jax.Array:
        x_GxNx___ = x_RxSx___.reshape(recipe.groups, -1, *x_RxSx___.shape[2:])
        shape = index.shape + (1,) * (x_GxNx___.ndim - 2)
        return jnp.take_along_axis(x_GxNx___, index.reshape(shape), axis=1)

    def both(source_RxSx___: jax.Array, target_RxSx___: jax.Array) -> jax.Array:
        return jnp.concatenate([gather(source_RxSx___), gather(target_RxSx___)], axis=1)

    valid_GxN = gather(batch.valid)

    def sentences(loss: str, layer: int, first: int) -> jax.Array | None:
        if loss not in recipe.weights:
            return None
        tap = recipe.taps.index(layer)
        x_Gx2NxD = both(kinds[first][:, tap], kinds[first + 1][:, tap])
        if recipe.objective.standardize == "none":
            return x_Gx2NxD
        return standardization.standardize(x_Gx2NxD, jnp.tile(valid_GxN, (1, 2)), recipe.scope)

    return Pairs(
        valid_GxN,
        (gather(batch.source_hash), gather(batch.target_hash), gather(batch.line_hash)),
        both(batch.source_language, batch.target_language),
        sentences("contrastive", recipe.contrastive_layer, 0),
        sentences("language_matching", recipe.matching_layer, 2),
    )


def pair_sums(model: AlignX, these: Pairs, recipe: Recipe) -> dict[str, jax.Array]:
    """The sum of each pair loss over pairs that meet."""
    objective, sums = recipe.objective, {}
    if these.aligned_Gx2NxD is not None:
        sums["contrastive"] = contrastive.contrastive(
            *jnp.split(these.aligned_Gx2NxD, 2, axis=1),
            these.valid_GxN,
            *these.ids,
            temperature=objective.contrastive.temperature,
            form=objective.contrastive.form,
            scope=recipe.scope,
            duplicates=objective.duplicates,
        )
    if these.matched_Gx2NxD is not None:
        sums["language_matching"] = language_matching.language_matching(
            these.matched_Gx2NxD,
            these.language_Gx2N,
            these.valid_Gx2N,
            model.classifier.weights(),
            activation=model.decoder.config.activation_function,
            scope=recipe.scope,
        )
    return sums


def loss_sums(model: AlignX, batch: Batch, recipe: Recipe) -> dict[str, jax.Array]:
    """The sum of each loss over one micro-batch."""
    total, pooled = forward(model, batch, recipe)
    return {"next_token": total} | (pair_sums(model, pairs(pooled, batch, recipe), recipe) if recipe.taps else {})


def _spans(batch: Batch) -> tuple[jax.Array, ...]:
    """Source and target, then the states that predict them."""
    source, target = batch.source_span, batch.target_span
    return source, target, pooling.predicting(source, batch.segments), pooling.predicting(target, batch.segments)


def gradients(
    params: Params, batch: Batch, graph: nnx.GraphDef, recipe: Recipe, frozen: Params | None = None
) -> tuple[Params, Metrics]:
    """Gradient of L = L_NTP + lambda_ctr L_CTR + lambda_lam L_LAM over the whole batch, and every loss.

    Sums and weights run over all micro-batches and are divided once. Besides the losses the metrics hold the number
    of label tokens and of pairs, and `reach/<loss>`: the norm of each auxiliary loss's gradient at its pooled states.

    Where `recipe.two_passes`, a forward pass gives the pooled states of all micro-batches, and the pair losses of them
    all their gradient at each; the micro-batches then take it back through the model (GradCache, arXiv 2101.06983).
    """
    micro_batches, weights = split(batch, recipe), loss_weights(batch, recipe)
    beside = {k: v for k, v in params.items() if k != "decoder"}  # the pair classifier, if there is one
    frozen = frozen or {}

    def of_pairs(pooled_RxPxKxD: jax.Array, batch: Batch) -> tuple[jax.Array, Params, Metrics]:
        """Gradients of the weighted pair losses by the pooled states and by the classifier."""

        def loss(pooled_RxPxKxD: jax.Array, beside: Params):
            model = nnx.merge(graph, params | beside, frozen)
            means = _means(pair_sums(model, pairs(pooled_RxPxKxD, batch, recipe), recipe), weights)
            return sum(recipe.weights[k] * mean for k, mean in means.items()), means

        (of_pooled, of_beside), means = jax.grad(loss, argnums=(0, 1), has_aux=True)(pooled_RxPxKxD, beside)
        halves = dict(zip(LOSSES[1:], jnp.split(of_pooled, 2, axis=2), strict=True))
        return of_pooled, of_beside, means | {f"reach/{k}": _norm(halves[k]) for k in means}

    def add(total: Params, xs: tuple[Batch, jax.Array | None]) -> tuple[Params, Metrics]:
        micro, of_pooled = xs

        def run(params: Params):
            next_token_sum, pooled = forward(nnx.merge(graph, params, frozen), micro, recipe)
            return _means({"next_token": next_token_sum}, weights), pooled

        (metrics, pooled), pull = jax.vjp(run, params)
        of_beside = {}
        if recipe.taps and not recipe.two_passes:
            of_pooled, of_beside, of_micro = of_pairs(pooled, micro)
            metrics |= of_micro
        (of_params,) = pull(({"next_token": jnp.ones_like(metrics["next_token"])}, of_pooled))
        # Left free, they are replicated over `data`.
        return jax.tree.map(jnp.add, total, sharding.constrain_parameters(of_params | of_beside)), metrics

    of_pooled, of_beside, metrics = None, {}, {}
    if recipe.two_passes:
        model = nnx.merge(graph, params, frozen)
        pooled = jax.lax.map(lambda micro: forward(model, micro, recipe)[1], micro_batches)
        of_pooled, of_beside, metrics = of_pairs(join(pooled, recipe), batch)
        of_pooled = split(of_pooled, recipe)
    total, of_micro = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), (micro_batches, of_pooled))
    metrics |= {k: _norm(x_A) if k.startswith("reach/") else jnp.sum(x_A, axis=0) for k, x_A in of_micro.items()}
    loss = sum(factor * metrics[k] for k, factor in recipe.weights.items())
    counts = {"tokens": weights["next_token"], "pairs": jnp.sum(batch.valid)}
    return total | of_beside, {"loss": loss} | metrics | counts


def _norm(x: jax.Array) -> jax.Array:
    """The Euclidean norm of all of `x`, of any scale: in float32 the square of what is below 1e-22 is 0."""
    most = jnp.max(jnp.abs(x))
    return most * jnp.sqrt(jnp.sum((x / jnp.where(most > 0, most, 1.0)) ** 2))


def _means(sums: dict[str, jax.Array], weights: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {k: sums[k] / jnp.maximum(weights[k], 1.0).astype(sums[k].dtype) for k in sums}


def train_step(
    state: TrainState,
    batch: Batch,
    steps: jax.Array | int,
    *,
    graph: nnx.GraphDef,
    recipe: Recipe,
    config: OptimizerConfig,
    skip_nonfinite: bool = False,
) -> tuple[TrainState, Metrics]:
    """One update. `steps` is the length of the whole run, which the schedule decays over: no constant of the program,
    which so is the same for data of any size.

    With `skip_nonfinite`, a step whose loss or gradient is not finite changes neither parameters nor moments, and the
    metric `skipped` is 1; its place in the schedule is used up, as its batch is.
    """
    grads, metrics = gradients(state.params, batch, graph, recipe, state.frozen)
    norm = optax.tree.norm(grads)
    tx = optimizer.build(config, steps)
    updates, moments = tx.update(optimizer.clip(grads, norm, config.clip_norm), state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    rate = jnp.asarray(optimizer.schedule(config, steps)(state.step))
    metrics |= {"gradient_norm": norm, "learning_rate": rate}
    if skip_nonfinite:
        good = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
        metrics["skipped"] = jnp.where(good, 0.0, 1.0)
        params = jax.tree.map(functools.partial(jnp.where, good), params, state.params)
        moments = optimizer.keep_unless(good, moments, state.optimizer)
    return dataclasses.replace(state, step=state.step + 1, params=params, optimizer=moments), metrics


def all_finite(tree: TrainState) -> jax.Array:
    """Whether no number of a state is infinite or NaN."""
    finite = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.all(jnp.stack(finite))


def validation_sums(
    params: Params, batch: Batch, frozen: Params | None = None, *, graph: nnx.GraphDef, recipe: Recipe
) -> tuple[Metrics, Metrics]:
    """The sum and the weight of every loss over one batch; the caller adds them up and divides once."""
    micro_batches, model = split(batch, recipe), nnx.merge(graph, params, frozen or {})
    if recipe.two_passes:
        next_token_sums, pooled = jax.lax.map(lambda micro: forward(model, micro, recipe), micro_batches)
        these = pairs(join(pooled, recipe), batch, recipe)
        sums = {"next_token": next_token_sums} | pair_sums(model, these, recipe)
    else:
        sums = jax.lax.map(lambda micro: loss_sums(model, micro, recipe), micro_batches)
    return jax.tree.map(jnp.sum, sums), loss_weights(batch, recipe)


def compiled_for(
    state_like: TrainState, **static
) -> Callable[[TrainState, Batch, jax.Array | int], tuple[TrainState, Metrics]]:
    """`train_step` jitted: the state is donated and keeps its shardings."""
    shardings = jax.tree.map(lambda x: x.sharding, state_like)
    return jax.jit(functools.partial(train_step, **static), donate_argnums=0, out_shardings=(shardings, None))
