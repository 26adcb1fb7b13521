"""Ids are those of the folder's files; BOS comes where transformers puts it; control tokens are never text's."""

import gzip
import itertools
import json
import shutil

import pytest
import sentencepiece
import tokenizers
import transformers
from sentencepiece import sentencepiece_model_pb2

from alignx_jax.data import controls, prompts, tokenizer
from alignx_jax.exits import UserError
from tests.data.scripts import SENTENCES

TEXTS = [*SENTENCES.values(), " two  spaces ", "a\n\nb", "1234 5", "", "Zürich 😀"]
ADDED = {"id": 0, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


@pytest.fixture
def as_written(tmp_path):
    """A function that writes a tokenizer.json with its own normalizer and merges, and what stands beside it."""

    def write(config: dict, **changes):
        model = tokenizers.models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>")
        made = tokenizers.Tokenizer(model)
        made.normalizer = tokenizers.normalizers.Replace(" ", "▁")
        specials = ["<unk>", "<s>", "</s>", "<|im_end|>", *(f"<0x{n:02X}>" for n in range(256))]
        trainer = tokenizers.trainers.BpeTrainer(vocab_size=500, special_tokens=specials, show_progress=False)
        made.train_from_iterator([*SENTENCES.values()] * 3, trainer)
        written = json.loads(made.to_str()) | changes
        written["added_tokens"] = [t for t in written["added_tokens"] if not t["content"].startswith("<0x")]
        (tmp_path / "tokenizer.json").write_text(json.dumps(written))
        names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        settings = {name: value for name, value in (names | config).items() if value is not None}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        return tmp_path

    return write


CLASSES = ["LlamaTokenizer", "LlamaTokenizerFast", "Qwen2Tokenizer", "GPT2Tokenizer", "GemmaTokenizer"]
CLASSES += ["CodeLlamaTokenizer", "PreTrainedTokenizerFast", "NoSuchTokenizer"]


@pytest.mark.parametrize("name", CLASSES)
def test_tokenizer_json_is_read_as_written_whatever_class_is_named(as_written, name):
    """transformers 5 rebuilds the tokenizer of a class that it has; the file says what the model was trained with."""
    folder = as_written({"tokenizer_class": name})
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    expected = [(e.ids, e.offsets) for e in theirs.encode_batch(TEXTS, add_special_tokens=False)]
    got = tokenizer.load(folder).encode_batch(TEXTS)
    assert [(ids.tolist(), [*map(tuple, offsets.tolist())]) for ids, offsets in got] == expected


def _template(*before: tuple[str, int], after: tuple[tuple[str, int], ...] = ()):
    """A post-processor that puts tokens around a text."""
    spell = " ".join([*(name for name, _ in before), "$A", *(name for name, _ in after)])
    processor = tokenizers.processors.TemplateProcessing(spell, special_tokens=[*before, *after])
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.post_processor = processor
    return json.loads(made.to_str())["post_processor"]


@pytest.mark.parametrize(
    ("post", "config"),
    [
        (None, {}),  # BOS is named and not added
        (_template(("<s>", 1)), {}),
        (_template(("<s>", 1)), {"bos_token": None}),  # added and not named
        (_template(("<s>", 1)), {"add_bos_token": False}),
        (None, {"add_bos_token": True}),
        (_template(("<|im_end|>", 3), ("<s>", 1), after=(("</s>", 2),)), {}),
    ],
)
def test_what_comes_before_a_text_is_what_transformers_adds(as_written, post, config):
    folder = as_written(config, post_processor=post)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    text = "The fox"
    plain, whole = (theirs.encode(text, add_special_tokens=add) for add in (False, True))
    ours = tokenizer.load(folder)
    assert whole[: whole.index(plain[0])] == list(ours.prefix) and ours.eos_id == 2
    ids = ours.begin(ours.encode_batch([text])[0][0].tolist())
    assert ids == whole[: len(ids)] and whole[len(ids) :] in ([], [2])
    assert ours.begin(ids) == ids  # once


def test_control_tokens_are_characters_in_text_and_tokens_by_their_marks(as_written, tiny, shared):
    """Against `tokenizers` told to encode special tokens as text, and SentencePiece, which does."""
    folders = [as_written({}), tiny / "bytes", shared / "data" / "tokenizers" / "deepseek_r1"]
    for folder in folders:
        ours, theirs = tokenizer.load(folder), tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        names = [token.content for token in theirs.get_added_tokens_decoder().values() if token.special][:20]
        assert len(names) > 1 and ours.controls.ids.keys() >= {*names}
        texts = [f"What is {name}? {name}" for name in names]
        for spelled, as_text in ((texts, True), ([ours.controls.mark(text) for text in texts], False)):
            theirs.encode_special_tokens = as_text
            expected = [e.ids for e in theirs.encode_batch(texts, add_special_tokens=False)]
            assert [ids.tolist() for ids, _ in ours.encode_batch(spelled)] == expected
        assert {*ours.controls.ids.values()}.isdisjoint(i for ids, _ in ours.encode_batch(texts) for i in ids.tolist())
    assert {"<｜User｜>", "<｜Assistant｜>"} <= ours.controls.ids.keys()  # which are not special in its file
    (ids, _), (mark, _) = ours.encode_batch(["<｜User｜>", ours.controls.mark("<｜User｜>")])
    assert len(ids) > 1 and mark.tolist() == [theirs.token_to_id("<｜User｜>")]
    assert ours.decode(mark) == "<｜User｜>"


@pytest.mark.parametrize("config", [{}, {"pad_token": "T"}])
def test_a_character_that_is_named_as_padding_stays_text(as_written, config):
    folder = as_written(config)
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ours = tokenizer.load(folder)
    assert ours.encode_batch(["The T"])[0][0].tolist() == theirs.encode("The T").ids
    assert ("T" in ours.controls.ids) is False


@pytest.mark.parametrize(("config", "eos"), [({"tokenizer_class": "LlamaTokenizer"}, 2), ({}, None)])
def test_an_end_token_that_no_file_names_is_the_classs(as_written, config, eos):
    """As of old Llama folders; and without a class there is none."""
    folder = as_written(config | {"eos_token": None})
    if eos is None:
        with pytest.raises(UserError, match=r"no end-of-text token; set eos_token in tokenizer_config.json"):
            tokenizer.load(folder)
    else:
        assert tokenizer.load(folder).eos_id == eos


@pytest.mark.parametrize("model", ["unigram", "ignore_merges", "merged"])
def test_control_tokens_are_out_of_reach_of_every_kind_of_vocabulary(tmp_path, model):
    """`tokenizers` itself finds a piece of the vocabulary that is spelled as a control token."""
    pieces = ["<unk>", "</s>", "<", "/", "s", ">", "a", "</", "s>"]
    vocab = {piece: n for n, piece in enumerate(pieces)}
    merges = [("<", "/"), ("s", ">"), *([("</", "s>")] if model == "merged" else [])]
    if model == "unigram":
        made = tokenizers.models.Unigram([(piece, -float(n > 1)) for piece, n in vocab.items()], unk_id=0)
    else:
        made = tokenizers.models.BPE(vocab, merges, unk_token="<unk>", ignore_merges=model == "ignore_merges")
    theirs = tokenizers.Tokenizer(made)
    theirs.add_special_tokens(["</s>"])
    theirs.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    theirs.encode_special_tokens = True
    assert theirs.encode("</s>").ids == [1]
    ours = tokenizer.load(tmp_path)
    (ids, _), (mark, _) = ours.encode_batch(["</s>", ours.controls.mark("</s>")])
    assert 1 not in ids and mark.tolist() == [1] and ours.decode(ids) in ("</s>", "</ s>")


@pytest.mark.parametrize("pad", [{}, {"content": "<pad>"}, {"content": "<pad>", "special": False}])
def test_ids_that_text_cannot_give_may_lie_beyond_the_embedding(as_written, pad):
    """Llama 2 with <pad>, Gemma 3's <image_soft_token>: one token more than rows."""
    folder = as_written({})
    written = json.loads((folder / "tokenizer.json").read_text())
    rows = len(written["model"]["vocab"])
    written["added_tokens"] += [ADDED | {"id": rows} | pad] if pad else []
    (folder / "tokenizer.json").write_text(json.dumps(written))
    assert transformers.PreTrainedTokenizerFast.from_pretrained(folder).vocab_size == rows
    if pad.get("special") is False:  # a token of text
        with pytest.raises(UserError, match=f"tokens up to {rows}, but the model's embedding has only {rows} rows"):
            tokenizer.load(folder, rows)
        return
    loaded = tokenizer.load(folder, rows)
    assert loaded.vocab_size == rows + len(pad)
    with pytest.raises(UserError, match=f"tokens up to {rows - 1}, but .* only {rows - 1} rows"):
        tokenizer.load(folder, rows - 1)
    if pad:
        with pytest.raises(UserError, match=f"the template writes <pad>, token {rows}, .* only {rows} rows"):
            loaded.controls.mark("a <pad>")


@pytest.fixture
def beside(tiny, tmp_path):
    """A function that puts files beside a tokenizer.model."""

    def write(**files):
        shutil.copytree(tiny / "pieces", tmp_path, dirs_exist_ok=True)
        for name, content in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        size = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model")).vocab_size()
        return tmp_path, size

    return write


@pytest.mark.parametrize("legacy", [True, False])
def test_what_stands_beside_a_sentencepiece_model_counts(tiny, beside, legacy):
    size = beside()[1]
    settings = {"eos_token": "<|im_end|>", "legacy": legacy, "chat_template": "{{ messages[0].content }}<|im_end|>"}
    folder, _ = beside(added_tokens={"<|im_end|>": size, "<think>": size + 1}, tokenizer_config=settings)
    ours = tokenizer.load(folder)
    assert (ours.bos_id, ours.eos_id, ours.unk_id, ours.vocab_size, ours.prefix) == (1, size, 0, size + 2, (1,))
    assert ours.chats.render([{"role": "user", "content": "x"}]) == ("x<|im_end|>", None)
    sp = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert ours.encode_batch(["the <|im_end|> fox"])[0][0].tolist() == sp.encode("the <|im_end|> fox")
    behind = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    if not legacy:  # then what stands behind a token gets no space before it
        changed = sentencepiece_model_pb2.ModelProto.FromString(sp.serialized_model_proto())
        changed.normalizer_spec.add_dummy_prefix = False
        behind.LoadFromSerializedProto(changed.SerializeToString())
    text = "the<think> fox <|im_end|>\nlazy <s>你"
    ((ids, offsets),) = ours.encode_batch([ours.controls.mark(text)])
    expected = [*sp.encode("the"), size + 1, *behind.encode(" fox "), size, *behind.encode("\nlazy "), 1]
    assert ids.tolist() == [*expected, *behind.encode("你")]
    marked = ours.controls.mark(text)
    assert controls.unmark("".join(marked[a:b] for a, b in offsets.tolist()[:5])).startswith("the<think>")
    assert offsets[-1].tolist() == [len(marked) - 1, len(marked)]
    assert ours.decode([*sp.encode("the"), size + 1, size, *sp.encode("fox")]) == "the<think>fox"
    without, _ = beside(tokenizer_config={"add_bos_token": False})
    assert tokenizer.load(without).prefix == ()


def test_a_long_regular_expression_is_refused_before_it_is_compiled(as_written):
    """One of 400,000 characters takes 3 GB and half a minute."""
    split = {"type": "Split", "pattern": {"Regex": "\\p{L}" * 100_000}, "behavior": "Isolated", "invert": False}
    folder = as_written({}, pre_tokenizer={"type": "Sequence", "pretokenizers": [split]})
    with pytest.raises(
        UserError, match=r"tokenizer.json: a regular expression of 500,000 characters; copy the published file"
    ):
        tokenizer.load(folder)


def test_a_regular_expression_that_never_ends_is_one_sentence(as_written):
    split = {"type": "Split", "pattern": {"Regex": "(x+)+$"}, "behavior": "Isolated", "invert": False}
    ours = tokenizer.load(as_written({}, pre_tokenizer=split))
    with pytest.raises(UserError, match=r"tokenizer.json cannot encode a text \(.*retry-limit"):
        ours.encode_batch(["x" * 40 + "y"])


def test_a_huge_file_is_refused_before_it_is_read(as_written):
    folder = as_written({})
    with open(folder / "tokenizer.json", "r+b") as file:
        file.truncate(2**28 + 1)  # sparse
    with pytest.raises(UserError, match=r"tokenizer.json: 268,435,457 bytes, more than any tokenizer has"):
        tokenizer.load(folder)


@pytest.mark.slow
def test_ids_of_real_sentences_and_prompts(shared):
    """12 languages x 200 sentences, alone and in prompts, by every tokenizer there is, against the libraries."""
    with gzip.open(shared / "data" / "eval" / "flores200" / "devtest.jsonl.gz", "rt") as file:
        rows = [json.loads(line)["text"] for line in itertools.islice(file, 200)]
    assert len(rows[0]) >= 12
    template = prompts.load("alpaca")
    texts = [text for row in rows for text in row.values()]
    texts += [template.render_translation(row["en"], row[code], "en", code).text for row in rows[:20] for code in row]
    roots = shared / "data" / "tokenizers", shared / "cases"
    found = {f.parent for root in roots for kind in ("json", "model") for f in root.rglob(f"tokenizer.{kind}")}
    assert len(found) > 10
    for folder in found:
        if (folder / "tokenizer.json").is_file():
            theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
            theirs.no_truncation()
            expected = [e.ids for e in theirs.encode_batch(texts, add_special_tokens=False)]
        else:
            expected = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).encode(texts)
        assert [ids.tolist() for ids, _ in tokenizer.load(folder).encode_batch(texts)] == expected, folder
