"""Stage 1 of AlignX (arXiv 2509.24338) as published, in plain PyTorch and transformers: the baseline of `step.py`.

What is computed is the published step: padded micro-batches, every hidden state and all float32 logits kept, all
N^2 language pairs materialised, micro-batches averaged as a mean of means. Precision is the caller's: float32, or
`train_step` under `torch.autocast`. Nothing is slowed down: attention is transformers' default (sdpa), and
`optimizer_and_schedule` takes the fused AdamW.

Shapes: B rows of a micro-batch, T tokens, V vocabulary, D hidden size; n rows that the filter keeps, N = 2n.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, get_linear_schedule_with_warmup
from transformers.activations import ACT2FN

SOURCE, TARGET = 1, 2  # marks in src_tgt_index
IGNORED = -100  # a label outside the next-token loss


class Example(TypedDict):
    """One translation example, not padded."""

    input_ids: Sequence[int]
    src_tgt_index: Sequence[int]  # per token: 1 on the source sentence, 2 on the target sentence, 0 elsewhere
    src_lang: int
    tgt_lang: int


def collate(examples: Sequence[Example], pad_id: int) -> dict[str, Tensor]:
    """Pads on the left to the next multiple of 8. Every token is a label, BOS and the prompt too; padding is none.

    Returns:
        int64 input_ids, attention_mask, labels, src_tgt_index [B, T]; src_lang, tgt_lang [B].
    """
    longest = max(len(example["input_ids"]) for example in examples)
    length = -(-longest // 8) * 8

    def padded(name: str, fill: int) -> Tensor:
        return torch.tensor([[fill] * (length - len(e[name])) + list(e[name]) for e in examples])

    input_ids = padded("input_ids", pad_id)
    lengths = torch.tensor([len(example["input_ids"]) for example in examples])
    attention_mask = (torch.arange(length) >= length - lengths[:, None]).long()
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "labels": input_ids.masked_fill(attention_mask == 0, IGNORED),
        "src_tgt_index": padded("src_tgt_index", 0),
        "src_lang": torch.tensor([example["src_lang"] for example in examples]),
        "tgt_lang": torch.tensor([example["tgt_lang"] for example in examples]),
    }


class LanguageMatchingClassifier(nn.Module):
    """Gated two-class head on concatenated pairs, [..., 2D] -> [..., 2] (paper section 3.2)."""

    def __init__(self, hidden_size: int, width: int, activation: str):
        super().__init__()
        self.gate_proj = nn.Linear(2 * hidden_size, width, bias=False)
        self.up_proj = nn.Linear(2 * hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, 2, bias=False)
        self.activation = ACT2FN[activation]
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.02)

    def forward(self, pairs: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_proj(pairs)) * self.up_proj(pairs))


class AlignXTorch(nn.Module):
    """A decoder, as published a Llama, with the losses of stage 1.

    Args:
        model: Hugging Face folder of the decoder; its `language_matching_classifier` weights, if any, are not read. Or
            a configuration, for random weights.
        align_layer: layers run before the hidden state that the contrastive loss aligns.
        attn_implementation: "sdpa" or "eager". They differ where a query is fully masked: the last padding position.
    """

    def __init__(
        self,
        model: str | os.PathLike | PretrainedConfig,
        align_layer: int,
        *,
        contrastive_weight: float = 0.3,
        language_matching_weight: float = 0.4,
        temperature: float = 0.1,
        attn_implementation: str = "sdpa",
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        known = isinstance(model, PretrainedConfig)
        make = AutoModelForCausalLM.from_config if known else AutoModelForCausalLM.from_pretrained
        self.llm = make(model, attn_implementation=attn_implementation, dtype=dtype)
        config = self.llm.config
        activation = config.hidden_activation if hasattr(config, "hidden_activation") else config.hidden_act
        self.language_matching_classifier = LanguageMatchingClassifier(config.hidden_size, 128, activation)
        self.language_matching_classifier.to(dtype)
        self.align_layer, self.temperature = align_layer, temperature
        self.weights = {"contrastive": contrastive_weight, "language_matching": language_matching_weight}

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The losses of one micro-batch, as `collate` returns it, each a scalar: next_token, contrastive,
        language_matching and their weighted sum, loss.

        Raises:
            ValueError: the filter drops every row (the published code crashes there).
        """
        kept_B = batch["src_tgt_index"][:, -4] == TARGET  # at least 3 target tokens before the last position
        batch = {name: tensor[kept_B] for name, tensor in batch.items()}
        if not len(batch["input_ids"]):
            raise ValueError("every row of the micro-batch has fewer than 3 target tokens; leave it out")
        output = self.llm(
            batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True, use_cache=False
        )
        index, hidden = batch["src_tgt_index"], output.hidden_states
        languages_N = torch.cat([batch["src_lang"], batch["tgt_lang"]])
        losses = {
            "next_token": next_token_loss(output.logits, batch["labels"]),
            "contrastive": contrastive_loss(hidden[self.align_layer], index, self.temperature),
            "language_matching": self.language_matching_loss(hidden[-1][:, :-1], index[:, 1:], languages_N),
        }
        total = losses["next_token"] + sum(weight * losses[name] for name, weight in self.weights.items())
        return {"loss": total, **losses}

    def language_matching_loss(self, hidden_nxTxD: Tensor, index_nxT: Tensor, languages_N: Tensor) -> Tensor:
        """Mean cross-entropy of "same language?" over all ordered pairs of pooled sentences, diagonal included."""
        pooled_NxD = torch.cat([mean_over(hidden_nxTxD, index_nxT == mark) for mark in (SOURCE, TARGET)])
        count = len(pooled_NxD)
        first, second = pooled_NxD[:, None].expand(-1, count, -1), pooled_NxD[None].expand(count, -1, -1)
        pairs_NxNx2D = torch.cat([first, second], dim=-1)
        same_NxN = (languages_N[:, None] == languages_N).long()
        return F.cross_entropy(self.language_matching_classifier(pairs_NxNx2D).flatten(0, 1), same_NxN.flatten())


def mean_over(hidden_nxTxD: Tensor, span_nxT: Tensor) -> Tensor:
    """Mean hidden state of each row's span, [n, D]; NaN where the span is empty, as published."""
    weights_nxTx1 = span_nxT[..., None].to(hidden_nxTxD.dtype)
    return (hidden_nxTxD * weights_nxTx1).sum(1) / weights_nxTx1.sum(1)


def next_token_loss(logits_nxTxV: Tensor, labels_nxT: Tensor) -> Tensor:
    """Mean cross-entropy, in float32 or the wider type of the logits."""
    logits_nxTxV = logits_nxTxV.to(torch.promote_types(logits_nxTxV.dtype, torch.float32))
    return F.cross_entropy(logits_nxTxV[:, :-1].flatten(0, 1), labels_nxT[:, 1:].flatten(), ignore_index=IGNORED)


def contrastive_loss(hidden_nxTxD: Tensor, index_nxT: Tensor, temperature: float) -> Tensor:
    """Each source against all targets of the micro-batch, halved (paper section 3.1)."""
    source_nxD, target_nxD = (mean_over(hidden_nxTxD, index_nxT == mark) for mark in (SOURCE, TARGET))
    cosine_nxn = F.cosine_similarity(source_nxD[:, None], target_nxD[None], dim=-1)  # [source, target]
    return F.cross_entropy(cosine_nxn / temperature, torch.arange(len(cosine_nxn), device=cosine_nxn.device)) / 2


def optimizer_and_schedule(model: nn.Module, learning_rate: float, warmup_steps: int, total_steps: int):
    """AdamW without decay on all parameters; linear warm-up from 0, so that the first update is none, then to 0."""
    optimizer = torch.optim.AdamW(
        model.parameters(), learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, fused=True
    )
    return optimizer, get_linear_schedule_with_warmup(optimizer, warmup_steps, total_steps)


def train_step(model: AlignXTorch, optimizer, scheduler, micro_batches: Sequence[dict[str, Tensor]]) -> dict:
    """One optimizer step on the plain mean of the micro-batches' losses, clipped to a global norm of 1.

    Returns:
        The four losses of `AlignXTorch.forward` per micro-batch, grad_norm before clipping (tensors: reading them
        waits for the device), and the learning_rate of this update.
    """
    micro_losses = []
    for batch in micro_batches:
        losses = model(batch)
        (losses["loss"] / len(micro_batches)).backward()
        micro_losses.append({name: loss.detach() for name, loss in losses.items()})
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    learning_rate = scheduler.get_last_lr()[0]
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    stacked = {name: torch.stack([losses[name] for losses in micro_losses]) for name in micro_losses[0]}
    return {**stacked, "grad_norm": grad_norm, "learning_rate": learning_rate}
