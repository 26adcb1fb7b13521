import dataclasses
import gzip
import hashlib
import itertools
import json
import os
import pathlib
import subprocess
import sys
from collections import Counter

import jax
import numpy as np
import pytest

from alignx_jax.config import Config, DataConfig, ObjectiveConfig, TrainingConfig
from alignx_jax.config import LanguageMatchingConfig as Matching
from alignx_jax.config_files import to_json
from alignx_jax.data import examples, pipeline, readers, sources, tokenizer
from alignx_jax.data.fields import text_hash
from alignx_jax.exits import UserError
from alignx_jax.objectives.contrastive import contrastive
from tests.data.scripts import SENTENCES

LANGUAGES = [code for code in SENTENCES if code != "en"]


def _pair(number):
    language = LANGUAGES[number % len(LANGUAGES)]
    words = SENTENCES[language] if number % 3 else SENTENCES[language][:12]
    return language, f"{words} {number}", f"{SENTENCES['en'][: 8 + number % 30].strip()} {number}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """Two parallel sources of 150 and 90 pairs, 10 of them the same, and 60 instructions."""
    folder = tmp_path_factory.mktemp("data")
    for name, numbers in (("a", range(150)), ("b", range(140, 230))):
        lines = ["\t".join((language, "en", s, t)) for language, s, t in map(_pair, numbers)]
        (folder / f"{name}.tsv").write_text("\n".join(lines), encoding="utf-8")
    items = [{"instruction": f"Say {i}", "input": "x" * (i % 2), "output": "fox " * (1 + i % 9)} for i in range(60)]
    (folder / "i.json").write_text(json.dumps(items))
    return folder


def _config(folder, *, rows=4, epochs=2.0, steps=None, weight=0.4, **data):
    defaults = {
        "parallel": (str(folder / "a.tsv"), str(folder / "b.tsv")),
        "instructions": (str(folder / "i.json"),),
        "cache": str(folder / "cache"),
        "cutoff": 500,
        "row_length": 1000,
        "examples_per_row": 6,
        "validation": 20,
        "spans": "in-prompt",
    }
    return Config(
        data=DataConfig(**(defaults | data)),
        training=TrainingConfig(rows=rows, epochs=epochs, steps=steps),
        objective=ObjectiveConfig(language_matching=Matching(weight=weight)),
    )


def _pairs(batches):
    """Every valid slot's (source hash, target hash)."""
    return Counter(
        (int(source), int(target))
        for batch in batches
        for source, target in zip(batch.source_hash[batch.valid], batch.target_hash[batch.valid], strict=True)
    )


def _same(left, right):
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True))


def test_every_pair_is_seen_in_both_directions_every_epoch(folder, tiny_tokenizer):
    data = pipeline.build(_config(folder), "1", tiny_tokenizer)
    everything = Counter()
    for numbers in (range(150), range(140, 230)):
        for _, source, target in map(_pair, numbers):
            everything[text_hash(source), text_hash(target)] += 1
            everything[text_hash(target), text_hash(source)] += 1
    train, validation = _pairs(data.train.batches()), _pairs(data.validation.batches())
    assert data.dropped.keys() == {"duplicate of a validation record"} or not data.dropped
    assert set(train) | set(validation) == set(everything)
    assert set(train).isdisjoint(validation)
    assert {(b, a) for a, b in train} == set(train)
    assert train == Counter({pair: 2 * everything[pair] for pair in train})
    assert set(validation.values()) == {1}
    assert len(validation) == data.validation.num_examples == 40
    assert sum(train.values()) == 2 * data.train.num_examples
    assert data.train.num_examples + 40 + sum(data.dropped.values()) == 2 * 240


def test_a_temperature_balances_the_pairs_of_training_alone(folder, tiny_tokenizer):
    data, flat = (pipeline.build(_config(folder, temperature=t), "1", tiny_tokenizer) for t in (1.0, 1e6))
    count = Counter()
    for batch in flat.train.batches():
        for pair in zip(batch.source_language[batch.valid], batch.target_language[batch.valid], strict=True):
            count[tuple(sorted(map(int, pair)))] += 1
    assert len(count) == len(LANGUAGES) and max(count.values()) - min(count.values()) <= 2 * 2  # sources x epochs
    assert sum(count.values()) == pytest.approx(2 * data.train.num_examples, abs=2 * len(LANGUAGES))
    assert _pairs(flat.validation.batches()) == _pairs(data.validation.batches())


def test_a_held_out_pair_is_not_trained_on_the_other_way_round(tmp_path, tiny_tokenizer):
    pairs = [_pair(number) for number in range(60)]
    (tmp_path / "a.tsv").write_text("".join(f"{code}\ten\t{s}\t{t}\n" for code, s, t in pairs), encoding="utf-8")
    (tmp_path / "b.tsv").write_text("".join(f"en\t{code}\t{t}\t{s}\n" for code, s, t in pairs), encoding="utf-8")
    data = pipeline.build(_config(tmp_path), "1", tiny_tokenizer)
    train, validation = _pairs(data.train.batches()), _pairs(data.validation.batches())
    assert set(train).isdisjoint(validation)
    assert len(train) + len(validation) == 2 * 60
    assert data.dropped == {"duplicate of a validation record": data.validation.num_examples}


def test_batches_hold_what_batch_promises(folder, tiny_tokenizer):
    config = _config(folder)
    data = pipeline.build(config, "1", tiny_tokenizer)
    batches = list(data.train.batches())
    assert len(batches) == data.train.steps
    assert data.train.steps == -(-data.train.rows // 4)
    tokens = 0
    for batch in batches:
        assert batch.tokens.shape == batch.segments.shape == batch.source_span.shape == (4, 1000)
        assert batch.valid.shape == batch.source_hash.shape == (4, 6)
        used = batch.segments > 0
        tokens += used.sum()
        assert np.array_equal(batch.loss_weights, used & (batch.positions > 0))
        assert (batch.tokens[used & (batch.positions == 0)] == tiny_tokenizer.bos_id).all()
        for row in range(4):
            for slot in np.flatnonzero(batch.valid[row]) + 1:
                for name in ("source", "target"):
                    span = tiny_tokenizer.decode(batch.tokens[row][getattr(batch, f"{name}_span")[row] == slot])
                    assert text_hash(span.strip()) == getattr(batch, f"{name}_hash")[row, slot - 1]
                    code = data.languages[getattr(batch, f"{name}_language")[row, slot - 1]]
                    stem = span.strip().rpartition(" ")[0]
                    assert SENTENCES[code].startswith(stem)
    assert data.languages == tuple(sorted(SENTENCES))
    assert data.train.fill == pytest.approx(tokens / (data.train.rows * 1000), abs=0.03)
    empty = data.train.steps * 4 - data.train.rows
    assert empty == sum(not row.any() for row in batches[-1].segments)


def test_sentences_apart_stand_in_segments_of_their_own(folder, tiny_tokenizer):
    config = _config(folder, rows=2, epochs=1, spans="separate")
    data = pipeline.build(config, "1", tiny_tokenizer)
    inside = pipeline.build(_config(folder, rows=2, epochs=1), "1", tiny_tokenizer)
    assert data.train.num_examples + sum(data.dropped.values()) == inside.train.num_examples + sum(
        inside.dropped.values()
    )
    seen = 0
    for batch in data.train.batches():
        for row, slot in zip(*np.nonzero(batch.valid), strict=True):
            seen += 1
            for number, name in ((1, "source"), (2, "target")):
                where = np.flatnonzero(batch.segments[row] == slot + 1 + 6 * number)
                ids = [tiny_tokenizer.bos_id, *batch.tokens[row][where[1:]]]
                assert batch.tokens[row][where].tolist() == ids
                assert text_hash(tiny_tokenizer.decode(ids[1:])) == getattr(batch, f"{name}_hash")[row, slot]
                assert batch.positions[row][where].tolist() == list(range(len(where)))
                assert not batch.loss_weights[row][where].any()
                span = np.flatnonzero(getattr(batch, f"{name}_span")[row] == slot + 1)
                assert span.tolist() == where[1:].tolist()
    assert seen == data.train.num_examples
    stage_2 = pipeline.build(config, "2", tiny_tokenizer)
    assert all((batch.segments <= 6).all() for batch in stage_2.train.batches())


@pytest.mark.parametrize("start", [1, 7, 1000])
def test_resuming_is_starting_at_a_step(folder, tiny_tokenizer, start):
    train = pipeline.build(_config(folder), "1", tiny_tokenizer).train
    whole = list(train.batches())
    tail = list(train.batches(start))
    assert len(tail) == max(len(whole) - start, 0)
    assert all(map(_same, whole[start:], tail))


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_global_batch(folder, tiny_tokenizer, processes):
    train = pipeline.build(_config(folder), "1", tiny_tokenizer).train
    own = np.split(np.random.default_rng(0).permutation(4), processes)  # a mesh may give a process any rows
    shards = [train.batches(2, rows) for rows in own]
    for batch, *parts in zip(train.batches(2), *shards, strict=True):
        joined = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
        assert _same(jax.tree.map(lambda x: x[np.concatenate(own)], batch), joined)


def test_epochs_differ_and_follow_without_a_gap(folder, tiny_tokenizer):
    one, two, half, three = (
        pipeline.build(_config(folder, epochs=epochs), "1", tiny_tokenizer).train for epochs in (1.0, 2.0, 0.5, 2.5)
    )
    assert half.rows == -(-one.rows // 2)
    assert two.rows < three.rows < two.rows + one.rows
    assert one.rows % 4, "the point is a batch that straddles epochs"
    rows = [row for batch in two.batches() for row in batch.tokens if row.any()]
    first = [row for batch in one.batches() for row in batch.tokens if row.any()]
    assert np.array_equal(rows[: one.rows], first)
    assert len(rows) == two.rows
    assert {row.tobytes() for row in rows[one.rows :]} != {row.tobytes() for row in first}
    longest = [np.bincount(row)[1:].max() for batch in one.batches() for row in batch.segments if row.any()]
    assert longest != sorted(longest, reverse=True), "rows are to be shuffled, not in the order they were packed"


def test_steps_cap_and_extend(folder, tiny_tokenizer):
    two = pipeline.build(_config(folder), "1", tiny_tokenizer).train
    for steps in (3, two.steps + 20):
        train = pipeline.build(_config(folder, steps=steps), "1", tiny_tokenizer).train
        batches = list(train.batches())
        assert len(batches) == train.steps == steps
        assert all(batch.segments.any(axis=1).all() for batch in batches)
        common = min(steps, two.steps - 1)  # the last batch of the shorter run has empty rows
        assert all(map(_same, batches[:common], itertools.islice(two.batches(), common)))


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_most_examples_in_neighbouring_rows(folder, tiny_tokenizer, rows):
    train = pipeline.build(_config(folder, epochs=1.5), "1", tiny_tokenizer).train
    counts = [batch.valid.reshape(4 // rows, -1).sum(axis=1).max() for batch in train.batches()]
    assert train.most_examples(rows) == max(counts)


def test_origins_of_a_batch(folder, tiny_tokenizer):
    data = pipeline.build(_config(folder), "1", tiny_tokenizer)
    lines = {
        f"{folder / name}.tsv:{line}": _pair(number)[1:]
        for name, numbers in (("a", range(150)), ("b", range(140, 230)))
        for line, number in enumerate(numbers, 1)
    }
    for step, batch in enumerate(data.train.batches()):
        origins = data.train.example_ids(step)
        hashes = zip(batch.source_hash[batch.valid], batch.target_hash[batch.valid], strict=True)
        for origin, (source, target) in zip(origins, hashes, strict=True):
            assert {text_hash(text) for text in lines[origin]} == {source, target}


def test_weights_repeat_and_thin_sources(folder, tiny_tokenizer):
    config = _config(folder, epochs=1.0, validation=0, parallel_weights=(0.5, 3.0))
    data = pipeline.build(config, "1", tiny_tokenizer)
    origins = Counter(origin for step in range(data.train.steps) for origin in data.train.example_ids(step))
    by_source = {name: [n for o, n in origins.items() if f"/{name}.tsv" in o] for name in "ab"}
    assert sum(by_source["a"]) == 150  # of 300 examples
    assert by_source["b"] == [6] * 90  # three times in both directions
    assert data.validation.steps == data.validation.num_examples == 0
    assert list(data.validation.batches()) == []


@pytest.mark.parametrize(("directions", "pair"), [("forward", (0, 1)), ("backward", (1, 0))])
def test_directions(folder, tiny_tokenizer, directions, pair):
    data = pipeline.build(_config(folder, epochs=1.0, directions=directions, validation=0), "1", tiny_tokenizer)
    numbers = [*range(150), *range(140, 230)]
    texts = [tuple(map(text_hash, _pair(number)[1:])) for number in numbers]
    assert _pairs(data.train.batches()) == Counter((text[pair[0]], text[pair[1]]) for text in texts)


def test_a_limit_spreads_over_each_source(folder, tiny_tokenizer):
    config = _config(folder, epochs=1.0, directions="forward", validation=0, limit=30)
    data = pipeline.build(config, "1", tiny_tokenizer)
    numbers = [*range(0, 150, 5), *range(140, 230, 3)]
    assert _pairs(data.train.batches()) == Counter(tuple(map(text_hash, _pair(n)[1:])) for n in numbers)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_stage_two_mixes_by_share_and_has_no_spans(folder, tiny_tokenizer, share):
    config = _config(folder, epochs=1.0, validation=6, translation_share=share, loss_on="response")
    data = pipeline.build(config, "2", tiny_tokenizer)
    for split in (data.train, data.validation):
        origins = [origin for step in range(split.steps) for origin in split.example_ids(step)]
        instructions = sum("i.json: element" in origin for origin in origins)
        assert instructions / len(origins) == pytest.approx(1 - share, abs=0.02 if split is data.train else 0.1)
        if share < 1:  # every instruction, once
            assert instructions == len(set(origin for origin in origins if "i.json" in origin))
            assert instructions == (54 if split is data.train else 6)
    for batch in data.train.batches():
        assert not batch.valid.any()
        assert not batch.source_span.any()
        assert not batch.target_span.any()
        for row, segments in enumerate(batch.segments):
            for slot in range(1, segments.max(initial=0) + 1):
                text = tiny_tokenizer.decode(batch.tokens[row][segments == slot])
                labels = (segments == slot) & (batch.loss_weights[row] > 0)
                response = batch.tokens[row][labels]
                assert tiny_tokenizer.decode(response).strip() == text.partition("### Response:\n")[2].strip()
                assert response[-1] == tiny_tokenizer.eos_id


def test_held_out_records_are_the_same_whatever_else_there_is():
    rng = np.random.default_rng(0)

    def index(hashes):
        table = np.zeros(2 * len(hashes), examples.INDEX)
        table["record"], table["record_hash"] = np.repeat(np.arange(len(hashes)), 2), np.repeat(hashes, 2)
        return table

    hashes = rng.integers(0, 2**63, 1000, dtype=np.uint64)
    hashes[700:720] = hashes[:20]  # pairs that are in both sources
    hashes[100:110] = np.sort(hashes[:600])[:10]  # and pairs that are twice in one, which will be held out
    left, right = hashes[:600], np.concatenate([hashes[600:], hashes[30:60]])
    training, validation, duplicates = examples.hold_out([index(left), index(right)], 100)
    for chosen in (training, validation):
        for table, places in zip((index(left), index(right)), chosen, strict=True):
            counts = np.unique_counts(table["record"][places]).counts
            assert (counts == 2).all()  # both directions, always
    held = np.concatenate([index(h)["record_hash"][p] for h, p in zip((left, right), validation, strict=True)])
    kept = np.concatenate([index(h)["record_hash"][p] for h, p in zip((left, right), training, strict=True)])
    assert not np.intersect1d(held, kept).size
    assert (np.unique_counts(held).counts == 2).all()  # each text once
    assert 90 <= len(held) / 2 <= 100
    assert len(validation[0]) / 2 == pytest.approx(60, abs=3)  # in proportion to the sources
    assert len(held) + len(kept) + duplicates == 2 * (len(left) + len(right))
    more, _, _ = examples.hold_out([index(hashes[::-1])], 5)
    assert len(more[0]) > 0
    assert len(examples.hold_out([index(hashes[:50])], 2000)[1][0]) == 2 * 5  # a tenth at most


def test_drops_are_counted_by_reason(folder, tiny_tokenizer):
    whole = pipeline.build(_config(folder, validation=0), "1", tiny_tokenizer)
    lengths = [int((row == slot).sum()) for b in whole.train.batches() for row in b.segments for slot in set(row) - {0}]
    cutoff = int(np.median(lengths))
    dropped = pipeline.build(_config(folder, validation=0, cutoff=cutoff), "1", tiny_tokenizer)
    assert dropped.dropped == {"overlong": sum(n > cutoff for n in lengths) // 2}  # two epochs
    assert dropped.train.num_examples == 480 - dropped.dropped["overlong"]
    with pytest.raises(UserError, match=r"a\.tsv: every example was dropped \(overlong: 300\)"):
        pipeline.build(_config(folder, cutoff=20), "1", tiny_tokenizer)


def test_examples_are_encoded_once(folder, tiny_tokenizer, tmp_path):
    calls = []
    config = _config(folder, cache=str(tmp_path))
    pipeline.build(config, "1", tiny_tokenizer, lambda *state: calls.append(state))
    assert calls == [(str(folder / "a.tsv"), 150, 150), (str(folder / "b.tsv"), 90, 90)]
    pipeline.build(config, "1", tiny_tokenizer, lambda *state: calls.append(state))
    assert len(calls) == 2
    other = _config(folder, cache=str(tmp_path), min_target_tokens=4)
    pipeline.build(other, "1", tiny_tokenizer, lambda *state: calls.append(state))
    assert len(calls) == 4


def test_interrupted_encoding_starts_again(folder, tiny_tokenizer, tmp_path):
    def stop(*state):
        raise KeyboardInterrupt

    config = _config(folder, cache=str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        pipeline.build(config, "1", tiny_tokenizer, stop)
    data = pipeline.build(config, "1", tiny_tokenizer)
    assert _same(next(data.train.batches()), next(pipeline.build(_config(folder), "1", tiny_tokenizer).train.batches()))


_DIGEST = """
import hashlib, sys, jax
from alignx_jax import config_files
from alignx_jax.data import pipeline, tokenizer
settings = config_files.from_json(sys.argv[1], "test")
train = pipeline.build(settings, "1", tokenizer.load(sys.argv[2])).train
digest = hashlib.sha256()
for batch in train.batches():
    for leaf in jax.tree.leaves(batch):
        digest.update(leaf.tobytes())
print(digest.hexdigest())
"""


def test_another_process_plans_the_same(folder, tiny, tiny_tokenizer, tmp_path):
    settings = _config(folder, cache=str(tmp_path))
    run = subprocess.run(
        [sys.executable, "-c", _DIGEST, to_json(settings), str(tiny / "bytes")],
        env=os.environ | {"PYTHONHASHSEED": "7", "JAX_PLATFORMS": "cpu"},
        cwd=pathlib.Path(pipeline.__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    digest = hashlib.sha256()
    for batch in pipeline.build(_config(folder), "1", tiny_tokenizer).train.batches():
        for leaf in jax.tree.leaves(batch):
            digest.update(leaf.tobytes())
    assert run.stdout.split()[-1] == digest.hexdigest()


def test_seeds_give_other_orders_but_one_validation(folder, tiny_tokenizer):
    config = _config(folder)
    one, other = (pipeline.build(dataclasses.replace(config, seed=s), "1", tiny_tokenizer) for s in (0, 1))
    assert not _same(next(one.train.batches()), next(other.train.batches()))
    assert all(map(_same, one.validation.batches(), other.validation.batches()))


def test_one_language_is_nothing_to_match(tmp_path, tiny_tokenizer):
    (tmp_path / "a.tsv").write_text("".join(f"en\ten\tThe quick fox {i}\tThe lazy dog {i}\n" for i in range(20)))
    config = _config(tmp_path, parallel=(str(tmp_path / "a.tsv"),), parallel_weights=())
    with pytest.raises(UserError, match=r"one language \(en\)"):
        pipeline.build(config, "1", tiny_tokenizer)
    config = _config(tmp_path, parallel=(str(tmp_path / "a.tsv"),), weight=0.0)
    assert pipeline.build(config, "1", tiny_tokenizer).languages == ("en",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel_weights": (1.0,)}, "--data.parallel-weights: 1 weights for 2 sources"),
        ({"parallel": ()}, "--data.parallel: no source"),
        ({"row_length": 400}, "--data.row-length=400: a row has to hold an example of --data.cutoff=500"),
    ],
)
def test_settings_that_cannot_work(folder, tiny_tokenizer, changes, message):
    with pytest.raises(UserError) as error:
        pipeline.build(_config(folder, **changes), "1", tiny_tokenizer)
    assert message in str(error.value)


def test_multiway_sentences(tmp_path):
    lines = [
        {"en": "one", "de": "eins", "fr": "un"},
        {"en": "two", "fr": "deux"},
        {"eng": "three", "de": "drei", "fr": "trois"},
    ]
    path = tmp_path / "ways.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(json.dumps({"text": line}) for line in lines).encode()))
    assert pipeline.multiway(str(path)) == {"de": ["eins", "drei"], "en": ["one", "three"], "fr": ["un", "trois"]}
    assert list(pipeline.multiway(str(path), ["fr"], besides=("en", "de", "fr"))) == ["fr", "en"]  # de costs a line
    said = []
    pipeline.multiway(str(path), tell=said.append)
    assert said == [
        f"1 of the 3 lines of {path} lack a language and are left out (most often de, in 1); "
        "--evaluation.languages with the others alone keeps more."
    ]
    pipeline.multiway(str(path), ["fra", "en"], tell=said.append)  # which all lines have
    assert len(said) == 1
    assert pipeline.multiway(str(path), ["fra", "en"]) == {"fr": ["un", "deux", "trois"], "en": ["one", "two", "three"]}
    with pytest.raises(UserError, match=r"no line has all of the languages \(en 3, sw 0\)"):
        pipeline.multiway(str(path), ["en", "sw"])
    with pytest.raises(UserError, match="gone: no such file"):
        pipeline.multiway(str(tmp_path / "gone"))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"empty\.jsonl: empty"):
        pipeline.multiway(str(tmp_path / "empty.jsonl"))
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": {"en": "a"}}\n{"text": {"en": 1}}\n')
    with pytest.raises(UserError, match=r"bad\.jsonl:2: field 'text\.en' has to be a text"):
        pipeline.multiway(str(bad))


def test_a_folder_of_a_text_file_for_each_language(tmp_path):
    (tmp_path / "eng_Latn.devtest").write_text("one\ntwo\n")
    (tmp_path / "newstest2019-ref.deu.txt").write_text("eins\nzwei")
    (tmp_path / "README.md").write_text("nothing of ours\n")
    assert pipeline.multiway(str(tmp_path)) == {"de": ["eins", "zwei"], "en": ["one", "two"]}
    (tmp_path / "zh_Hans.devtest").write_text("一\n \n")
    with pytest.raises(UserError, match=r"zh_Hans\.devtest:2: field 'zh' is empty"):
        pipeline.multiway(str(tmp_path))
    (tmp_path / "zh_Hans.devtest").write_text("一\n")
    with pytest.raises(UserError, match=r"line by line.*eng_Latn\.devtest 2.*zh_Hans\.devtest 1"):
        pipeline.multiway(str(tmp_path))
    (tmp_path / "en.txt").write_text("one\ntwo\n")
    with pytest.raises(UserError, match=r"en\.txt and .*eng_Latn\.devtest are both en"):
        pipeline.multiway(str(tmp_path))


LINES = [
    {"en": "The dog sleeps.", "de": "Der Hund schläft.", "fr": "Le chien dort.", "es": "El perro duerme."},
    {"en": "It is raining.", "de": "Es regnet.", "fr": "Il pleut.", "es": "Está lloviendo."},
    {"de": "Sie liest.", "fr": "Elle lit.", "es": "Ella lee."},
]
ALSO = [("Koira nukkuu.", "the  DOG sleeps."), ("Sataa.", "\uff29t is raining."), ("Se loppui.", "It stopped.")]
SAYS = {text: n for n, line in enumerate(LINES) for text in line.values()}
SAYS |= {text: (0, 1, 3)[n] for n, (text, _) in enumerate(ALSO)}


@pytest.fixture
def said(tmp_path, tiny_tokenizer):
    """A step with all pairs of three multi-way lines and three pairs of another source; and what each pair says."""
    (tmp_path / "ways.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES))
    (tmp_path / "fi-en.tsv").write_text("".join(f"{fi}\t{en}\n" for fi, en in ALSO), encoding="utf-8")
    sources = tuple(str(tmp_path / name) for name in ("ways.jsonl", "fi-en.tsv"))
    config = _config(tmp_path, parallel=sources, pairs="all", validation=0, rows=64, epochs=1, examples_per_row=16)
    data = pipeline.build(config, "1", tiny_tokenizer)
    (batch,) = data.train.batches()
    meanings = [SAYS[record["source"]] for record in data.train.records(0)]
    return batch, np.array(meanings)


def test_two_pairs_share_an_id_where_their_lines_say_the_same(said):
    """Also across directions and sources, and whatever the case, width and spaces of a sentence."""
    batch, meanings = said
    arrays = (batch.source_hash, batch.target_hash, batch.line_hash)
    ids = [set(ids) for ids in zip(*(x[batch.valid].tolist() for x in arrays), strict=True)]
    shares = np.array([[bool(a & b) for b in ids] for a in ids])
    assert len(ids) == 2 * (6 + 6 + 3 + 3)
    np.testing.assert_array_equal(shares, meanings[:, None] == meanings[None, :])


def test_a_perfect_encoder_of_multiway_text_has_no_loss(said):
    """-1/2 log(1 / (1 + n / e^10)) with the n targets that say something else; their own line's are no negatives."""
    batch, meanings = said
    states = jax.numpy.eye(4)[meanings][None]
    ids = [jax.numpy.asarray(x[batch.valid][None]) for x in (batch.source_hash, batch.target_hash, batch.line_hash)]
    valid = np.ones((1, len(meanings)), bool)
    loss = contrastive(
        states, states, valid, *ids, temperature=0.1, form="published", scope="global", duplicates="mask"
    )
    others = np.array([(meanings != one).sum() for one in meanings])
    assert float(loss) / len(meanings) == pytest.approx(np.log1p(others * np.exp(-10)).mean() / 2, rel=1e-3)
    assert float(loss) / len(meanings) < 0.001


@pytest.mark.parametrize("kind", ["llama2", "deepseek_r1"])
def test_real_corpora(shared, tmp_path, kind):
    """A slice of every real pair goes through whole: nothing but long or short examples is left out."""
    for path in sorted((shared / "data" / "train_parallel" / "pairs").glob("*.train.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            lines = "".join(itertools.islice(file, 60))
        (tmp_path / path.name.removesuffix(".gz")).write_text(lines, encoding="utf-8")
    loaded = tokenizer.load(shared / "data" / "tokenizers" / kind)
    config = _config(tmp_path, parallel=(str(tmp_path),), cutoff=512, row_length=512, examples_per_row=16)
    data = pipeline.build(config, "1", loaded)
    assert len(data.languages) == 12
    assert data.corpora[0].skipped == 0
    assert len(data.corpora[0]) == 60 * 11
    assert set(data.dropped) <= {"overlong", "few target tokens"}
    assert sum(data.dropped.values()) < 0.02 * 2 * 60 * 11
    assert data.train.fill > 0.9
    texts = {text_hash(r[side]) for r in data.corpora[0].records(range(660)) for side in ("source", "target")}
    checked = 0
    for batch in data.validation.batches():
        for row, slot in zip(*np.nonzero(batch.valid), strict=True):
            for name in ("source", "target"):
                span = loaded.decode(batch.tokens[row][getattr(batch, f"{name}_span")[row] == slot + 1])
                assert text_hash(span.strip()) == getattr(batch, f"{name}_hash")[row, slot]
                assert text_hash(span.strip()) in texts
                checked += 1
    assert checked == 2 * data.validation.num_examples == 2 * 2 * 20


def test_the_sample():
    """Every line of the packaged corpus is good, and no held-out sentence is among the training sentences."""
    pairs = list(readers.read_parallel(sources.parallel("sample").files))
    instructions = list(readers.read_instructions(sources.instructions("sample").files))
    assert [record for record in pairs + instructions if isinstance(record, readers.BadLine)] == []
    held_out = pipeline.multiway("sample")
    languages = {record["source_language"] for record in pairs} | {"en"}
    assert set(held_out) == languages
    assert len(languages) == 10
    assert len(instructions) > 100
    for code in sorted(languages - {"en"}):
        train = {record["source"] for record in pairs if record["source_language"] == code}
        assert train.isdisjoint(held_out[code])
