import copy
import importlib

import numpy as np
import pytest
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from alignx_jax.exits import UserError
from alignx_jax.models.families import decoder_config
from alignx_jax.models.rope import Rope, frequencies


@pytest.mark.parametrize(
    ("rope", "head_dim"),
    [
        (Rope("llama3", 500000.0, 8.0, 1.0, 4.0, 8192), 128),  # Llama 3.1
        (Rope("llama3", 500000.0, 32.0, 1.0, 4.0, 8192), 64),  # Llama 3.2
        (Rope("linear", 10000.0, 4.0), 128),
        (Rope("linear", 1000000.0, 8.0), 256),  # Gemma 3
        (Rope("yarn", 1000000.0, 4.0, original_max_positions=32768), 128),  # Qwen 2.5 and 3
        (Rope("yarn", 10000.0, 2.0, original_max_positions=4096, beta_fast=8.0, beta_slow=2.0, truncate=False), 64),
    ],
)
def test_rope_frequencies_of_published_models(rope, head_dim):
    config = transformers.LlamaConfig(
        head_dim=head_dim,
        rope_parameters={
            "rope_type": rope.kind,
            "rope_theta": rope.theta,
            "factor": rope.factor,
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_max_positions,
            "beta_fast": rope.beta_fast,
            "beta_slow": rope.beta_slow,
            "truncate": rope.truncate,
        },
    )
    expected, _ = ROPE_INIT_FUNCTIONS[rope.kind](config, "cpu")
    np.testing.assert_allclose(frequencies(rope, head_dim), expected.numpy(), rtol=1e-6)


SMALL = {"vocab_size": 50, "hidden_size": 128, "intermediate_size": 12, "num_hidden_layers": 6, "head_dim": 32}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
TYPED = {"type": "linear", "factor": 8.0}
NESTED = {"full_attention": TYPED | {"rope_theta": 3e5}, "sliding_attention": {"rope_type": "default"}}


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {"rope_scaling": LLAMA3, "original_max_position_embeddings": 512}),
        ("llama", {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}, "original_max_position_embeddings": 512}),
        ("llama", {"rope_scaling": {k: v for k, v in LLAMA3.items() if k != "original_max_position_embeddings"}}),
        ("qwen2", {"rope_scaling": YARN, "rope_theta": 1e6, "original_max_position_embeddings": 1024}),
        ("qwen3", {"rope_scaling": YARN | {"beta_fast": 0, "beta_slow": None, "truncate": False}}),
        ("mistral", {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 0}}),
        ("llama", {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 1.5}}),
        ("llama", {"rope_scaling": TYPED, "original_max_position_embeddings": 512}),
        ("llama", {"rope_scaling": YARN, "rope_parameters": YARN}),
        ("gemma2", {"rope_scaling": TYPED | {"rope_type": "default"}}),
        ("gemma3_text", {"rope_scaling": TYPED, "rope_theta": 2e6}),
        ("gemma3_text", {"rope_scaling": TYPED | {"rope_type": "linear"}, "rope_local_base_freq": 2e4}),
        ("gemma3_text", {"rope_scaling": YARN, "original_max_position_embeddings": 1024}),
        ("gemma3_text", {"rope_parameters": NESTED, "original_max_position_embeddings": 1024}),
        ("gemma3_text", {"rope_parameters": {"full_attention": YARN}, "original_max_position_embeddings": 1024}),
    ],
)
def test_every_spelling_is_read_as_transformers_reads_it(family, fields):
    """Frequencies, and the factor of cosine and sine, of its own embedding made from the same config.json."""
    read = decoder_config(SMALL | {"model_type": family} | fields, "config.json")
    config = transformers.AutoConfig.for_model(family, **copy.deepcopy(SMALL | fields))  # which it changes
    module = importlib.import_module(config.__class__.__module__.replace("configuration", "modeling"))
    name = next(n for n in vars(module) if n.endswith("RotaryEmbedding"))
    theirs, prefixes = vars(module)[name](config), {"": read.rope}
    if family == "gemma3_text":
        prefixes = {"full_attention_": read.rope, "sliding_attention_": read.local_rope}
    for prefix, rope in prefixes.items():
        expected = getattr(theirs, f"{prefix}inv_freq").numpy()
        np.testing.assert_allclose(frequencies(rope, 32), expected, rtol=1e-6)
        assert rope.attention_factor == pytest.approx(getattr(theirs, f"{prefix}attention_scaling"))


def test_two_descriptions_that_differ_are_refused():
    for family, fields in (
        ("llama", {"rope_scaling": YARN, "rope_parameters": YARN | {"factor": 2.0}}),
        ("gemma3_text", {"rope_scaling": TYPED, "rope_parameters": NESTED}),
    ):
        with pytest.raises(UserError, match="has both rope_parameters and rope_scaling; leave out one"):
            decoder_config(SMALL | {"model_type": family} | fields, "config.json")
    with pytest.raises(UserError, match="truncate = False is not supported"):
        decoder_config(SMALL | {"model_type": "gemma3_text", "rope_scaling": YARN | {"truncate": False}}, "config.json")
