"""Small random models of transformers as the oracle of the decoder: a Llama for each feature, and other families.

The others have the published models' values of everything but sizes and lengths, with every feature on at once.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from alignx_jax.models.decoder import Decoder

torch.set_num_threads(1)  # the models are tiny, and JAX's threads want the cores

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
VARIANTS = {
    "llama2": {},
    "gqa": {"num_key_value_heads": 2},
    "tied_head_dim": {"num_key_value_heads": 1, "tie_word_embeddings": True, "head_dim": 12},
    "llama3_rope": {"num_key_value_heads": 2, "rope_parameters": LLAMA3_ROPE, "head_dim": 16},
    "linear_rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "biases": {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True},
}
GQA = {"num_key_value_heads": 2, "head_dim": 16}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32}
QWEN = GQA | {"rms_norm_eps": 1e-6, "rope_parameters": YARN, "use_sliding_window": True, "sliding_window": 12}
GEMMA = {"rms_norm_eps": 1e-6, "head_dim": 16, "hidden_size": 36, "tie_word_embeddings": True}
OTHERS = {
    # Mistral 7B v0.1: a window in every layer.
    "mistral": GQA | {"model_type": "mistral", "sliding_window": 12, "rms_norm_eps": 1e-5},
    # Mistral Nemo: none, and heads that are not hidden_size / num_attention_heads.
    "mistral_nemo": {
        "model_type": "mistral",
        "num_key_value_heads": 1,
        "head_dim": 12,
        "sliding_window": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    # Qwen 2.5 0.5B with the published settings for long texts, and the window that the configuration describes.
    "qwen2": QWEN | {"model_type": "qwen2", "max_window_layers": 1, "tie_word_embeddings": True},
    "qwen3": QWEN | {"model_type": "qwen3", "max_window_layers": 2, "head_dim": 12, "attention_bias": True},
    "gemma": GEMMA | {"model_type": "gemma", "num_key_value_heads": 1},
    # Gemma 2 27B: the scalar is hidden_size / num_attention_heads, which head_dim is not.
    "gemma2": GEMMA
    | {"model_type": "gemma2", "num_key_value_heads": 2, "query_pre_attn_scalar": 9, "sliding_window": 12},
    # Gemma 3 27B: five local layers, then a global one whose positions are scaled; another local one begins anew.
    "gemma3": GEMMA
    | {
        "model_type": "gemma3_text",
        "num_key_value_heads": 2,
        "num_hidden_layers": 7,
        "query_pre_attn_scalar": 9,
        "sliding_window": 12,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
}
VOCABULARY = 99  # no multiple of anything: the padding is 29 rows


def make(variant: str, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    """Every weight is random, norms and biases too, and large enough that each matters."""
    config = transformers.AutoConfig.for_model(
        **{
            "model_type": "llama",
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "attn_implementation": "eager",
        }
        | (VARIANTS | OTHERS)[variant]
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            plain = 1.0 if "norm" in name and "gemma" not in config.model_type else 0.0  # which has norms less 1
            parameter.normal_(plain, 0.2, generator=generator)
    return model.to(dtype)


def save(model: transformers.PreTrainedModel, folder: pathlib.Path, shard: str = "5GB") -> pathlib.Path:
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def states(
    model: transformers.PreTrainedModel, tokens: np.ndarray, **inputs: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Hidden states [L+1,R,T,D] and logits [R,T,V] of transformers."""
    tensors = {k: torch.from_numpy(v).long() for k, v in {"input_ids": tokens, **inputs}.items()}
    with torch.no_grad():
        out = model(**tensors, output_hidden_states=True)
    return torch.stack(out.hidden_states).numpy(), out.logits.numpy()


@functools.partial(jax.jit, static_argnames=("compute_dtype", "remat"))
def our_states(
    decoder: Decoder, tokens, positions, segments, compute_dtype=jnp.float32, remat="none"
) -> tuple[jax.Array, jax.Array]:
    """The same of ours: every position is a pool of its own."""
    rows, length = tokens.shape
    out = decoder(
        tokens,
        positions,
        segments,
        compute_dtype=compute_dtype,
        remat=remat,
        pool_RxKxT=jnp.broadcast_to(jnp.eye(length)[None], (rows, length, length)),
        pooled_layers=tuple(range(decoder.config.num_layers + 1)),
    )
    logits = out.hidden_RxTxD @ decoder.output_embedding.T.astype(out.hidden_RxTxD.dtype)
    if decoder.config.logit_cap:
        logits = decoder.config.logit_cap * jnp.tanh(logits / decoder.config.logit_cap)
    return out.pooled_PxRxKxD, logits[..., : decoder.config.vocab_size]


def random_tokens(rows: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCABULARY, (rows, length), np.int32)


def whole_rows(rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions and segments of rows of one example each, without padding."""
    return np.tile(np.arange(length, dtype=np.int32), (rows, 1)), np.ones((rows, length), np.int32)
