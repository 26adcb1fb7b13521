"""The training step: `(state, batch) -> (state, metrics)`, one function for both stages."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from alignx_jax import sharding
from alignx_jax.batch import Batch
from alignx_jax.config import ObjectiveConfig, OptimizerConfig
from alignx_jax.models import attention
from alignx_jax.objectives import contrastive, language_matching, next_token, pooling
from alignx_jax.training import optimizer
from alignx_jax.training.state import AlignX, Params, TrainState

LOSSES = ("next_token", "contrastive", "language_matching")
Metrics = dict[str, jax.Array]


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
    """Most pairs in one group of one micro-batch."""
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


def split(batch: Batch, recipe: Recipe) -> Batch:
    """[R,...] -> [A,R/A,...]: every micro-batch takes its rows from every group, so that no row changes its device."""

    def micro(x: jax.Array) -> jax.Array:
        groups, steps = recipe.groups, recipe.accumulation
        x = x.reshape(groups, steps, x.shape[0] // (groups * steps), *x.shape[1:]).swapaxes(0, 1)
        return sharding.constrain_micro_batches(x.reshape(steps, -1, *x.shape[3:]))

    return jax.tree.map(micro, batch)


def loss_weights(micro_batches: Batch, recipe: Recipe) -> dict[str, jax.Array]:
    """What each loss's sum is divided by, over all micro-batches: known from the batch before any forward pass."""
    scope = recipe.objective.negatives
    counts = {
        "next_token": next_token.weight,
        "contrastive": contrastive.weight,
        "language_matching": lambda valid: language_matching.weight(jnp.concatenate([valid, valid], axis=1), scope),
    }

    def weigh(batch: Batch) -> dict[str, jax.Array]:
        valid_GxN = batch.valid.reshape(recipe.groups, -1)
        return {k: counts[k](batch.loss_weights if k == "next_token" else valid_GxN) for k in recipe.weights}

    return jax.tree.map(lambda w: jnp.sum(w, axis=0).astype(float), jax.vmap(weigh)(micro_batches))


def loss_sums(model: AlignX, batch: Batch, probe: jax.Array, recipe: Recipe) -> dict[str, jax.Array]:
    """The sum of each loss over one micro-batch.

    `probe` is zeros, added to the pooled states [P,R,K,D] at `recipe.taps`: the gradient with respect to it shows
    whether, and how strongly, the auxiliary losses reach the model.
    """
    slots = batch.valid.shape[1]
    objective, decoder = recipe.objective, model.decoder
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
    sums = {
        "next_token": next_token.next_token(
            out.hidden_RxTxD,
            decoder.output_embedding,
            batch.tokens,
            batch.loss_weights,
            vocab_size=decoder.config.vocab_size,
            chunk=objective.chunk,
        )
    }
    if not recipe.taps:
        return sums
    kinds = jnp.split(out.pooled_PxRxKxD + probe, len(_spans(batch)), axis=2)
    index = pooling.compact(batch.valid.reshape(recipe.groups, -1), recipe.group_pairs)

    def gather(x_RxSx___: jax.Array) -> jax.Array:
        x_GxNx___ = x_RxSx___.reshape(recipe.groups, -1, *x_RxSx___.shape[2:])
        shape = index.shape + (1,) * (x_GxNx___.ndim - 2)
        return jnp.take_along_axis(x_GxNx___, index.reshape(shape), axis=1)

    valid = gather(batch.valid)
    if "contrastive" in recipe.weights:
        tap = recipe.taps.index(recipe.contrastive_layer)
        sums["contrastive"] = contrastive.contrastive(
            gather(kinds[0][tap]),
            gather(kinds[1][tap]),
            valid,
            gather(batch.source_hash),
            gather(batch.target_hash),
            temperature=objective.contrastive.temperature,
            form=objective.contrastive.form,
            scope=objective.negatives,
            duplicates=objective.duplicates,
        )
    if "language_matching" in recipe.weights:
        tap = recipe.taps.index(recipe.matching_layer)
        sums["language_matching"] = language_matching.language_matching(
            jnp.concatenate([gather(kinds[2][tap]), gather(kinds[3][tap])], axis=1),
            jnp.concatenate([gather(batch.source_language), gather(batch.target_language)], axis=1),
            jnp.concatenate([valid, valid], axis=1),
            model.classifier.weights(),
            activation=decoder.config.activation_function,
            scope=objective.negatives,
        )
    return sums


def _spans(batch: Batch) -> tuple[jax.Array, ...]:
    """Source and target, then the states that predict them."""
    source, target = batch.source_span, batch.target_span
    return source, target, pooling.predicting(source, batch.segments), pooling.predicting(target, batch.segments)


def _probe(batch: Batch, model: AlignX, recipe: Recipe) -> jax.Array:
    rows, slots = batch.valid.shape
    high = jnp.promote_types(recipe.compute_dtype, jnp.float32)
    return jnp.zeros((len(recipe.taps), rows, 4 * slots, model.decoder.config.hidden_size), high)


def gradients(params: Params, batch: Batch, graph: nnx.GraphDef, recipe: Recipe) -> tuple[Params, Metrics]:
    """Gradient of L = L_NTP + lambda_ctr L_CTR + lambda_lam L_LAM over the whole batch, and every loss.

    Sums and weights run over all micro-batches and are divided once. Besides the losses the metrics hold the number
    of label tokens and of pairs, and `reach/<loss>`: the norm of each auxiliary loss's gradient at its pooled states.
    """
    micro_batches = split(batch, recipe)
    weights = loss_weights(micro_batches, recipe)

    def loss(params: Params, probe: jax.Array, micro: Batch):
        means = _means(loss_sums(nnx.merge(graph, params), micro, probe, recipe), weights)
        return sum(recipe.weights[k] * mean for k, mean in means.items()), means

    def add(total, micro: Batch):
        probe = _probe(micro, nnx.merge(graph, params), recipe)
        (value, means), (of_params, of_probe) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(
            params, probe, micro
        )
        halves = dict(zip(LOSSES[1:], jnp.split(of_probe, 2, axis=2), strict=True))
        reach = {f"reach/{k}": jnp.sum(halves[k] ** 2) for k in means if k in halves}
        of_params = sharding.constrain_parameters(of_params)  # left free, they are replicated over `data`
        return jax.tree.map(jnp.add, total, (of_params, {"loss": value, **means, **reach})), None

    high = jnp.promote_types(recipe.compute_dtype, jnp.float32)
    names = ["loss", *recipe.weights, *(f"reach/{k}" for k in recipe.weights if k != "next_token")]
    zeros = jax.tree.map(jnp.zeros_like, params), {k: jnp.zeros((), high) for k in names}
    (total, metrics), _ = jax.lax.scan(add, zeros, micro_batches)
    counts = {"tokens": weights["next_token"], "pairs": jnp.sum(batch.valid)}
    return total, {k: jnp.sqrt(v) if k.startswith("reach/") else v for k, v in metrics.items()} | counts


def _means(sums: dict[str, jax.Array], weights: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {k: sums[k] / jnp.maximum(weights[k], 1.0).astype(sums[k].dtype) for k in sums}


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    graph: nnx.GraphDef,
    recipe: Recipe,
    config: OptimizerConfig,
    steps: int,
) -> tuple[TrainState, Metrics]:
    """One update. `steps` is the length of the whole run, which the schedule decays over."""
    grads, metrics = gradients(state.params, batch, graph, recipe)
    norm = optax.tree.norm(grads)
    tx = optimizer.adamw(config, steps)
    updates, moments = tx.update(optimizer.clip(grads, norm, config.clip_norm), state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    rate = jnp.asarray(optimizer.schedule(config, steps)(state.step))
    metrics |= {"gradient_norm": norm, "learning_rate": rate}
    return TrainState(step=state.step + 1, params=params, optimizer=moments), metrics


def validation_sums(params: Params, batch: Batch, *, graph: nnx.GraphDef, recipe: Recipe) -> tuple[Metrics, Metrics]:
    """The sum and the weight of every loss over one batch; the caller adds them up and divides once."""
    micro_batches = split(batch, recipe)
    model = nnx.merge(graph, params)

    def add(total, micro: Batch):
        return jax.tree.map(jnp.add, total, loss_sums(model, micro, _probe(micro, model, recipe), recipe)), None

    high = jnp.promote_types(recipe.compute_dtype, jnp.float32)
    sums, _ = jax.lax.scan(add, {k: jnp.zeros((), high) for k in recipe.weights}, micro_batches)
    return sums, loss_weights(micro_batches, recipe)


def compiled_for(state_like: TrainState, **static) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """`train_step` jitted: the state is donated and keeps its shardings."""
    shardings = jax.tree.map(lambda x: x.sharding, state_like)
    return jax.jit(functools.partial(train_step, **static), donate_argnums=0, out_shardings=(shardings, None))
