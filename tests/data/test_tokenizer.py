import contextlib
import functools
import gzip
import itertools
import json
import random
import shutil

import pytest
import sentencepiece
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from alignx_jax.data import tokenizer
from alignx_jax.exits import UserError
from tests.data.scripts import SENTENCES, sentences

QUICK = settings(max_examples=50, deadline=None)


@functools.cache
def _reference(folder):
    """Ids of a text, and how many bytes of a text each token is, by the libraries themselves.

    SentencePiece puts a space before the text.
    """
    if (folder / "tokenizer.json").is_file():  # byte-level: one character of a token's name is one byte
        fast = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        lengths = {number: len(token) for token, number in fast.get_vocab().items()}
        return lambda text: fast.encode(text, add_special_tokens=False), lengths, ""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    pieces = [processor.id_to_piece(i).replace("▁", " ") for i in range(processor.vocab_size())]
    lengths = {i: 1 if processor.is_byte(i) else len(piece.encode()) for i, piece in enumerate(pieces)}
    return processor.encode, lengths, " "


@QUICK
@given(texts=st.lists(sentences(), min_size=1, max_size=4))
def test_ids_are_those_of_the_libraries(any_tokenizer, texts):
    folder, ours = any_tokenizer
    encode, _, _ = _reference(folder)
    expected = [encode(text) for text in texts]
    assert [ids.tolist() for ids, _ in ours.encode_batch(texts)] == expected
    assert [ids.tolist() for ids in ours.ids_of_batch(texts)] == expected
    assert [ours.decode(ids).strip() for ids in expected] == texts


@QUICK
@given(text=sentences())
def test_offsets_are_the_characters_of_the_bytes(any_tokenizer, text):
    folder, ours = any_tokenizer
    _, lengths, prefix = _reference(folder)
    ((ids, offsets),) = ours.encode_batch([text])
    character = [i - len(prefix) for i, c in enumerate(prefix + text) for _ in c.encode()]
    assert sum(lengths[i] for i in ids) == len(character)
    start = 0
    for i, offset in zip(ids, offsets.tolist(), strict=True):
        assert offset == [max(character[start], 0), character[start + lengths[i] - 1] + 1]
        start += lengths[i]


def test_ids_of_real_lines(any_tokenizer, shared):
    folder, ours = any_tokenizer
    encode, _, _ = _reference(folder)
    texts = []
    for pair in ("ar-en", "de-en", "fi-en", "hi-en", "ru-en", "sw-en", "th-en", "tr-en", "vi-en", "zh-en"):
        with gzip.open(shared / "data" / "train_parallel" / "pairs" / f"{pair}.dev.jsonl.gz", "rt") as file:
            texts += [json.loads(line)["src"] for line in itertools.islice(file, 40)]
    assert [ids.tolist() for ids, _ in ours.encode_batch(texts)] == [encode(text) for text in texts]


def test_special_ids_and_size(tiny):
    for kind in ("bytes", "pieces"):
        loaded = tokenizer.load(tiny / kind)
        texts = [f"{text} 😀\n" for text in SENTENCES.values()]
        ids = [i for encoded, _ in loaded.encode_batch(texts) for i in encoded]
        assert {loaded.bos_id, loaded.eos_id, loaded.unk_id}.isdisjoint(ids)
        assert loaded.unk_id == {"bytes": None, "pieces": 0}[kind]
        assert loaded.decode([loaded.bos_id, *loaded.encode_batch(["fox"])[0][0], loaded.eos_id]) == "fox"
        assert max(ids) < loaded.vocab_size
        assert tokenizer.load(tiny / kind, loaded.vocab_size).vocab_size == loaded.vocab_size
        last = loaded.vocab_size - 1
        with pytest.raises(UserError, match=f"tokens up to {last}, but the model's embedding has only {last} rows"):
            tokenizer.load(tiny / kind, last)


def test_truncation_and_padding_in_the_file_are_turned_off(tiny, tmp_path):
    shutil.copytree(tiny / "bytes", tmp_path, dirs_exist_ok=True)
    fast = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    fast.enable_truncation(3)
    fast.enable_padding(length=50)
    fast.save(str(tmp_path / "tokenizer.json"))
    texts = list(SENTENCES.values())
    cut, whole = tokenizer.load(tmp_path).encode_batch(texts), tokenizer.load(tiny / "bytes").encode_batch(texts)
    assert [ids.tolist() for ids, _ in cut] == [ids.tolist() for ids, _ in whole]


def test_fingerprint_is_of_the_content(tiny, tmp_path):
    shutil.copytree(tiny / "bytes", tmp_path, dirs_exist_ok=True)
    assert tokenizer.load(tmp_path).fingerprint == tokenizer.load(tiny / "bytes").fingerprint
    config = tmp_path / "tokenizer_config.json"
    config.write_text(config.read_text() + "\n")
    assert tokenizer.load(tmp_path).fingerprint == tokenizer.load(tiny / "bytes").fingerprint
    for name, value in (("eos_token", "<s>"), ("chat_template", "{{ messages }}"), ("unk_token", "!")):
        changed = json.loads((tiny / "bytes" / config.name).read_text()) | {name: value}
        config.write_text(json.dumps(changed))
        assert tokenizer.load(tmp_path).fingerprint != tokenizer.load(tiny / "bytes").fingerprint


def test_fingerprint_is_of_the_file_that_is_read_and_of_what_reads_it(tiny, tmp_path, monkeypatch):
    """`fast_tokenizer_files` has transformers read another one than tokenizer.json."""
    shutil.copytree(tiny / "bytes", tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(config | {"fast_tokenizer_files": ["tokenizer.5.0.0.json"]})
    )
    shutil.copy(tmp_path / "tokenizer.json", tmp_path / "tokenizer.5.0.0.json")
    before = tokenizer.load(tmp_path)
    versioned = json.loads((tmp_path / "tokenizer.json").read_text())
    versioned["normalizer"] = {"type": "Lowercase"}
    (tmp_path / "tokenizer.5.0.0.json").write_text(json.dumps(versioned))
    after = tokenizer.load(tmp_path)
    (lower,), (upper,) = (made.encode_batch(["FOX"]) for made in (after, before))
    assert lower[0].tolist() != upper[0].tolist() and after.fingerprint != before.fingerprint
    monkeypatch.setattr("importlib.metadata.version", lambda library: "99")
    assert tokenizer.load(tmp_path).fingerprint != after.fingerprint


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no tokenizer here"),
        ({"tokenizer.json": "{"}, "cannot be read"),
        ({"tokenizer.model": "no model"}, "cannot be read"),
        ({"tokenizer_config.json": "{}"}, "no tokenizer here"),
    ],
)
def test_unreadable_tokenizers(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as error:
        tokenizer.load(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_a_tokenizer_needs_an_end_of_text(tiny, tmp_path):
    shutil.copytree(tiny / "bytes", tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    with pytest.raises(UserError, match="no end-of-text token"):
        tokenizer.load(tmp_path)


def test_code_of_the_tokenizers_own_is_not_run(tiny, tmp_path, monkeypatch):
    """Neither where tokenizer_config.json names it, nor where config.json does."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # as transformers asks whether to run it
    mark = tmp_path / "it ran"
    for file in ("tokenizer_config.json", "config.json"):
        folder = shutil.copytree(tiny / "bytes", tmp_path / file)
        (folder / "own.py").write_text(f"open({str(mark)!r}, 'w')\nclass Own: pass\n")
        settings = json.loads((folder / file).read_text()) if (folder / file).exists() else {"model_type": "own"}
        own = {"AutoTokenizer": ["own.Own", "own.Own"], "AutoConfig": "own.Own"}
        (folder / file).write_text(json.dumps(settings | {"tokenizer_class": "Own", "auto_map": own}))
        with (
            pytest.raises(UserError, match="auto_map") if file == "tokenizer_config.json" else contextlib.nullcontext()
        ):
            tokenizer.load(folder)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "tokenizer.model"])
def test_damaged_files_are_refused_or_read(tiny, tmp_path, name):
    """No checksum says which bit is wrong; but none ends in anything else."""
    folder = shutil.copytree(tiny / ("pieces" if name == "tokenizer.model" else "bytes"), tmp_path / "t")
    data, rng, refused = (folder / name).read_bytes(), random.Random(0), 0
    for n in range(60):
        place, spoiled = rng.randrange(len(data)), bytearray(data)
        spoiled[place] ^= 1 << rng.randrange(8)
        (folder / name).write_bytes([spoiled, data[:place], data[:place] + bytes(99) + data[place + 99 :]][n % 3])
        try:
            tokenizer.load(folder).encode_batch(["A fox \0 你好"])
        except UserError as error:
            refused += 1
            assert str(folder) in str(error)
    assert refused > 20
