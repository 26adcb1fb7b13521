"""What the stages share, before a model is loaded."""

import dataclasses
import types

import pytest

from alignx_jax.config import Config, DataConfig
from alignx_jax.exits import UserError
from alignx_jax.stages.session import Session


def test_a_cutoff_beyond_the_models_context_is_refused():
    decoder = types.SimpleNamespace(max_positions=64, vocab_size=600)
    source = types.SimpleNamespace(decoder_config=lambda: decoder, huggingface="nowhere")
    for cutoff, says in ((65, "--data.cutoff=65: longer than the model's context of 64 tokens"), (64, "no tokenizer")):
        config = dataclasses.replace(Config(), data=DataConfig(cutoff=cutoff))
        with pytest.raises(UserError, match=says):
            Session.tokenizer(types.SimpleNamespace(config=config), source)
