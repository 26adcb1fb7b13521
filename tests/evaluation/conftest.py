"""The embedded model, which most tests of evaluation measure."""

import numpy as np
import pytest

from alignx_jax.data import tokenizer
from alignx_jax.data.tokenizer import Tokenizer
from alignx_jax.runs import loading


@pytest.fixture(scope="session")
def sample() -> tuple[loading.Source, Tokenizer]:
    source = loading.find("sample")
    return source, tokenizer.load(source.huggingface)


@pytest.fixture(scope="session")
def states(sample):
    """Hidden states [L+1,T,D] of token ids, by transformers."""
    import torch
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(sample[0].huggingface, dtype=torch.float32)

    def states(ids):
        with torch.no_grad():
            hidden = theirs(torch.tensor([list(ids)]), output_hidden_states=True).hidden_states
        return np.stack([h[0].numpy() for h in hidden]).astype(np.float64)

    return states
