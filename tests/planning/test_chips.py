"""Chips by the names that JAX has for them."""

import pytest

from alignx_jax.planning import chips


@pytest.mark.parametrize(
    ("kind", "chip"),
    [
        ("TPU v5 lite", "TPU v5e"),
        ("TPU v5p", "TPU v5p"),
        ("TPU v5", "TPU v5p"),
        ("TPU v6 lite", "TPU v6e"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM 80 GB"),
        ("NVIDIA H200", "H200 SXM 141 GB"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA A100-SXM4-80GB", None),
        ("TPU v4", None),
        ("cpu", None),
    ],
)
def test_a_device_is_found_by_its_kind_or_its_figures_are_not_known(kind, chip):
    found = chips.of_device(kind)
    assert (found and found.name) == chip
