"""The losses side by side before the first step: can each one act, and does one drown the others?

A loss that stands at the value of chance and has next to no gradient teaches nothing; one whose gradient is many times
that of the others gets the whole step where gradients are clipped. Both happen on real models, and in no curve of the
training loss.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from rich.console import Console
from rich.table import Table

from alignx_jax.batch import Batch
from alignx_jax.console import say
from alignx_jax.objectives import contrastive
from alignx_jax.training import step as steps
from alignx_jax.training.progress import SHORT
from alignx_jax.training.state import Params

AT_CHANCE = 0.95
"""A loss above this share of chance's has learnt next to nothing."""
_FLAT = 0.1  # of the temperature: cosines that differ by less give a softmax that is nearly uniform
_DROWNS = 0.8  # share of the gradient that a pair loss should not have


Measure = Callable[[Params, Batch, Params | None], steps.Metrics]


def compiled(graph: nnx.GraphDef, recipe: steps.Recipe) -> Measure:
    """Of the first micro-batch, in one forward pass and a backward pass for each loss:

    - `loss`, `next_token`, `contrastive`, `language_matching`: the weighted total, and each loss before its lambda;
    - `chance/...`: what a model that knows nothing has: the logarithm of the vocabulary's size; equal cosines; the
      entropy of "same language" among the pairs;
    - `gradient/...`: the norm over all trained parameters of the gradient of lambda * loss by itself;
    - `share/...`: that norm over the sum of all;
    - `cosine/translations`, `cosine/others`, `cosine/deviation`: mean cosine at the aligned layer, as the contrastive
      loss sees it, of the two sentences of a pair and of a source with the targets it is told from, and the standard
      deviation of the latter.

    Two programs, the second of what the first has made: in one, what needs only the batch would run beside the layers,
    and simulated devices then wait for each other in different places for ever (dev/decisions.md).
    """
    losses = jax.jit(functools.partial(_losses, graph=graph, recipe=recipe))
    of_pairs = jax.jit(functools.partial(_of_pairs, plan=dataclasses.replace(recipe, accumulation=1)))

    def measure(params: Params, batch: Batch, frozen: Params | None = None) -> steps.Metrics:
        found, pairs, weights = losses(params, batch, frozen)
        return found | of_pairs(pairs, weights)

    return measure


def _losses(
    params: Params, batch: Batch, frozen: Params | None, *, graph: nnx.GraphDef, recipe: steps.Recipe
) -> tuple[steps.Metrics, steps.Pairs, steps.Metrics]:
    """Values and gradients, the pairs that met, and what each loss was divided by."""
    plan = dataclasses.replace(recipe, accumulation=1)
    micro = jax.tree.map(lambda x_AxRx___: x_AxRx___[0], steps.split(batch, recipe))
    weights = {k: jnp.maximum(w, 1) for k, w in steps.loss_weights(micro, plan).items()}

    def weighted_losses(params: Params) -> tuple[jax.Array, tuple[dict[str, jax.Array], steps.Pairs]]:
        model = nnx.merge(graph, params, frozen or {})
        total, pooled = steps.forward(model, micro, plan)
        pairs = steps.pairs(pooled, micro, plan)
        sums = {"next_token": total} | steps.pair_sums(model, pairs, plan)
        means = {k: sums[k] / weights[k].astype(sums[k].dtype) for k in plan.weights}
        return jnp.stack([factor * means[k] for k, factor in plan.weights.items()]), (means, pairs)

    losses_K, pull, (means, pairs) = jax.vjp(weighted_losses, params, has_aux=True)
    each_KxK = jnp.eye(len(losses_K), dtype=losses_K.dtype)
    norms_K = jax.lax.map(lambda one_K: optax.tree.norm(pull(one_K)[0]), each_KxK)  # one gradient at a time
    decoder = nnx.merge(graph, params, frozen or {}).decoder.config
    found = {"loss": jnp.sum(losses_K)} | means | {"chance/next_token": jnp.float32(math.log(decoder.vocab_size))}
    shares_K = norms_K / jnp.maximum(jnp.sum(norms_K), jnp.finfo(norms_K.dtype).tiny)
    for name, norm, share in zip(plan.weights, norms_K, shares_K, strict=True):
        found |= {f"gradient/{name}": norm, f"share/{name}": share}
    return found, pairs, weights


def _of_pairs(pairs: steps.Pairs, weights: steps.Metrics, *, plan: steps.Recipe) -> steps.Metrics:
    """Chance of each pair loss, and cosines at the aligned layer."""
    found: steps.Metrics = {}
    if "contrastive" in plan.weights:
        found |= _of_contrastive(pairs, plan, weights["contrastive"])
    if "language_matching" in plan.weights:
        found["chance/language_matching"] = _of_matching(pairs, plan, weights["language_matching"])
    return found


def _of_contrastive(pairs: steps.Pairs, plan: steps.Recipe, count: jax.Array) -> steps.Metrics:
    options = {"scope": plan.scope, "duplicates": plan.objective.duplicates}
    source, target = jnp.split(pairs.aligned_Gx2NxD, 2, axis=1)
    nowhere = jnp.zeros_like(source)  # all cosines are 0
    settings = {"temperature": plan.objective.contrastive.temperature, "form": plan.objective.contrastive.form}
    total = contrastive.contrastive(nowhere, nowhere, pairs.valid_GxN, *pairs.ids, **settings, **options)
    cosines = contrastive.cosines(source, target, pairs.valid_GxN, *pairs.ids, **options)
    names = "cosine/translations", "cosine/others", "cosine/deviation"
    return {"chance/contrastive": total / count.astype(total.dtype)} | dict(zip(names, cosines, strict=True))


def _of_matching(pairs: steps.Pairs, plan: steps.Recipe, count: jax.Array) -> jax.Array:
    """The cross-entropy of always answering with the share of pairs in one language."""
    languages_M, valid_M = pairs.language_Gx2N, pairs.valid_Gx2N
    if plan.scope == "global":
        languages_M, valid_M = languages_M.reshape(1, -1), valid_M.reshape(1, -1)
    meet_GxMxM = valid_M[:, :, None] & valid_M[:, None, :]
    same = jnp.sum(meet_GxMxM & (languages_M[:, :, None] == languages_M[:, None, :]), dtype=jnp.float32)
    share = same / count.astype(jnp.float32)
    return -(jax.scipy.special.xlogy(share, share) + jax.scipy.special.xlogy(1 - share, 1 - share))


def table(values: Mapping[str, float]) -> Table:
    """A line for each loss."""
    shown = Table(title="the losses before the first step", title_justify="left")
    for name in ("", "value", "chance", "gradient", "share"):
        shown.add_column(name, justify="right" if name else "left")
    for key, name in SHORT.items():
        if f"share/{key}" in values:
            numbers = values[key], values[f"chance/{key}"], values[f"gradient/{key}"]
            shown.add_row(name, *(f"{x:.4g}" for x in numbers), f"{values[f'share/{key}']:.1%}")
    return shown


def cosines(values: Mapping[str, float], layer: int) -> str:
    """The aligned layer in one sentence."""
    translations, others, deviation = (values[f"cosine/{k}"] for k in ("translations", "others", "deviation"))
    apart = f"{(translations - others) / deviation:.1f} deviations" if deviation else "no deviation"
    return (
        f"layer {layer}: mean cosine of translations {translations:.3f}, of other sentences {others:.3f} with a "
        f"deviation of {deviation:.3f}: {apart} apart"
    )


def show(console: Console, values: Mapping[str, float], recipe: steps.Recipe) -> None:
    """The table, the aligned layer, and what to do about a loss that cannot act or drowns the others."""
    console.print(table(values))
    if "contrastive" in recipe.weights:
        say(console, cosines(values, recipe.contrastive_layer))
    for sentence in advice(values, recipe):
        say(console, f"WARNING: {sentence}")


def is_at_chance(values: Mapping[str, float]) -> bool:
    """Whether the contrastive loss tells a translation from the other sentences no better than chance."""
    return values.get("contrastive", 0.0) > AT_CHANCE * values.get("chance/contrastive", math.inf)


def is_dead(values: Mapping[str, float]) -> bool:
    """Whether the contrastive loss has negatives, and still no gradient at all: all pooled states are equal."""
    return values.get("chance/contrastive", 0.0) > 0 and values["gradient/contrastive"] == 0


def advice(values: Mapping[str, float], recipe: steps.Recipe) -> list[str]:
    """A sentence for each loss that cannot act or drowns the others, with the flag that helps."""
    said, raw = [], recipe.objective.standardize == "none"
    if is_at_chance(values) and values["cosine/deviation"] < _FLAT * recipe.objective.contrastive.temperature:
        help = "--objective.standardize=batch" if raw else "another --objective.contrastive.layer"
        said.append(
            f"the contrastive loss cannot act: all cosines at layer {recipe.contrastive_layer} are nearly equal, so "
            f"that it stands at chance and has {values['share/contrastive']:.2%} of the gradient; give {help}"
        )
    for name in recipe.weights:
        if name != "next_token" and values[f"share/{name}"] > _DROWNS:
            flag = f"--objective.{name.replace('_', '-')}.weight"
            smaller = f"a smaller {flag} than {recipe.weights[name]:g}"
            help = "--objective.standardize=batch" if raw else smaller
            said.append(
                f"{SHORT[name]} drowns the other losses: it has {values[f'share/{name}']:.0%} of the gradient; "
                f"give {help}"
            )
    return said
