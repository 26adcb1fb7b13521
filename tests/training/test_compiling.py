"""What a step takes at the devices' peak; that the step compiled beside is the one that runs is in test_runs.py."""

import dataclasses

import pytest

from alignx_jax import sharding
from alignx_jax.config import Config, DataConfig, TrainingConfig
from alignx_jax.planning import chips
from alignx_jax.runs import loading
from alignx_jax.training import compiling

CONFIG = Config(data=DataConfig(row_length=256), training=TrainingConfig(rows=8))


def test_the_time_at_the_peak_is_of_all_devices(monkeypatch):
    v5e = chips.TPUS["v5e"]
    monkeypatch.setattr(chips, "of_device", lambda kind: v5e)
    decoder = loading.find("sample").decoder_config()
    found = compiling.at_best(CONFIG, decoder, sharding.make_mesh("4x2"))
    assert found == pytest.approx(chips.model_flops(decoder, 8, 256, causal=True) / (8 * 197e12))
    single = dataclasses.replace(CONFIG, training=TrainingConfig(rows=8, compute_dtype="float32"))
    assert compiling.at_best(single, decoder, sharding.make_mesh("4x2")) is None


def test_a_cpu_has_no_peak():
    assert compiling.at_best(CONFIG, loading.find("sample").decoder_config(), sharding.make_mesh("1x1")) is None
