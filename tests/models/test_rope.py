import numpy as np
import pytest
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

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
