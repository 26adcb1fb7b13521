"""Makes a Hugging Face Llama folder with random weights and a given tokenizer: something to start runs from.

python -m benchmarks.random_llama --tokenizer=FOLDER --to=FOLDER [--hidden-size=256 --layers=8]
"""

from __future__ import annotations

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import tyro
from flax import nnx

from alignx_jax.data import tokenizer
from alignx_jax.models import families, huggingface
from alignx_jax.models.decoder import Decoder
from alignx_jax.runs import companions


@dataclasses.dataclass(frozen=True)
class Options:
    tokenizer: pathlib.Path
    """Folder with tokenizer.model or tokenizer.json."""
    to: pathlib.Path
    """Folder to write."""
    hidden_size: int = 256
    layers: int = 8
    heads: int = 4
    seed: int = 0


def make(options: Options) -> int:
    """Writes the folder; returns the number of parameters."""
    encoder = tokenizer.load(options.tokenizer)
    settings = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": encoder.vocab_size,
        "hidden_size": options.hidden_size,
        "intermediate_size": 3 * options.hidden_size,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.heads,
        "num_key_value_heads": options.heads // 2,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "bos_token_id": encoder.bos_id,
        "eos_token_id": encoder.eos_id,
        "dtype": "float32",
    }
    decoder = Decoder(families.decoder_config(settings, "random Llama"), rngs=nnx.Rngs(options.seed))
    huggingface.export(decoder, settings, options.to, jnp.float32, 5e9)
    companions.copy(options.tokenizer, options.to)
    return sum(x.size for x in jax.tree.leaves(nnx.state(decoder, nnx.Param)))


if __name__ == "__main__":
    print(f"{make(tyro.cli(Options)) / 1e6:.1f} M parameters")
