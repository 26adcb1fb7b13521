"""The embedded model, which most tests of evaluation measure."""

import pytest

from alignx_jax.data import tokenizer
from alignx_jax.data.tokenizer import Tokenizer
from alignx_jax.training import runs


@pytest.fixture(scope="session")
def sample() -> tuple[runs.Source, Tokenizer]:
    source = runs.find("sample")
    return source, tokenizer.load(source.huggingface)
