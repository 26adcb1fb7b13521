"""Low-rank adapters (LoRA, arXiv 2106.09685) of a decoder's linear layers: which, their start, and W + scale A B.

Shapes: as in `decoder`; i and o are the inputs and outputs of a linear layer, r is the rank.
"""

from __future__ import annotations

import functools
import math
import re

import jax
import jax.numpy as jnp
from flax import nnx

from alignx_jax.config import LoraConfig
from alignx_jax.exits import UserError
from alignx_jax.models.architecture import DecoderConfig
from alignx_jax.models.decoder import Adapter, Decoder
from alignx_jax.models.families import FAMILIES, Weight

_LINEAR = re.compile(r".*\.(\w+_proj)\.weight")  # a linear layer's key, which names its module


def linear_layers(config: DecoderConfig) -> dict[str, Weight]:
    """The weights of attention and MLP by the names of their modules in Hugging Face: `q_proj` to `down_proj`."""
    found = ((_LINEAR.fullmatch(weight.key), weight) for weight in FAMILIES[config.family].table(config))
    return {match[1]: weight for match, weight in found if match}


def targets(lora: LoraConfig, config: DecoderConfig) -> dict[str, Weight]:
    """Those of `linear_layers` that get an adapter.

    Raises:
      UserError: `lora.targets` is no pattern, or matches none.
    """
    every = linear_layers(config)
    try:
        found = {name: weight for name, weight in every.items() if re.fullmatch(lora.targets, name)}
    except re.error as error:
        raise UserError(f"--lora.targets={lora.targets}: not a regular expression ({error})") from None
    if not found:
        raise UserError(f"--lora.targets={lora.targets}: matches no linear layer; there are {', '.join(every)}")
    return found


def shapes(weight: Weight, config: DecoderConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes of the inputs, then of the outputs, of a linear layer; its parameter has them in this order."""
    outputs, inputs = weight.split(config)
    return inputs, outputs


def count(lora: LoraConfig, config: DecoderConfig) -> int:
    """Parameters of the adapters of all layers; 0 without a rank."""
    if not lora.rank:
        return 0
    sizes = (sum(map(math.prod, shapes(weight, config))) for weight in targets(lora, config).values())
    return config.num_layers * lora.rank * sum(sizes)


def check(lora: LoraConfig, config: DecoderConfig) -> None:
    """Whether a model can be trained so.

    Raises:
      UserError: settings of adapters without any, `targets` that match nothing, or a rank that a matrix cannot have.
    """
    if not lora.rank:
        if lora != LoraConfig():
            raise UserError("--lora.alpha and --lora.targets are of adapters, and --lora.rank=0 has none; give a rank")
        return
    for name, weight in targets(lora, config).items():
        sizes = [math.prod(axes) for axes in shapes(weight, config)]
        if lora.rank > min(sizes):
            raise UserError(
                f"--lora.rank={lora.rank}: {name} is of {sizes[0]} inputs and {sizes[1]} outputs, and no matrix of it "
                f"has a higher rank than {min(sizes)}; give a smaller one"
            )


def attach(decoder: Decoder, lora: LoraConfig, *, seed: int) -> None:
    """Gives `decoder` adapters, in float32 at least, that change nothing yet.

    As PEFT begins: A uniform within 1 / sqrt(inputs), which is `kaiming_uniform_(a=sqrt(5))`, and B zero.
    """
    rngs, config = nnx.Rngs(seed), decoder.config
    for weight in targets(lora, config).values():
        name, (inputs, outputs) = weight.path[-1], shapes(weight, config)
        dtype = jnp.promote_types(getattr(decoder.layers, name).dtype, jnp.float32)
        bound = math.prod(inputs) ** -0.5
        a_Lxixr = jax.random.uniform(
            rngs.params(), (config.num_layers, *inputs, lora.rank), dtype, minval=-bound, maxval=bound
        )
        b_Lxrxo = jnp.zeros((config.num_layers, lora.rank, *outputs), dtype)
        decoder.layers.adapters[name] = Adapter(a_Lxixr, b_Lxrxo, lora.alpha / lora.rank)


def merge(decoder: Decoder) -> Decoder:
    """`decoder` with W + scale A B in the place of its weights, and no adapters; the sums in float32 at least.

    Its weights are donated, and rounded once to their type. A layer at a time: no stack exists in float32.
    """
    for name, adapter in decoder.layers.adapters.items():
        kernel = getattr(decoder.layers, name)[...]
        add = jax.jit(functools.partial(_merged, scale=adapter.scale), donate_argnums=0, out_shardings=kernel.sharding)
        setattr(decoder.layers, name, nnx.Param(add(kernel, adapter.a[...], adapter.b[...])))
    decoder.layers.adapters = nnx.Dict()
    return decoder


def _merged(kernel_Lxixo: jax.Array, a_Lxixr: jax.Array, b_Lxrxo: jax.Array, *, scale: float) -> jax.Array:
    def add(of_layer: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        kernel, a, b = of_layer
        added = jnp.tensordot(a, b, axes=1, precision=jax.lax.Precision.HIGHEST) * scale
        return (kernel.astype(added.dtype) + added).astype(kernel.dtype)

    return jax.lax.map(add, (kernel_Lxixo, a_Lxixr, b_Lxrxo))
