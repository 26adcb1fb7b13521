"""Families of decoders against transformers and PyTorch; for Llamas, each module has its own such tests."""

import pytest

from benchmarks import parity
from tests.models import llamas

RARE = ("mistral_nemo", "gemma")  # have nothing that no other one has


@pytest.mark.parametrize(
    "variant", [pytest.param(v, marks=[pytest.mark.slow] if v in RARE else []) for v in llamas.OTHERS]
)
def test_parity(tmp_path, variant):
    found = parity.measure(variant, tmp_path)
    assert found.logits < 1e-4 and found.states < 1e-4 and found.gradients < 1e-10
    assert (found.generations, found.round_trips) == (6, 3)


def test_every_variant_is_in_the_table():
    assert parity.FEATURES.keys() == (llamas.VARIANTS.keys() | llamas.OTHERS.keys()) - {"llama2"}
