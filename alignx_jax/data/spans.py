"""Where the source and the target sentence stand among an example's tokens."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

from alignx_jax.data.fields import Bad
from alignx_jax.data.prompts import Prompt
from alignx_jax.data.tokenizer import Encoding, Tokenizer

Drop = Literal["overlong", "few target tokens", "no source token", "no response token"]
DROPS: tuple[Drop, ...] = ("overlong", "few target tokens", "no source token", "no response token")


@dataclasses.dataclass(frozen=True)
class Example:
    """One sequence. Ranges are [start, end) over its tokens; (0, 0) is an empty one."""

    tokens: np.ndarray
    """[n] int32, with BOS and EOS."""
    source: tuple[int, int]
    target: tuple[int, int]
    labels: np.ndarray
    """[n] bool: tokens with weight in the next-token loss."""
    alone: tuple[int, int] | None = None
    """First tokens of the source and of the target by themselves, behind the prompt, if they are encoded once more."""


def token_range(offsets: np.ndarray, characters: tuple[int, int]) -> tuple[int, int]:
    """The tokens that overlap [start, end) of the text, as one range; (0, 0) if none does.

    Args:
      offsets: [n,2] characters of each token.
    """
    starts, ends = offsets.T
    (inside,) = np.nonzero(np.maximum(starts, characters[0]) < np.minimum(ends, characters[1]))
    return (int(inside[0]), int(inside[-1]) + 1) if len(inside) else (0, 0)


def mark(
    encoding: Encoding,
    prompt: Prompt,
    tokenizer: Tokenizer,
    *,
    cutoff: int,
    overlong: Literal["drop", "truncate"],
    min_target_tokens: int | None,
    loss_on: Literal["sequence", "response"],
) -> Example | Drop:
    """The example of an encoded prompt, or why it is dropped.

    BOS comes first, where the tokenizer puts it before a text and the template does not write it; EOS last, unless the
    cutoff leaves no room for it. The last position, EOS or the last token of a
    truncated sequence, is in no span (published: its `src_tgt_index` is 0). The token `min_target_tokens` places
    before the last position has to be a target token or the example is dropped (published: 3, as
    `src_tgt_index[:, -4] == 2`). None is for instructions, which have no spans and need one token of the response.
    Labels are all tokens, or those from the first of the response on, but the first of all, which nothing predicts.
    """
    ids, offsets = encoding
    before = np.array(tokenizer.before(ids), np.int32)
    first = len(before)
    source, target = (
        (start + first, end + first) if end else (0, 0)
        for start, end in (token_range(offsets, prompt.source), token_range(offsets, prompt.target))
    )
    tokens = np.concatenate([before, ids, [tokenizer.eos_id]], dtype=np.int32)
    if len(tokens) > cutoff and overlong == "drop":
        return "overlong"
    tokens = tokens[:cutoff]
    last = len(tokens) - 1
    labels = np.arange(len(tokens)) >= max(target[0] if loss_on == "response" else 1, 1)
    if not target[1] or target[0] > last:
        return "no response token" if min_target_tokens is None else "few target tokens"
    if min_target_tokens is None:
        return Example(tokens, (0, 0), (0, 0), labels)
    target = (target[0], min(target[1], last))
    if not target[0] <= last - min_target_tokens < target[1]:
        return "few target tokens"
    if not source[1]:
        return "no source token"
    return Example(tokens, source, target, labels)


def mark_chat(
    ids: np.ndarray, labels: np.ndarray, *, cutoff: int, overlong: Literal["drop", "truncate"]
) -> Example | Drop:
    """The example of an encoded chat, or why it is dropped; its template has written BOS and all else.

    Args:
      ids: [n] int32
      labels: [n] bool: tokens of the assistant.

    Raises:
      Bad: no token of the assistant before the cutoff.
    """
    if len(ids) > cutoff and overlong == "drop":
        return "overlong"
    if not labels[:cutoff].any():
        raise Bad(f"no token of the assistant among the first --data.cutoff={cutoff}; raise it or remove the line")
    return Example(ids[:cutoff], (0, 0), (0, 0), labels[:cutoff])


def set_apart(
    example: Example, source_ids: np.ndarray, target_ids: np.ndarray, tokenizer: Tokenizer, cutoff: int
) -> Example | Drop:
    """`example` followed by its two sentences, which its spans are now, with no labels.

    Each is its bare text, behind BOS where the tokenizer adds it.
    Dropped as overlong if all of it is longer than the cutoff.
    """
    bos = np.array(tokenizer.prefix, np.int32)
    source = len(example.tokens)
    target = source + len(bos) + len(source_ids)
    tokens = np.concatenate([example.tokens, bos, source_ids, bos, target_ids])
    if len(tokens) > cutoff:
        return "overlong"
    return dataclasses.replace(
        example,
        tokens=tokens,
        labels=np.concatenate([example.labels, np.zeros(len(tokens) - source, bool)]),
        source=(source + len(bos), target),
        target=(target + len(bos), len(tokens)),
        alone=(source, target),
    )
