"""AlignX in JAX and Flax. The names below are the Python API (docs/python.md); everything else may change.

Each is imported when it is first used, so that `import alignx_jax` alone takes no time and no memory.
"""

import importlib
from typing import Any

_API = {
    "Batch": "alignx_jax.batch:Batch",
    "Config": "alignx_jax.config:Config",
    "PairClassifier": "alignx_jax.training.state:PairClassifier",
    "UserError": "alignx_jax.exits:UserError",
    "build_data": "alignx_jax.data.pipeline:build",
    "build_step": "alignx_jax.training.build:build_step",
    "find": "alignx_jax.runs.loading:find",
    "load_config": "alignx_jax.config_files:load",
    "load_tokenizer": "alignx_jax.data.tokenizer:load",
    "losses": "alignx_jax.losses",
    "make_mesh": "alignx_jax.sharding:make_mesh",
    "metrics": "alignx_jax.evaluation.measure.metrics",
    "prepare_devices": "alignx_jax.sharding:prepare_devices",
    "recipe": "alignx_jax.training.build:recipe",
    "with_layer": "alignx_jax.evaluation.measure.alignment:with_layer",
}
"""Where each name is defined: a module, or a name in one."""

__all__ = sorted(_API)


def __getattr__(name: str) -> Any:
    if name not in _API:
        raise AttributeError(f"module 'alignx_jax' has no attribute {name!r}; it has {', '.join(_API)}")
    module, _, member = _API[name].partition(":")
    found = importlib.import_module(module)
    return getattr(found, member) if member else found


def __dir__() -> list[str]:
    return sorted({*globals(), *_API})
