from collections import Counter

import hypothesis
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignx_jax.data import packing

LENGTHS = st.lists(st.integers(1, 32), max_size=150)


@given(LENGTHS, st.integers(32, 40), st.integers(1, 8), st.integers(0, 3))
def test_a_plan_loses_nothing_and_fits(lengths, row_length, slots, seed):
    lengths = np.array(lengths, np.int32)
    order = np.random.default_rng(seed).integers(0, max(len(lengths), 1), size=len(lengths))  # with repetitions
    rows = packing.plan(lengths, row_length, slots, order, [seed])
    assert Counter(rows.examples.tolist()) == Counter(order.tolist())
    taken = [rows[i] for i in range(len(rows))]
    assert np.array_equal(np.concatenate([*taken, np.zeros(0, int)]), rows.examples)
    for row in taken:
        assert 1 <= len(row) <= slots
        assert lengths[row].sum() <= row_length


@given(LENGTHS, st.integers(1, 8))
@hypothesis.example([1, 1, 7, 7, 12, 26], 4)
def test_a_plan_is_best_fit_decreasing(lengths, slots):
    """Against the textbook: longest first, into the fullest row that still has room for it; of equally full ones into
    the one that was filled last, which matters where slots are few."""
    rows = []  # in the order in which they were filled
    for length in sorted(lengths, reverse=True):
        fitting = [row for row in reversed(rows) if sum(row) + length <= 32 and len(row) < slots]
        row = max(fitting, key=sum) if fitting else []
        rows = [other for other in rows if other is not row] + [[*row, length]]
    plan = packing.plan(np.array(lengths, np.int32), 32, slots, np.arange(len(lengths)))
    assert sorted(int(np.array(lengths)[plan[i]].sum()) for i in range(len(plan))) == sorted(map(sum, rows))


def test_an_example_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="example 1 has 33 tokens, a row 32"):
        packing.plan(np.array([4, 33]), 32, 4, np.arange(2))


def test_windows_keep_the_order_of_the_data():
    order = np.random.default_rng(0).permutation(3 * packing.WINDOW)
    rows = packing.plan(np.full(3 * packing.WINDOW, 100, np.int32), 400, 4, order, [0])
    for window in range(3):
        here = slice(window * packing.WINDOW, (window + 1) * packing.WINDOW)
        assert set(rows.examples[here]) == set(order[here])
    assert rows.examples.tolist() != order.tolist()


def test_a_seed_shuffles_whole_rows():
    lengths = np.random.default_rng(0).integers(1, 33, size=500)
    plain, shuffled, other = (packing.plan(lengths, 64, 8, np.arange(500), seed) for seed in (None, [0], [1]))
    rows = [[plan[i].tolist() for i in range(len(plan))] for plan in (plain, shuffled, other)]
    assert sorted(rows[0]) == sorted(rows[1]) == sorted(rows[2])
    assert rows[0] != rows[1] != rows[2]


def test_rows_are_full():
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(4.8, 0.5, 60_000), 40, 512).astype(np.int32)  # like translation pairs in a prompt
    rows = packing.plan(lengths, 512, 16, rng.permutation(len(lengths)), [0])
    assert lengths.sum() / (len(rows) * 512) > 0.95


def test_an_epoch_takes_every_source_as_often_as_its_weight_says():
    sizes, weights = [10, 7, 5, 0], [1.0, 2.0, 0.6, 3.0]
    epochs = [packing.order(epoch, 5, sizes, weights) for epoch in range(2)]
    for order in epochs:
        counts = np.bincount(order, minlength=22)
        assert counts[:10].tolist() == [1] * 10
        assert counts[10:17].tolist() == [2] * 7
        assert sorted(counts[17:].tolist()) == [0, 0, 1, 1, 1]
    assert epochs[0].tolist() != epochs[1].tolist()
    assert packing.order(1, 5, sizes, weights).tolist() == epochs[1].tolist()
    assert packing.order(1, 6, sizes, weights).tolist() != epochs[1].tolist()
    subsets = {frozenset(o[o >= 17].tolist()) for o in (packing.order(e, 5, sizes, weights) for e in range(20))}
    assert len(subsets) > 3  # a fraction is another subset each epoch


@st.composite
def _example(draw):
    length = draw(st.integers(4, 12))
    edges = sorted(draw(st.lists(st.integers(0, length - 1), min_size=4, max_size=4)))
    alone = sorted(draw(st.lists(st.integers(1, length - 1), min_size=2, max_size=2)))
    return packing.PackedExample(
        tokens=np.array(draw(st.lists(st.integers(0, 99), min_size=length, max_size=length)), np.int32),
        labels=np.array(draw(st.lists(st.booleans(), min_size=length, max_size=length))),
        source=(edges[0], edges[1]),
        target=(edges[2], edges[3]),
        languages=(draw(st.integers(0, 5)), draw(st.integers(0, 5))),
        hashes=(draw(st.integers(-9, 9)), draw(st.integers(-9, 9)), draw(st.integers(-9, 9))),
        alone=draw(st.sampled_from([None, tuple(alone)])),
    )


@settings(max_examples=100, deadline=None)
@given(st.lists(_example(), max_size=5))
def test_a_row_holds_its_examples_and_nothing_else(examples):
    row = packing.assemble(examples, 64, 6)
    place = 0
    for slot, example in enumerate(examples, 1):
        starts = (0, *(example.alone or ()))
        for position, token in enumerate(example.tokens):
            piece = max(n for n, start in enumerate(starts) if start <= position)
            assert row.tokens[place] == token
            assert row.positions[place] == position - starts[piece]
            assert row.segments[place] == slot + 6 * piece
            assert row.loss_weights[place] == (example.labels[position] and position not in starts)
            assert row.source_span[place] == (slot if example.source[0] <= position < example.source[1] else 0)
            assert row.target_span[place] == (slot if example.target[0] <= position < example.target[1] else 0)
            place += 1
        assert (row.source_language[slot - 1], row.target_language[slot - 1]) == example.languages
        assert tuple(x[slot - 1] for x in (row.source_hash, row.target_hash, row.line_hash)) == example.hashes
        both = example.source[0] < example.source[1] and example.target[0] < example.target[1]
        assert row.valid[slot - 1] == both
    for name in ("tokens", "positions", "segments", "loss_weights", "source_span", "target_span"):
        array = getattr(row, name)
        assert array.shape == (64,)
        assert array.dtype == (np.float32 if name == "loss_weights" else np.int32)
        assert not array[place:].any()
    for name in ("source_language", "target_language", "source_hash", "target_hash", "line_hash", "valid"):
        array = getattr(row, name)
        assert array.shape == (6,)
        assert array.dtype == (bool if name == "valid" else np.int32)
        assert not array[len(examples) :].any()
