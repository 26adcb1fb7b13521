"""Adapters as a folder that PEFT loads: `peft.PeftModel.from_pretrained(base_model, folder)`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from alignx_jax import hosts, sharding, storage
from alignx_jax.config import LoraConfig
from alignx_jax.models import huggingface, lora
from alignx_jax.models.decoder import Decoder

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"


def export(
    decoder: Decoder,
    settings: LoraConfig,
    folder: storage.Path,
    base: str,
    others: Mapping[str, bytes] = MappingProxyType({}),
) -> None:
    """Writes the adapters of `decoder`, in their own type, and their configuration.

    The folder appears only when all of it is written. Every process has to call this, and the first one writes.

    Args:
      settings: that the adapters were made with.
      base: the name of the model below them.
      others: files that belong beside these, by name.

    Raises:
      UserError: the folder holds something already.
      StorageError: a file could not be written.
    """
    partial, tensors, config = storage.beside(folder), {}, decoder.config
    hosts.first("folder of an export", lambda: storage.begin(partial, folder, {_WEIGHTS, *others}))
    for weight in lora.targets(settings, config).values():
        adapter = decoder.layers.adapters[weight.path[-1]]
        inputs, outputs = map(math.prod, lora.shapes(weight, config))
        a_Lxixr, b_Lxrxo = (sharding.to_host(x[...]) for x in (adapter.a, adapter.b))
        for key, a, b in zip(weight.keys(config), a_Lxixr, b_Lxrxo, strict=True):
            module = f"base_model.model.{key.removesuffix('.weight')}"
            tensors[f"{module}.lora_A.weight"] = np.ascontiguousarray(a.reshape(inputs, -1).T)
            tensors[f"{module}.lora_B.weight"] = np.ascontiguousarray(b.reshape(-1, outputs).T)

    def write() -> None:
        huggingface.save(tensors, partial, _WEIGHTS)
        for name, content in others.items():
            huggingface.write(partial, name, content)
        huggingface.write(partial, _CONFIG, huggingface.to_json(_config(decoder, settings, base)))
        storage.end(partial, folder, last=_CONFIG)

    hosts.first("end of an export", write)


def _config(decoder: Decoder, settings: LoraConfig, base: str) -> dict:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "target_modules": list(lora.targets(settings, decoder.config)),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
