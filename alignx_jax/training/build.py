"""What a stage trains with: its settings checked, the recipe of its step, the compiled step, the weights."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from concurrent.futures import Future

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from alignx_jax import sharding, storage
from alignx_jax.config import Config
from alignx_jax.data import pipeline
from alignx_jax.exits import UserError
from alignx_jax.models import attention, lora
from alignx_jax.models.architecture import DecoderConfig
from alignx_jax.models.decoder import Decoder
from alignx_jax.runs import loading
from alignx_jax.training import compiling, optimizer, profiling
from alignx_jax.training import state as states
from alignx_jax.training import step as steps

_LOGIT_BYTES = 256_000_000  # of a chunk on a device; several arrays of the size live at once
_PAIR_TOKENS = 32  # a pair of sentences in its prompt seldom takes fewer


@dataclasses.dataclass(frozen=True)
class Step:
    """What one stage compiles; shapes only, no weights."""

    decoder: DecoderConfig
    graph: nnx.GraphDef
    recipe: steps.Recipe
    like: states.TrainState
    """Shapes, types and shardings of the state."""
    train_step: jax.stages.Wrapped
    """Of the state, a batch and the number of the run's steps."""
    lower: Callable[[], jax.stages.Lowered]
    """`train_step` for batches of the configured shape, ready to be compiled; nothing is placed."""
    begin: Callable[[Decoder], states.TrainState]
    """The state before the first step."""
    go_on: Callable[[states.TrainState, Decoder], states.TrainState]
    """A state from a checkpoint with the weights that are frozen and not in it."""

    @functools.cached_property
    def compiled(self) -> Future[jax.stages.Compiled]:
        """`train_step`, which is being compiled from the moment that this is first asked for."""
        return compiling.beside(self.lower())


class Weights:
    """The decoder that a stage starts from, read once: looked at before the first step, then given up to it."""

    def __init__(self, source: loading.Source, config: Config, mesh: Mesh):
        self.source = source
        self._load = functools.partial(source.load_adapted if config.lora.rank else source.load, mesh)
        self._loaded: Decoder | None = None

    def look(self) -> Decoder:
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded

    def take(self) -> Decoder:
        """Nothing here keeps it: its arrays are donated to the first step."""
        decoder, self._loaded = self.look(), None
        return decoder


def check(config: Config, source: loading.Source, mesh: Mesh) -> None:
    """Refuses what cannot work, before data is prepared and anything is compiled.

    Raises:
      UserError: the mesh does not divide the model or the batch, a layer is not in the model, negatives are asked of
        micro-batches that a step does not have, the kernel that is asked for cannot compute attention there, adapters
        do not fit the model or those that it has, or the steps to trace are none.
    """
    if config.objective.negatives == "step" and config.training.accumulation == 1 and config.stage != "2":
        raise UserError(
            "--objective.negatives=step: with --training.accumulation=1 a step is one micro-batch; "
            "give global, which is the same at no cost, or a larger accumulation"
        )
    sharding.check(source.decoder_config(), mesh, config.training.rows, config.training.accumulation)
    check_adapters(config, source)
    align_layer(config, source.decoder_config())
    matching_layer(config, source.decoder_config())
    attention_kernel(config, source.decoder_config(), mesh)
    profiling.steps(config.profile, None)


def check_adapters(config: Config, source: loading.Source) -> None:
    """Whether the model can be trained with `config.lora`, or goes on with its adapters.

    Raises:
      UserError: it cannot, or does not.
    """
    lora.check(config.lora, source.decoder_config())
    there, here = source.adapters(), config.lora
    if there and here.rank and there != here:
        raise UserError(
            f"--lora: {source.name} has adapters of --lora.rank={there.rank} --lora.alpha={there.alpha} "
            f"--lora.targets={there.targets}, which a stage with --lora.rank goes on with; give the same, or export it "
            "and start from that"
        )


def align_layer(config: Config, decoder: DecoderConfig) -> int:
    """Layers run before the state that is aligned.

    `auto` has to be replaced by a number before training; until then it stands for half of the model's, whose step is
    of the same shape.
    """
    layer = config.objective.contrastive.layer
    return _layer("contrastive", None if layer == "auto" else layer, decoder.num_layers // 2, config, decoder)


def matching_layer(config: Config, decoder: DecoderConfig) -> int:
    """Layers run before the state whose language is matched: all unless set."""
    return _layer("language-matching", config.objective.language_matching.layer, decoder.num_layers, config, decoder)


def _layer(loss: str, layer: int | None, default: int, config: Config, decoder: DecoderConfig) -> int:
    if layer is None:
        return default
    if layer == 0 and config.lora.rank:
        raise UserError(f"--objective.{loss}.layer=0: with --lora.rank the embeddings are frozen; give 1 or more")
    if not 0 <= layer <= decoder.num_layers:
        raise UserError(
            f"--objective.{loss}.layer={layer}: the model has {decoder.num_layers} layers; "
            f"give a number from 0 (embeddings) to {decoder.num_layers} (after the final norm)"
        )
    return layer


def group_rows(config: Config, mesh: Mesh) -> int:
    """Rows of one device's group whose pairs meet: of one micro-batch, or of the step."""
    rows = config.training.rows // sharding.data_shards(mesh)
    return rows if config.objective.negatives == "step" else rows // config.training.accumulation


def attention_kernel(config: Config, decoder: DecoderConfig, mesh: Mesh) -> attention.Choice:
    """How a stage computes attention, and why so: `attention.choose` for the devices of the mesh."""
    dtype = jnp.dtype(config.training.compute_dtype)
    platform = mesh.devices.flat[0].platform
    return attention.choose(config.training.attention, platform, decoder.head_dim, dtype, decoder.attention_cap)


def recipe(config: Config, decoder: DecoderConfig, data: pipeline.Data, mesh: Mesh) -> steps.Recipe:
    """The static settings of the step on `data`.

    Raises:
      ValueError: the layer to align is still `auto`.
    """
    if data.pairs and config.objective.contrastive.layer == "auto":
        raise ValueError("the layer to align has to be a number here; alignx_jax.with_layer chooses it")
    most = max(most_pairs(config, data, mesh), expected_pairs(config, mesh))
    return recipe_for(config, decoder, mesh, pairs=data.pairs, group_pairs=most)


def most_pairs(config: Config, data: pipeline.Data, mesh: Mesh) -> int:
    """Most pairs in any `group_rows` rows of the data; 0 where they have none."""
    rows = group_rows(config, mesh)
    return max(data.train.most_examples(rows), data.validation.most_examples(rows)) if data.pairs else 0


def expected_pairs(config: Config, mesh: Mesh) -> int:
    """Pairs that `group_rows` rows have room for in any case, so that the step is known before the data are."""
    in_a_row = min(config.data.examples_per_row, -(-config.data.row_length // _PAIR_TOKENS))
    return group_rows(config, mesh) * in_a_row


def chunk(config: Config, decoder: DecoderConfig, mesh: Mesh) -> int:
    """Positions of each row whose logits exist at a time: a multiple of 8 up to 128, where 8 fit, unless set."""
    if config.objective.chunk:
        return config.objective.chunk
    rows = config.training.rows // config.training.accumulation // sharding.data_shards(mesh)
    position = 4 * rows * decoder.padded_vocab_size // mesh.shape["model"]  # bytes of its float32 logits on a device
    most = _LOGIT_BYTES // position
    return min(128, max(1, most if most < 8 else most // 8 * 8))


def recipe_for(config: Config, decoder: DecoderConfig, mesh: Mesh, *, pairs: bool, group_pairs: int) -> steps.Recipe:
    """The static settings of the step.

    Args:
      pairs: whether batches hold pairs (stage 1).
      group_pairs: most pairs in any `group_rows` rows.
    """
    return steps.Recipe(
        objective=config.objective,
        contrastive_layer=align_layer(config, decoder),
        matching_layer=matching_layer(config, decoder),
        pairs=pairs,
        groups=sharding.data_shards(mesh),
        group_pairs=group_pairs,
        chunk=chunk(config, decoder, mesh),
        accumulation=config.training.accumulation,
        compute_dtype=jnp.dtype(config.training.compute_dtype),
        remat=config.training.remat,
        attention=attention_kernel(config, decoder, mesh).kernel,
    )


def compile_ahead(config: Config, folder: storage.Path, source: loading.Source, mesh: Mesh) -> Step | None:
    """The step of a new stage, which is being compiled while its data are built; `train` takes it if they fit it.

    None where that is not known yet (`--objective.contrastive.layer=auto`), or the stage goes on: then its data are
    built already, and the step is in JAX's compilation cache.
    """
    if config.objective.contrastive.layer == "auto" or (folder / "config.json").is_file():
        return None
    decoder, pairs = source.decoder_config(), config.stage == "1"
    expected = recipe_for(config, decoder, mesh, pairs=pairs, group_pairs=expected_pairs(config, mesh))
    step = build_step(config, expected, decoder, mesh)
    _ = step.compiled  # begins
    return step


def build_step(config: Config, plan: steps.Recipe, decoder: DecoderConfig, mesh: Mesh) -> Step:
    """The step that trains. What is compiled ahead of time is this same function."""
    tx = optimizer.build(config.optimizer, 1)  # its first state alone is used
    dtype = jnp.bfloat16 if config.lora.rank else jnp.float32
    graph, *shapes = states.split(nnx.eval_shape(lambda: _build(config, plan, loading.random_decoder(decoder, dtype))))
    like = states.abstract(shapes[0], tx, mesh, shapes[1])
    train_step = steps.compiled_for(
        like,
        config=config.optimizer,
        graph=graph,
        recipe=plan,
        skip_nonfinite=config.on_nonfinite == "skip",
    )

    def begin(decoder: Decoder) -> states.TrainState:
        _, params, frozen = states.split(_build(config, plan, decoder))
        return states.create(params, tx, mesh, frozen)

    def go_on(saved: states.TrainState, decoder: Decoder) -> states.TrainState:
        return dataclasses.replace(saved, frozen=states.split(_build(config, plan, decoder))[2])

    lower = functools.partial(compiling.lower, config, train_step, like, mesh)
    return Step(decoder, graph, plan, like, train_step, lower, begin, go_on)


def _build(config: Config, plan: steps.Recipe, decoder: Decoder) -> states.AlignX:
    width = config.objective.language_matching.width if "language_matching" in plan.weights else None
    return states.build(decoder, width, seed=config.seed, adapters=config.lora)
