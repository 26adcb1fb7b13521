import dataclasses

import pytest
import transformers

from alignx_jax.config import UserError
from alignx_jax.models.families import FAMILIES, decoder_config
from alignx_jax.models.rope import Rope

LLAMA_31 = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}
LLAMA_31_ROPE = Rope("llama3", 500000.0, 8.0, 1.0, 4.0, 8192)


def read(**changes):
    return decoder_config(LLAMA_31 | changes, "config.json")


def test_transformers_4_spelling():
    config = read()
    assert config.rope == LLAMA_31_ROPE
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (32, 8, 128)
    assert (config.norm_epsilon, config.max_positions, config.activation) == (1e-5, 131072, "silu")
    assert not (config.tie_embeddings or config.attention_bias or config.mlp_bias)
    assert hash(config) == hash(read())


def test_transformers_5_spelling():
    written = transformers.LlamaConfig(
        **{k: v for k, v in LLAMA_31.items() if k not in ("model_type", "rope_theta", "rope_scaling")},
        rope_parameters=LLAMA_31["rope_scaling"] | {"rope_theta": 500000.0},
    ).to_dict()
    assert "rope_theta" not in written  # the spelling that this test is about
    assert decoder_config(written, "config.json") == read()


def test_old_llama_configs_have_neither_rope_nor_key_value_heads():
    old = {k: v for k, v in LLAMA_31.items() if k not in ("rope_theta", "rope_scaling", "num_key_value_heads")}
    config = decoder_config(old, "config.json")
    assert config.rope == Rope("default", 10000.0)
    assert config.num_kv_heads == 32


@pytest.mark.parametrize("spelling", ["type", "rope_type"])
def test_linear_scaling(spelling):
    assert read(rope_theta=10000, rope_scaling={spelling: "linear", "factor": 2}).rope == Rope("linear", 10000.0, 2.0)


def test_null_is_absent():
    assert read(head_dim=None, rope_scaling=None, quantization_config=None).rope == Rope("default", 500000.0)


@pytest.mark.parametrize(("vocab_size", "padded"), [(1, 128), (128, 128), (129, 256), (32000, 32000), (128257, 128384)])
def test_padded_vocabulary(vocab_size, padded):
    assert read(vocab_size=vocab_size).padded_vocab_size == padded


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported; supported: llama"),
        ({"model_type": None}, "model_type None is not supported"),
        ({"pretraining_tp": 2}, "pretraining_tp = 2 is not supported"),
        ({"attention_dropout": 0.1}, "attention_dropout = 0.1 is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4} is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; supported: silu"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "'dynamic' is not supported; supported: default, linear",
        ),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "'yarn' is not supported"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling: the field factor is missing"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_scaling": LLAMA_31["rope_scaling"] | {"low_freq_factor": 4.0}}, "low_freq_factor 4.0 is not below"),
        ({"hidden_size": None}, "the field hidden_size is missing"),
        ({"hidden_size": "4096"}, "hidden_size is '4096'; expected a whole number"),
        ({"hidden_size": True}, "hidden_size is True; expected a whole number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; expected a number above 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan; expected a number above 0"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1; expected true or false"),
        ({"num_key_value_heads": 5}, "5 num_key_value_heads do not divide 32"),
        ({"hidden_size": 4100}, "32 num_attention_heads do not divide hidden_size 4100"),
        ({"head_dim": 15}, "head_dim 15 is odd"),
    ],
)
def test_what_does_not_work_is_refused_by_name(changes, message):
    with pytest.raises(UserError) as error:
        read(**changes)
    assert str(error.value).startswith("config.json")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("biases", [True, False])
def test_the_table_names_the_tensors_of_transformers(tied, biases):
    small = {"vocab_size": 50, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "head_dim": 6}
    hf = transformers.LlamaConfig(
        **small,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        attention_bias=biases,
        mlp_bias=biases,
    )
    config = decoder_config(hf.to_dict(), "config.json")
    expected = {k: tuple(p.shape) for k, p in transformers.LlamaForCausalLM(hf).named_parameters()}
    table = FAMILIES["llama"].table(config)
    assert {key: w.tensor_shape(config) for w in table for key in w.keys(config)} == expected
    assert dataclasses.asdict(config)["tie_embeddings"] is tied
