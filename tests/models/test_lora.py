"""Adapters against PEFT and PyTorch: logits, gradients, the merged model, and the folder that PEFT loads."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import transformers
from flax import nnx

from alignx_jax import sharding
from alignx_jax.config import LoraConfig
from alignx_jax.exits import UserError
from alignx_jax.models import huggingface, lora
from alignx_jax.models import peft as folders
from tests.models import llamas

LORA = LoraConfig(rank=3, alpha=5.0)
FAMILIES = ["gqa", "tied_head_dim", "biases", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3"]


def adapted(folder, spec: str = "1x1", settings: LoraConfig = LORA, dtype=jnp.float32):
    """The model in a folder with adapters of which each number is random and matters."""
    decoder = huggingface.load(folder, sharding.make_mesh(spec), dtype)
    lora.attach(decoder, settings, seed=1)
    for n, adapter in enumerate(decoder.layers.adapters.values()):
        noise = np.random.default_rng(n).normal(0, 0.2, adapter.b.shape)
        adapter.b[...] = jnp.asarray(noise, adapter.b.dtype)
    return decoder


def logits(decoder, tokens):
    return llamas.our_states(decoder, tokens, *llamas.whole_rows(*tokens.shape))


@pytest.mark.parametrize("variant", FAMILIES)
def test_peft_loads_the_folder_and_gives_the_same_states_as_adapters_and_merged_weights(variant, tmp_path):
    folder = llamas.save(llamas.make(variant), tmp_path / "model")
    decoder, tokens = adapted(folder), llamas.random_tokens(2, 24)
    folders.export(decoder, LORA, tmp_path / "adapter", "model")
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    plain = llamas.states(base, tokens)[1]
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    expected = llamas.states(theirs, tokens)
    assert np.abs(expected[1] - plain).max() > 0.1, "the adapters matter"
    for ours in (logits(decoder, tokens), logits(lora.merge(decoder), tokens)):
        for found, wanted in zip(ours, expected, strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    assert not decoder.layers.adapters


def test_fresh_adapters_change_nothing_and_are_those_of_peft(folder):
    decoder, tokens = huggingface.load(folder, sharding.make_mesh("1x1")), llamas.random_tokens(2, 24)
    before = logits(decoder, tokens)
    lora.attach(decoder, LoraConfig(rank=16), seed=0)
    for found, expected in zip(logits(decoder, tokens), before, strict=True):
        np.testing.assert_array_equal(found, expected)
    model = peft.get_peft_model(
        llamas.make("gqa"), peft.LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    sizes = {name.split(".")[-4]: a.shape[1] for name, a in model.named_parameters() if "lora_A" in name}
    assert sizes.keys() == lora.linear_layers(decoder.config).keys()
    for name, weight in lora.linear_layers(decoder.config).items():
        a = np.asarray(decoder.layers.adapters[weight.path[-1]].a[...])
        bound = sizes[name] ** -0.5
        theirs = [p.detach().numpy() for k, p in model.named_parameters() if f"{name}.lora_A" in k]
        for uniform in (a, *theirs):
            assert 0.95 * bound < np.abs(uniform).max() <= bound
            np.testing.assert_allclose(uniform.std(), bound / math.sqrt(3), rtol=0.1)


@pytest.mark.parametrize("spec", ["8x1", "2x2", "4x1"])
def test_any_mesh_gives_the_same(folder, spec):
    tokens = llamas.random_tokens(8, 24)
    expected = logits(adapted(folder), tokens)
    with jax.set_mesh(sharding.make_mesh(spec)):
        decoder = adapted(folder, spec)
        graph, variables = nnx.split(decoder)
        params = nnx.to_pure_dict(variables)
        decoder = nnx.merge(
            graph, jax.device_put(params, sharding.parameter_shardings(params, sharding.make_mesh(spec)))
        )
        found = logits(decoder, tokens)
        kept = jax.tree.map(lambda x: x.sharding, nnx.to_pure_dict(nnx.state(decoder))["layers"]["gate"])
        merged = logits(lora.merge(decoder), tokens)
        assert decoder.layers.gate[...].sharding == kept
    for ours in (found, merged):
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), ours, expected)


def test_merged_weights_are_the_sums_in_float64(folder):
    decoder = adapted(folder, dtype=jnp.bfloat16)
    weights = jax.tree.map(lambda x: np.asarray(x, np.float64), nnx.to_pure_dict(nnx.state(decoder)))["layers"]
    adapters = weights.pop("adapters")
    merged = nnx.to_pure_dict(nnx.state(lora.merge(decoder)))["layers"]
    assert merged.keys() == weights.keys()
    for name, found in merged.items():
        expected = weights[name]
        if name in adapters:
            of = adapters[name]
            expected = expected + 5 / 3 * np.stack([np.tensordot(*ab, 1) for ab in zip(of["a"], of["b"], strict=True)])
        assert found.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=2**-8, atol=1e-7)


def test_targets_are_names_of_hugging_face(folder, tmp_path):
    settings = dataclasses.replace(LORA, targets="q_proj|v_proj")
    decoder = adapted(folder, settings=settings)
    assert set(decoder.layers.adapters) == {"query", "value"}
    assert lora.count(settings, decoder.config) == sum(
        x.size for x in jax.tree.leaves(nnx.state(decoder, nnx.LoRAParam))
    )
    folders.export(decoder, settings, tmp_path / "adapter", "model")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["target_modules"] == [
        "q_proj",
        "v_proj",
    ]
    with pytest.raises(UserError, match="adapter exists already"):
        folders.export(decoder, settings, tmp_path / "adapter", "model")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rank": 4, "targets": "lm_head"}, "matches no linear layer; there are q_proj, k_proj, v_proj, o_proj, gate"),
        ({"rank": 4, "targets": "q_proj|("}, "not a regular expression"),
        ({"rank": 17}, "k_proj is of 32 inputs and 16 outputs, and no matrix of it has a higher rank than 16"),
        ({"targets": "q_proj"}, "--lora.rank=0 has none; give a rank"),
    ],
)
def test_what_cannot_be_is_refused(folder, settings, said):
    config = huggingface.load(folder, sharding.make_mesh("1x1")).config
    with pytest.raises(UserError, match=said.replace("(", r"\(")):
        lora.check(LoraConfig(**settings), config)
    lora.check(LoraConfig(rank=16), config)
    lora.check(LoraConfig(), config)
