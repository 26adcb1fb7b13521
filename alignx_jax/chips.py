"""What one chip can do by its maker's figures; `plan` divides a compiled step by them.

TPU: https://docs.cloud.google.com/tpu/docs/v5e, .../v5p and .../v6e. The memory is what the compiler of libtpu 0.0.42
names as available in its message when a program does not fit; the documents say 16, 95 and 32 GB.
GPU: NVIDIA's data sheets of the H100 SXM and the H200 SXM, without sparsity.
"""

from __future__ import annotations

import dataclasses

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    name: str
    hbm_bytes: float
    flops: float
    """bfloat16 FLOP/s of matrix products."""
    hbm_bandwidth: float
    """Bytes/s."""
    link_bandwidth: float
    """Bytes/s that a chip can send to the others at best, over all of its links: half of the figure for both ways.
    A TPU slice shorter than a whole axis of its pod has no links around its ends, and reaches less."""


TPUS = {
    "v5e": Chip("TPU v5e", 15.75 * _GIB, 197e12, 819e9, 200e9),
    "v5p": Chip("TPU v5p", 95.74 * _GIB, 459e12, 2765e9, 600e9),
    "v6e": Chip("TPU v6e", 31.25 * _GIB, 918e12, 1600e9, 400e9),
}
"""By the first part of a topology's name."""
GPUS = {
    "h100": Chip("H100 SXM 80 GB", 80e9, 989e12, 3350e9, 450e9),
    "h200": Chip("H200 SXM 141 GB", 141e9, 989e12, 4800e9, 450e9),
}
