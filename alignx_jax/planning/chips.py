"""What one chip can do by its maker's figures, and what a step asks of it: for plans, and for the MFU of a run.

TPU: https://docs.cloud.google.com/tpu/docs/v5e, .../v5p and .../v6e. The memory is what the compiler of libtpu 0.0.42
names as available in its message when a program does not fit; the documents say 16, 95 and 32 GB.
GPU: NVIDIA's data sheets of the H100 SXM and the H200 SXM, and its paper on the Ada architecture (RTX 4090, with sums
in float32), without sparsity.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from alignx_jax.models.architecture import DecoderConfig

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
    "rtx4090": Chip("RTX 4090 24 GB", 24e9, 165.2e12, 1008e9, 31.5e9),  # its link is PCI Express 4.0 x16
}
_KINDS = {"v5 lite": "v5e", "v5e": "v5e", "v5p": "v5p", "v5": "v5p", "v6 lite": "v6e", "v6e": "v6e"}
"""By what JAX calls a TPU (`device_kind`), the first that fits."""


def of_device(kind: str) -> Chip | None:
    """The chip that JAX calls `kind`; None where its figures are not here, as of a CPU."""
    for name, chip in _KINDS.items():
        if kind.startswith("TPU ") and name in kind:
            return TPUS[chip]
    if "H100" in kind and ("HBM3" in kind or "SXM" in kind):  # not the PCIe card, which is slower
        return GPUS["h100"]
    if "RTX 4090" in kind:
        return GPUS["rtx4090"]
    return GPUS["h200"] if "H200" in kind else None


def model_flops(decoder: DecoderConfig, rows: int, length: int, *, causal: bool, adapters: int = 0) -> float:
    """FLOPs of a step that computes nothing twice: 6 N a token and 12 H h for each token that it attends to in a layer.

    The count of PaLM (arXiv 2204.02311, appendix B): N are the weights of matrix products, the output table among them
    and the embedding table not, each 2 FLOPs forward and 4 backward; attention's two products a layer cost 2 H h each
    forward and twice that backward. A token attends to w tokens where the layer has a window of w < T, else to all T of
    its row; causal: to w - w^2 / 2T on average, else to T / 2. The pair losses and, in a packed row, the bounds of its
    examples are not counted.

    Args:
      adapters: their parameters n, where other weights are frozen and have no gradient: 4 N + 6 n in place of 6 N.
    """
    d, f, heads = decoder.hidden_size, decoder.intermediate_size, decoder.num_heads * decoder.head_dim
    layer = 2 * d * heads + 2 * d * decoder.num_kv_heads * decoder.head_dim + 3 * d * f
    weights = decoder.num_layers * layer + decoder.vocab_size * d
    local = sum(decoder.local_layers)
    reaches = [length] * (decoder.num_layers - local) + [min(decoder.window or length, length)] * local
    attended = sum(w - w * w / (2 * length) if causal else w for w in reaches)
    products = 4 * weights + 6 * adapters if adapters else 6 * weights
    return rows * length * (products + 12 * heads * attended)
