import pytest

from alignx_jax import sharding
from alignx_jax.models import huggingface
from tests.models import llamas


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """(transformers model, our decoder loaded from what it saved) of a variant; each made once."""
    made = {}

    def of(variant: str):
        if variant not in made:
            model = llamas.make(variant)
            folder = llamas.save(model, tmp_path_factory.mktemp(variant))
            made[variant] = model, huggingface.load(folder, sharding.make_mesh("1x1"))
        return made[variant]

    return of


@pytest.fixture
def folder(tmp_path):
    """A good Hugging Face folder, for a test to spoil."""
    return llamas.save(llamas.make("gqa"), tmp_path / "model")
