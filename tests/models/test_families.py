import copy
import dataclasses
import json
import math
import pathlib
import re

import numpy as np
import pytest
import torch
import transformers

from alignx_jax import sharding
from alignx_jax.exits import UserError
from alignx_jax.models import huggingface
from alignx_jax.models.families import FAMILIES, decoder_config
from alignx_jax.models.rope import Rope
from tests.models import llamas

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
        ({"attention_dropout": 0.1}, "attention_dropout = 0.1 is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4} is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; supported: silu"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "'dynamic' is not supported; supported: default, linear",
        ),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "'longrope' is not supported"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling: the field factor is missing"),
        ({"rope_scaling": {"type": "default", "mrope_section": [16, 24, 24]}}, "mrope_section is not supported"),
        ({"rope_parameters": {"rope_type": "default"}}, "has both rope_parameters and rope_scaling; leave out one"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not supported; supported: 1"),
        ({"model_type": "mistral", "layer_types": ["full_attention"] * 32}, "layer_types = ['full_attention', "),
        ({"model_type": "mistral", "sliding_window": -1}, "sliding_window is -1; expected a number above 0"),
        ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 32}, "layer_types = ['sliding_attention', "),
        (
            {"model_type": "mistral", "sliding_window": None, "layer_types": ["sliding_attention"] * 32},
            "layer_types = [",
        ),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": -1}, "max_window_layers is -1; exp"),
        ({"model_type": "gemma2", "layer_types": [["full_attention"]] * 32}, "layer_types has to name each of 32"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, more than any model has (at most 4,096)"),
        ({"model_type": "gemma2", "num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, more than any"),
        ({"model_type": "qwen2", "num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, more than any"),
        ({"vocab_size": 10**12}, "vocab_size is 1000000000000, more than any model has (at most 33,554,432)"),
        ({"sliding_window": 10**12, "model_type": "mistral"}, "sliding_window is 1000000000000, more than any"),
        ({"hidden_size": 2**40, "num_attention_heads": 2**30}, "hidden_size is 1099511627776, more than any"),
        ({"model_type": "qwen3", "use_sliding_window": True, "layer_types": ["full_attention"]}, "each of 32 layers"),
        ({"model_type": "gemma", "use_bidirectional_attention": True}, "use_bidirectional_attention = True is not"),
        ({"model_type": "gemma", "hidden_activation": "gelu"}, "hidden_activation = 'gelu' is not supported"),
        ({"model_type": "gemma2", "hidden_activation": "relu"}, "hidden_activation 'relu' is not supported"),
        ({"model_type": "gemma2", "layer_types": ["chunked_attention"] * 32}, "layer_types has to name each of 32"),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0 is not"),
        (
            {"model_type": "gemma3_text", "rope_parameters": {"rope_type": "linear"}, "rope_scaling": None},
            "rope_parameters has rope_type; expected an object for each layer type",
        ),
        ({"model_type": "gemma3"}, "'gemma3' is not supported (it has an image encoder; docs/families.md says how"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling: the field factor is missing"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}, "rope_scaling": None},
            "rope_parameters: partial_rotary_factor = 0.5",
        ),
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


# What changes nothing here: names and ids for tokenizers and generation, what transformers returns or caches, settings
# of other heads, and of a pass over the MLP in pieces, which these models do not have.
IRRELEVANT = {"architectures", "dtype", "transformers_version", "use_cache", "return_dict", "output_hidden_states"}
IRRELEVANT |= {"bos_token_id", "eos_token_id", "pad_token_id", "id2label", "label2id", "problem_type"}
IRRELEVANT |= {"chunk_size_feed_forward", "is_encoder_decoder"}
IRRELEVANT |= {"pretraining_tp"}  # products in slices, for bits of other machines; transformers 5 forms them whole
CLASSES = {family: transformers.AutoConfig.for_model(family).__class__ for family in FAMILIES}


class Recorded(dict):
    """Which of its keys are asked for."""

    def __init__(self, values):
        super().__init__(values)
        self.asked = set()

    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)

    def __ror__(self, defaults):
        self.update({k: v for k, v in defaults.items() if k not in self})
        return self


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_of_the_class_of_transformers_is_read_or_irrelevant(family):
    windows = {"use_sliding_window": True} if family.startswith("qwen") else {}  # else their window is not asked for
    written = CLASSES[family](**windows).to_dict()
    asked = Recorded(written)
    decoder_config(asked, "config.json")
    fields = {f.name for f in dataclasses.fields(CLASSES[family])} | {"quantization_config"}
    assert fields - asked.asked - IRRELEVANT == set()


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_config_leaves_out_is_what_transformers_takes(family):
    """But for sizes, which are to be there."""
    full = CLASSES[family]().to_dict()
    sizes = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}
    short = {k: full[k] for k in {"model_type"} | sizes}
    assert decoder_config(short, "config.json") == decoder_config(full, "config.json")


GEMMA_3_4B = {
    "model_type": "gemma3_text",
    "vocab_size": 262208,
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_hidden_layers": 34,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-6,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "rope_theta": 1000000.0,
    "sliding_window": 1024,
    "sliding_window_pattern": 6,
}


def test_gemma_3_in_both_spellings():
    config = decoder_config(GEMMA_3_4B, "config.json")
    assert (config.rope, config.local_rope) == (Rope("linear", 1e6, 8.0), Rope("default", 1e4))
    assert config.local_layers == (True, True, True, True, True, False) * 5 + (True,) * 4
    assert [kind.window for kind in config.kinds] == [None, 1024]
    written = CLASSES["gemma3_text"](**GEMMA_3_4B).to_dict()
    assert "rope_theta" not in written and "layer_types" in written
    assert decoder_config(written, "config.json") == config
    other = GEMMA_3_4B | {"rope_local_base_freq": 2e4, "rope_theta": 3e6, "sliding_window_pattern": 2}
    other = decoder_config(other, "config.json")
    assert (other.rope.theta, other.local_rope.theta, other.local_layers[:3]) == (3e6, 2e4, (True, False, True))


def test_the_text_part_of_gemma_3_is_saved_as_the_documentation_says(tmp_path, monkeypatch):
    """And stops where the whole model stops."""
    small = {k: v for k, v in GEMMA_3_4B.items() if k not in ("model_type", "rope_scaling")}
    small |= {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=small | {"num_key_value_heads": 2},
        vision_config=vision | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        boi_token_index=300,
        eoi_token_index=301,
        image_token_index=302,
    )
    both = transformers.Gemma3ForConditionalGeneration(config)
    both.generation_config.eos_token_id = [1, 106]
    monkeypatch.chdir(tmp_path)
    both.save_pretrained("gemma-3-4b-pt")
    page = (pathlib.Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8")
    exec(next(code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "Gemma3" in code), {})
    text = tmp_path / "gemma-3-4b-pt-text"
    assert huggingface.stop_ids(text, 1) == [1, 106]
    decoder, tokens = huggingface.load(text, sharding.make_mesh("1x1")), llamas.random_tokens(1, 8)
    theirs = both(input_ids=torch.from_numpy(tokens).long()).logits.detach().numpy()
    ours = llamas.our_states(decoder, tokens, *llamas.whole_rows(1, 8))[1]
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_windows_of_other_families():
    assert read(model_type="mistral").local_layers == (True,) * 32
    assert read(model_type="mistral", sliding_window=None).kinds == ((None, LLAMA_31_ROPE),)
    assert read(model_type="qwen2", sliding_window=131072, max_window_layers=28).local_layers == ()
    some = read(model_type="qwen2", use_sliding_window=True, sliding_window=131072, max_window_layers=28)
    assert (some.window, some.local_layers) == (131072, (False,) * 28 + (True,) * 4)


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "llama", "pretraining_tp": 2},
        {"model_type": "llama", "initializer_range": 0.0},
        {"model_type": "mistral", "sliding_window": 12, "layer_types": ["sliding_attention"] * 3},
        {"model_type": "mistral", "sliding_window": None, "layer_types": ["full_attention"] * 3},
        {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 12, "max_window_layers": 0},
        {"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 12, "max_window_layers": 0},
        {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": None, "max_window_layers": 1},
        {"model_type": "qwen2", "use_sliding_window": False, "max_window_layers": 0},
    ],
)
def test_unusual_configurations_compute_what_transformers_computes(tmp_path, fields):
    """Rows of 24 tokens; windows have 12."""
    small = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
    config = transformers.AutoConfig.for_model(**copy.deepcopy(small | fields), attn_implementation="eager")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(small | fields))
    tokens = llamas.random_tokens(2, 24)
    found = llamas.our_states(huggingface.load(tmp_path, sharding.make_mesh("1x1")), tokens, *llamas.whole_rows(2, 24))
    for ours, theirs in zip(found, llamas.states(model, tokens), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_yarn():
    asked = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    factor = 0.1 * math.log(4) + 1
    expected = Rope("yarn", 1e6, 4.0, original_max_positions=32768, attention_factor=factor)
    assert read(model_type="qwen2", rope_theta=1e6, rope_scaling=asked).rope == expected
    del asked["original_max_position_embeddings"]
    assert read(rope_scaling=asked, max_position_embeddings=999).rope.original_max_positions == 999
    assert read(rope_scaling=asked | {"attention_factor": 1.5}).rope.attention_factor == 1.5
    scaled = read(rope_scaling=asked | {"mscale": 0.5, "mscale_all_dim": 2.0}).rope
    assert scaled.attention_factor == pytest.approx((0.05 * math.log(4) + 1) / (0.2 * math.log(4) + 1))


def test_gelu_of_the_first_gemmas_is_its_approximation():
    gemma = {"model_type": "gemma", "hidden_act": "gelu", "hidden_activation": None}
    assert read(**gemma).activation == "gelu_pytorch_tanh"
    assert CLASSES["gemma"](hidden_act="gelu").hidden_act == "gelu_pytorch_tanh"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tables_of_other_families_name_the_tensors_of_transformers(family):
    small = {"vocab_size": 50, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "head_dim": 6}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    model = transformers.AutoModelForCausalLM.from_config(CLASSES[family](**small))
    config = decoder_config(model.config.to_dict(), "config.json")
    expected = {k: tuple(p.shape) for k, p in model.named_parameters()}
    table = FAMILIES[family].table(config)
    assert {key: w.tensor_shape(config) for w in table for key in w.keys(config)} == expected
    assert type(model).__name__ == FAMILIES[family].architecture


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
