"""Log-likelihoods against transformers, each request by itself; prompts and files against what they have to be."""

import dataclasses
import gzip
import itertools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from alignx_jax import sharding
from alignx_jax.evaluation.measure import scoring
from alignx_jax.evaluation.measure.scoring import Item
from alignx_jax.exits import UserError
from alignx_jax.models import huggingface
from tests.models import llamas

OPTIONS = {"rows": 4, "row_length": 48, "dtype": jnp.float32}
ENGLISH = ["The dog sleeps.", "The teacher bought a red book this morning.", "He is at school.", "The cat eats fish."]
GERMAN = ["Der Hund schläft.", "Der Lehrer hat heute ein rotes Buch gekauft.", "Er ist in der Schule.", "Sie ist da."]
CHINESE = ["狗在睡觉。", "老师今天早上买了一本红色的书。", "他在学校。", "猫在吃鱼。"]


@pytest.fixture(scope="module")
def decoder(sample):
    return sample[0].load(sharding.make_mesh("1x1"))


@pytest.fixture(scope="module")
def model(sample):
    return transformers.AutoModelForCausalLM.from_pretrained(sample[0].huggingface, dtype=torch.float32)


@pytest.fixture(scope="module")
def alone(model):
    """(log-probability, greedy) of a continuation after its context, by transformers."""

    def score(context, continuation):
        ids = torch.tensor([[*context, *continuation]])
        with torch.no_grad():
            log_p_TxV = torch.log_softmax(model(ids).logits[0, :-1], dim=-1)[len(context) - 1 :]
        labels = ids[0, len(context) :]
        return log_p_TxV.gather(1, labels[:, None]).sum().item(), bool((log_p_TxV.argmax(dim=-1) == labels).all())

    return score


def of_text(encoder, alone):
    """Log-probability of `continuation` after `context`, where no token is part of both."""

    def score(context, continuation):
        (whole, _), (before, _) = encoder.encode_batch([context + continuation, context])
        assert whole[: len(before)].tolist() == before.tolist()
        return alone([encoder.bos_id, *before], whole[len(before) :])[0]

    return score


@pytest.mark.parametrize("spec", ["1x1", "4x2"])
def test_every_request_as_alone_in_transformers(sample, model, alone, spec):
    mesh, heard = sharding.make_mesh(spec), []
    rng = np.random.default_rng(0)
    lengths = [(1, 1), (1, 48), (20, 7), (5, 1), (3, 40), *rng.integers(1, 20, (30, 2)).tolist()]
    requests = [tuple(rng.integers(3, 4096, n).tolist() for n in pair) for pair in lengths]
    best = int(model(torch.tensor([requests[3][0]])).logits[0, -1].argmax())
    requests[3], requests[5] = (requests[3][0], [best]), (requests[3][0], [best, 5])
    got = scoring.log_likelihoods(
        sample[0].load(mesh), requests, mesh, **OPTIONS, progress=lambda *done: heard.append(done)
    )
    expected = [alone(*request) for request in requests]
    np.testing.assert_allclose(got.log_probability, [e[0] for e in expected], rtol=1e-6, atol=1e-4)
    assert got.greedy.tolist() == [e[1] for e in expected]
    assert got.greedy[3] and not got.greedy[5]
    assert heard[-1] == (35, 35) and len(heard) > 1


@pytest.mark.parametrize("variant", ["gqa", "gemma2"])  # the second caps its logits
def test_padding_of_the_vocabulary_has_no_probability(tmp_path, variant):
    """99 tokens and 29 rows of padding; in float64 against a softmax over the 99, each request alone."""
    folder, mesh = llamas.save(llamas.make(variant), tmp_path / "model"), sharding.make_mesh("2x2")
    rng = np.random.default_rng(0)
    requests = [tuple(rng.integers(0, 99, n).tolist() for n in lengths) for lengths in [(3, 5), (1, 9), (30, 2)]]
    with jax.enable_x64(True), jax.set_mesh(mesh):
        wide = huggingface.load(folder, mesh, jnp.float64)
        got = scoring.log_likelihoods(wide, requests, mesh, rows=2, row_length=40, dtype=jnp.float64)
        for (context, continuation), log_probability in zip(requests, got.log_probability, strict=True):
            ids = np.array([[*context, *continuation]], np.int32)
            _, logits = llamas.our_states(wide, ids, *llamas.whole_rows(1, ids.size), compute_dtype=jnp.float64)
            logits_TxV = np.asarray(logits[0, :-1])
            log_p_TxV = logits_TxV - np.log(np.exp(logits_TxV).sum(axis=1, keepdims=True))
            expected = log_p_TxV[np.arange(ids.size - 1), ids[0, 1:]][len(context) - 1 :].sum()
            assert log_probability == pytest.approx(expected, rel=1e-12)


def test_a_long_context_loses_its_beginning(decoder, alone, caplog):
    rng, mesh = np.random.default_rng(0), sharding.make_mesh("1x1")
    ids = rng.integers(3, 4096, 60).tolist()
    requests = [(ids[:50], ids[50:]), (ids[:12], ids[12:])]
    got = scoring.log_likelihoods(decoder, requests, mesh, **OPTIONS)
    assert "2 of 2 texts to score are cut to their last 49 tokens" in caplog.text
    expected = [alone(ids[11:50], ids[50:])[0], alone(ids[11:12], ids[12:])[0]]  # 48 inputs, and a last label
    np.testing.assert_allclose(got.log_probability, expected, atol=1e-4)
    assert got.greedy.tolist() == [False, False]
    assert scoring.log_likelihoods(decoder, [], mesh, **OPTIONS).greedy.shape == (0,)
    with pytest.raises(UserError, match=r"49 tokens, a row 48; raise --data\.row-length"):
        scoring.log_likelihoods(decoder, [(ids[:11], ids[11:])], mesh, **OPTIONS)
    for empty in (([], ids[:2]), (ids[:2], [])):
        with pytest.raises(ValueError, match="a context or a continuation is empty"):
            scoring.log_likelihoods(decoder, [empty], mesh, **OPTIONS)


def test_a_token_that_ends_beyond_the_context_is_of_the_continuation(sample):
    encoder = sample[1]

    def pieces(context, continuation, of=encoder):
        ((before, after),) = scoring.encode(of, [(context, continuation)])
        return before.tolist(), after.tolist()

    he, is_, at, school, stop = encoder.encode_batch(["He is at school."])[0][0].tolist()
    assert pieces("He is at", " school.") == ([encoder.bos_id, he, is_, at], [school, stop])
    assert pieces("He is at sch", "ool.") == ([encoder.bos_id, he, is_, at], [school, stop])
    chinese = encoder.encode_batch(["狗在"])[0][0].tolist()
    assert len(chinese) == 3  # the first covers no character
    assert pieces("", "狗在") == ([encoder.bos_id], chinese)
    assert pieces("狗", "在") == ([encoder.bos_id, *chinese[:2]], chinese[2:])
    without = dataclasses.replace(encoder, bos_id=None, prefix=())
    assert pieces("He is", " at", without) == ([he, is_], [at])
    assert pieces("", "He is", without) == ([encoder.eos_id], [he, is_])


def test_a_continuation_without_a_token_is_refused(sample):
    with pytest.raises(UserError, match="the tokenizer writes '', to be scored, with no token; leave it out"):
        scoring.encode(sample[1], [("He is", " at"), ("He is", "")])


def test_nothing_is_scored_beyond_the_models_context(caplog):
    """Rows of 48 tokens, and a model of 16: before anything is compiled."""
    short, mesh = types.SimpleNamespace(config=types.SimpleNamespace(max_positions=16)), sharding.make_mesh("1x1")
    with pytest.raises(UserError, match="a text to score has 17 tokens, the model's context 16; leave it out"):
        scoring.log_likelihoods(short, [([1], [*range(17)])], mesh, **OPTIONS)
    with pytest.raises(TypeError, match="abstract array"):  # it is no model
        scoring.log_likelihoods(short, [([*range(16)], [7, 8]), ([1], [2])], mesh, **OPTIONS)
    assert "1 of 2 texts to score are cut to their last 17 tokens" in caplog.text


def test_perplexity(sample, decoder, alone):
    encoder, sentences = sample[1], {"en": ENGLISH, "zh": CHINESE[:3]}
    got = scoring.perplexity(decoder, encoder, sentences, sharding.make_mesh("1x1"), **OPTIONS)
    assert list(got) == ["en", "zh"]
    for code, texts in sentences.items():
        ids = [i.tolist() for i, _ in encoder.encode_batch(texts)]
        nll = [-alone([encoder.bos_id], i)[0] for i in ids]
        np.testing.assert_allclose(got[code].nll, nll, atol=1e-4)
        assert got[code].bytes.tolist() == [len(t.encode("utf-8")) for t in texts]
        assert got[code].tokens.tolist() == [len(i) for i in ids]
        assert got[code].value == pytest.approx(np.exp(sum(nll) / sum(map(len, ids))), rel=1e-5)
        bits = sum(nll) / np.log(2) / sum(len(t.encode("utf-8")) for t in texts)
        assert got[code].bits_per_byte == pytest.approx(bits, rel=1e-5)


@pytest.mark.parametrize(
    ("text", "halves"),
    [
        ("The dog sleeps.", ("The dog", " sleeps.")),
        ("Yes, internationalisation.", ("Yes,", " internationalisation.")),
        ("one  two", ("one", "  two")),
        ("狗在睡觉。", ("狗在", "睡觉。")),
        ("他买了一本 Python 书", ("他买了一本", " Python 书")),
        ("ที่นี่ดี", ("ที่", "นี่ดี")),  # not before a vowel or tone mark, as in the middle of eight characters
        ("Yes.", None),
        ("是", None),
    ],
)
def test_where_a_sentence_is_cut(text, halves):
    assert scoring._halves(text) == halves


def test_choice_of_the_continuation(sample, decoder, alone):
    """Four sentences: each one's ending against those of all others, whatever is drawn."""
    encoder = sample[1]
    sentences = {
        "de": ["Er schläft.", "Der Lehrer hat auf dem Markt in der Stadt ein Buch gekauft.", *GERMAN[2:]],
        "en": ["He sleeps.", "The teacher bought a red book at the market in the city.", *ENGLISH[2:]],
    }
    score = of_text(encoder, alone)
    got = scoring.continuation_choice(decoder, encoder, sentences, sharding.make_mesh("1x1"), seed=0, **OPTIONS)
    hits = {"text": [], "byte": []}
    for code, texts in sentences.items():
        halves = [scoring._halves(text) for text in texts]
        for n, (start, _) in enumerate(halves):
            scores = [(score(start, end), len(end.encode("utf-8"))) for _, end in halves]
            hits["text"].append(max(range(4), key=lambda m: scores[m][0]) == n)
            hits["byte"].append(max(range(4), key=lambda m: scores[m][0] / scores[m][1]) == n)
        assert got[code].tolist() == hits["byte"][-4:]
    assert hits["byte"] != hits["text"] and 0 < sum(hits["byte"]) < 8  # else the test would say little


def test_sentences_that_are_drawn():
    def halves(*endings):
        return tuple(("start", end) for end in endings)

    of = {n: halves(f"a{n}", f"b{n}") for n in range(40)}
    of[7] = (("start", "a7"), None)  # cannot be cut in one language
    of[8], of[9] = halves("same", "b8"), halves("same", "b9")
    drawn = scoring._draw(of, seed=0)
    assert drawn == scoring._draw(of, seed=0) != scoring._draw(of, seed=1)
    assert list(drawn) == [n for n in range(40) if n != 7]
    for n, chosen in drawn.items():
        assert chosen[0] == n and len(set(chosen)) == 4 and 7 not in chosen
        assert not {8, 9} <= set(chosen)
    assert len(set(itertools.chain(*drawn.values()))) == 39
    few = {n: of[n] for n in (1, 2, 8, 9)}
    assert scoring._draw(few, seed=0) == {}
    assert list(scoring._draw(few | {3: of[3]}, seed=0)) == [1, 2, 8, 9, 3]


def test_nothing_to_choose_from(sample, decoder):
    got = scoring.continuation_choice(
        decoder, sample[1], {"en": ["Yes.", "No, thanks."]}, sharding.make_mesh("1x1"), seed=0, **OPTIONS
    )
    assert got["en"].shape == (0,)


def test_two_option_items(sample, decoder, alone):
    encoder = sample[1]
    items = {
        "sw": [
            Item("Mbwa amelala.", "Amechoka.", "Anakula samaki.", "cause", 1, "sw", 0),
            Item("Mwalimu yuko shuleni.", "Anafundisha watoto.", "Paka ananunua kitabu.", "effect", 0, "sw", 1),
        ],
        "de": [Item("Der Hund schläft.", "Er ist müde.", "Die Lehrerin hat ein Buch.", "cause", 0, "de", 0)],
    }
    texts = {
        "sw": [
            ("Mbwa amelala kwa sababu", " amechoka.", " anakula samaki."),
            ("Mwalimu yuko shuleni kwa hiyo", " anafundisha watoto.", " paka ananunua kitabu."),
        ],
        "de": [("Der Hund schläft.", " Er ist müde.", " Die Lehrerin hat ein Buch.")],
    }
    score = of_text(encoder, alone)
    got = scoring.two_option_accuracy(decoder, encoder, items, sharding.make_mesh("1x1"), **OPTIONS)
    for code, of in texts.items():
        prompts = [scoring._prompts(item, code) for item in items[code]]
        assert prompts == [[(start, first), (start, second)] for start, first, second in of]
        best = [int(score(start, second) > score(start, first)) for start, first, second in of]
        assert got[code].tolist() == [b == item.label for b, item in zip(best, items[code], strict=True)]
    assert 0 < sum(hits.sum() for hits in got.values()) < 3


GOOD = {
    "premise": "It rained. ",
    "choice1": "We went.",
    "choice2": "We stayed.",
    "question": "effect",
    "label": 1,
    "idx": 3,
}


def write(file, *lines):
    with gzip.open(file, "wb") if file.suffix == ".gz" else file.open("wb") as stream:
        for line in lines:
            stream.write((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n")
    return str(file)


def test_choices_from_files_and_folders(tmp_path):
    (tmp_path / "all").mkdir()
    for name, lang in (("en.test.jsonl.gz", "eng"), ("zh.test.jsonl", "zh"), ("zh.val.jsonl", "zh")):
        write(tmp_path / "all" / name, GOOD | {"lang": lang})
    one = write(tmp_path / "val.jsonl", b"\xef\xbb\xbf" + json.dumps(GOOD | {"lang": "zh_CN"}).encode(), b"  ")
    got = scoring.read_choices([str(tmp_path / "all"), one])
    item = Item("It rained.", "We went.", "We stayed.", "effect", 1, "zh", 3)
    assert got == {"en": [dataclasses.replace(item, lang="en")], "zh": [item, item]}
    assert scoring.read_choices([]) == {}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"premise"', "invalid JSON"),
        (b'{"premise": "\xff"}', "invalid JSON"),
        (b"[1]", "an object"),
        (GOOD, "field 'lang': field required"),
        (GOOD | {"lang": "xx"}, "field 'lang': 'xx' is no language code"),
        (GOOD | {"lang": "en", "label": 2}, "field 'label': input should be 0 or 1"),
        (GOOD | {"lang": "en", "question": "why"}, "field 'question': input should be 'cause' or 'effect'"),
        (GOOD | {"lang": "en", "choice2": " "}, "field 'choice2': string should have at least 1 character"),
        (GOOD | {"lang": "en", "premise": 3}, "field 'premise': input should be a valid string"),
    ],
)
def test_a_bad_item_is_named(tmp_path, line, says):
    file = write(tmp_path / "items.jsonl", GOOD | {"lang": "en"}, line)
    with pytest.raises(UserError) as raised:
        scoring.read_choices([file])
    message = str(raised.value)
    assert message.startswith(f"{file}:2: ") and says in message and "label (0 or 1)" in message
    assert "\n" not in message


def test_choices_that_are_not_there(tmp_path):
    for path, says in [
        (tmp_path / "no", "no such file or folder"),
        (tmp_path, "no .jsonl or .jsonl.gz file in this folder"),
    ]:
        with pytest.raises(UserError, match=rf"--evaluation\.choices: {path}: {says}"):
            scoring.read_choices([str(path)])
    file = write(tmp_path / "empty.jsonl")
    with pytest.raises(UserError, match=rf"--evaluation\.choices: {file}: empty"):
        scoring.read_choices([file])
