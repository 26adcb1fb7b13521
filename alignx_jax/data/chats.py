"""Chats as tokens, with those marked that the assistant writes, by the tokenizer's own chat template."""

from __future__ import annotations

import re
from collections.abc import Sequence

import jinja2
import numpy as np

from alignx_jax.data.fields import Bad
from alignx_jax.data.tokenizer import Tokenizer
from alignx_jax.exits import UserError

Messages = Sequence[dict[str, str]]
"""Of each turn role and content."""

_MARKERS = re.compile(r"{%[-+]?\s*generation\s*[-+]?%}")
_PROBE = "\ue000\ue001"  # stands for an answer; no text has these characters of private use
_REMEDY = "mark the assistant's turns in the template with {% generation %}, or remove the line"


def encode(messages: Messages, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of a chat, [n] int32, and which of them the assistant writes, [n] bool.

    Where the template has `{% generation %}` markers, these say which. Else it is what follows the generation prompt,
    as far as the token that ends the turn: what the model has to write where it is asked to. No token is added to those
    of the template. The first is never the assistant's, as nothing comes before it.

    Raises:
      Bad: the template refuses the chat, or does not show which tokens are the assistant's; there is none.
      UserError: the template is no Jinja.
    """
    if _MARKERS.search(tokenizer.chat_template):
        made = _apply(messages, tokenizer, return_dict=True, return_assistant_tokens_mask=True)
        ids, mask = np.array(made["input_ids"], np.int32), np.array(made["assistant_masks"], bool)
    else:
        text = _apply(messages, tokenizer, tokenize=False)
        turns = [_turn(text, messages, n, tokenizer) for n, one in enumerate(messages) if one["role"] == "assistant"]
        ((ids, offsets),) = tokenizer.encode_batch([text])
        mask = np.zeros(len(ids), bool)
        for start, end in turns:
            mask |= (offsets[:, 0] < end) & (offsets[:, 1] > start)
    mask[:1] = False
    if not mask.any():
        raise Bad(f"the chat template writes no token of the assistant's; {_REMEDY}")
    return ids, mask


def _apply(messages: Messages, tokenizer: Tokenizer, **options):
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"the model's chat template is no Jinja ({error}); copy it again") from None
    except Exception as error:  # whatever a template may do to a chat that it was not written for
        reason = str(error).strip().split("\n")[0]
        raise Bad(f"the chat template refuses the chat ({reason}); mend the line or remove it") from None


def _turn(text: str, messages: Messages, place: int, tokenizer: Tokenizer) -> tuple[int, int]:
    """The characters [start, end) of `text`, the whole chat, that the assistant writes in its turn at `place`.

    The turn begins where the chat before it with the generation prompt ends. What the template writes behind an answer,
    up to the first special token, ends it; white space behind that is not the model's. In between stands the answer,
    white space aside: all of it, or its last part where the template drops the beginning, as Qwen 3's drops the
    thinking of earlier turns.
    """
    before = _apply(messages[:place], tokenizer, tokenize=False, add_generation_prompt=True)
    probe = [*messages[:place], {"role": "assistant", "content": _PROBE}]
    front, _, behind = _apply(probe, tokenizer, tokenize=False).rpartition(_PROBE)
    special = re.search("|".join(map(re.escape, tokenizer.special)) or "(?!)", behind)
    close = behind[: special.end()] if special else behind
    if not (text.startswith(before) and front.startswith(before) and close):
        raise Bad(f"the chat template does not show where turn {place} begins and ends; {_REMEDY}")
    start = len(before)
    first = len(front) if text.startswith(front) else start
    answer = _squeezed(messages[place]["content"])
    for fits in (str.__eq__, str.endswith):
        for end in re.compile(re.escape(close)).finditer(text, first):
            part = _squeezed(text[first : end.start()])
            if part and fits(answer, part):
                return start, end.end()
    raise Bad(f"the chat template writes turn {place} otherwise than it stands in the line; {_REMEDY}")


def _squeezed(text: str) -> str:
    return "".join(text.split())
