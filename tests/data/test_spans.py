import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignx_jax.data import prompts, spans
from alignx_jax.data.tokenizer import Tokenizer
from tests.data.scripts import sentences

TEMPLATE = prompts.load("alpaca")
QUICK = settings(max_examples=50, deadline=None)


@pytest.mark.parametrize("loss_on", ["sequence", "response"])
@QUICK
@given(source=sentences(), target=sentences())
def test_every_span_decodes_to_its_sentence(any_tokenizer, loss_on, source, target):
    _, tokenizer = any_tokenizer
    prompt = TEMPLATE.render_translation(source, target, "th", "zh")
    (encoding,) = tokenizer.encode_batch([prompt.text])
    settings = {"cutoff": 4096, "overlong": "drop", "min_target_tokens": 1, "loss_on": loss_on}
    example = spans.mark(encoding, prompt, tokenizer, **settings)
    assert example.tokens.tolist() == [*tokenizer.prefix, *encoding[0], tokenizer.eos_id]
    assert tokenizer.decode(example.tokens[slice(*example.source)]).strip() == source
    assert tokenizer.decode(example.tokens[slice(*example.target)]).strip() == target
    assert example.target[1] == len(example.tokens) - 1
    learned = range(example.target[0] if loss_on == "response" else 1, len(example.tokens))
    assert np.flatnonzero(example.labels).tolist() == list(learned)
    assert example.source[1] <= example.target[0]


def _published(ids, offsets, prompt, bos, eos, cutoff, least):
    """The published rule, token by token: the sequence, `src_tgt_index`, and whether the example is kept."""
    tokens, marks = ([bos], [0]) if bos is not None else ([], [])
    for i, (start, end) in zip(ids, offsets, strict=True):
        covered = range(start, end)
        inside_source = any(prompt.source[0] <= c < prompt.source[1] for c in covered)
        inside_target = any(prompt.target[0] <= c < prompt.target[1] for c in covered)
        tokens.append(i)
        marks.append(2 if inside_target else 1 if inside_source else 0)
    cut = len(tokens) >= cutoff
    tokens, marks = tokens[:cutoff], marks[:cutoff]
    if not cut:
        tokens, marks = [*tokens, eos], [*marks, 0]
    marks[-1] = 0
    return tokens, marks, cut, len(marks) > least and marks[-1 - least] == 2


@settings(max_examples=400, deadline=None)
@given(data=st.data(), bos=st.sampled_from([None, 1]), overlong=st.sampled_from(["drop", "truncate"]))
def test_truncating_and_dropping_are_the_published_rule(data, bos, overlong):
    head, middle = data.draw(st.integers(0, 9)), data.draw(st.integers(1, 9))
    source, target = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 20))
    start = head + source + middle
    prompt = prompts.Prompt("x" * (start + target), (head, head + source), (start, start + target))
    edges = [0, head, head + source, start, start + target]  # tokens end at the sentences' ends, and anywhere else
    edges = sorted({*edges, *data.draw(st.lists(st.integers(1, start + target - 1)))})
    offsets = np.array(list(itertools.pairwise(edges)), np.int32)
    ids = np.arange(10, 10 + len(offsets), dtype=np.int32)
    cutoff, least = max(4, len(ids) + data.draw(st.integers(-12, 3))), data.draw(st.integers(1, 4))

    tokenizer = Tokenizer(bos, 2, None, 100, "", backend=None, prefix=() if bos is None else (bos,))
    settings = {"cutoff": cutoff, "overlong": overlong, "min_target_tokens": least, "loss_on": "sequence"}
    example = spans.mark((ids, offsets), prompt, tokenizer, **settings)
    tokens, marks, cut, kept = _published(ids.tolist(), offsets.tolist(), prompt, bos, 2, cutoff, least)
    if overlong == "drop" and cut:
        assert example == "overlong"
    elif not kept:
        assert example == "few target tokens"
    else:
        ours = np.zeros(len(tokens), int)
        ours[slice(*example.source)] = 1
        ours[slice(*example.target)] = 2
        assert example.tokens.tolist() == tokens
        assert ours.tolist() == marks


def test_instructions_need_one_token_of_the_response():
    tokenizer = Tokenizer(1, 2, None, 100, "", backend=None, prefix=(1,))
    prompt = prompts.Prompt("abcdef", (0, 0), (4, 6))
    encoding = np.arange(10, 16, dtype=np.int32), np.array([[i, i + 1] for i in range(6)], np.int32)
    always = {"min_target_tokens": None, "loss_on": "response"}
    whole = spans.mark(encoding, prompt, tokenizer, cutoff=8, overlong="drop", **always)
    assert whole.tokens.tolist() == [1, 10, 11, 12, 13, 14, 15, 2]
    assert (whole.source, whole.target, whole.labels.tolist()) == ((0, 0), (0, 0), [False] * 5 + [True] * 3)
    cut = spans.mark(encoding, prompt, tokenizer, cutoff=6, overlong="truncate", **always)
    assert cut.tokens.tolist() == [1, 10, 11, 12, 13, 14]
    for cutoff, overlong, reason in ((5, "truncate", "no response token"), (7, "drop", "overlong")):
        assert spans.mark(encoding, prompt, tokenizer, cutoff=cutoff, overlong=overlong, **always) == reason


def test_a_sentence_without_tokens_is_dropped():
    tokenizer = Tokenizer(1, 2, None, 100, "", backend=None)
    prompt = prompts.Prompt("abcdef", (0, 1), (2, 6))
    encoding = np.arange(10, 15, dtype=np.int32), np.array([[i, i + 1] for i in range(1, 6)], np.int32)
    settings = {"cutoff": 9, "overlong": "drop", "min_target_tokens": 3, "loss_on": "sequence"}
    assert spans.mark(encoding, prompt, tokenizer, **settings) == "no source token"
