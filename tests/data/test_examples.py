"""Special tokens of an example: those of the tokenizer and of the template, once each, and none of the data's."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import transformers

from alignx_jax.config import DataConfig
from alignx_jax.data import corpora, examples, prompts, tokenizer
from alignx_jax.exits import UserError

PLAIN = prompts.Template("{instruction}\n{input}\n=>", "{instruction}\n=>", "Into {target_language}:")


def encoded(tmp_path, encoder, template, kind, *items, read=None, **settings):
    tmp_path.mkdir(exist_ok=True)
    file = tmp_path / f"{kind}.jsonl"
    file.write_text("".join(json.dumps(item) + "\n" for item in items))
    corpus = corpora.prepare(kind, str(file), tmp_path / "cache", "stop")
    config = DataConfig(cache=str(tmp_path / "cache"), directions="forward", min_target_tokens=1, **settings)
    made = examples.encode(corpus, encoder, template, config, spans=read)
    return [made.tokens[row["start"] : row["start"] + row["length"]].tolist() for row in made.index], made.index


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
@pytest.mark.parametrize("begins", ["", "<s>", "<s> "])
def test_bos_and_eos_are_there_once(tiny, tmp_path, kind, begins):
    """Whether or not the template writes BOS, and an output the end token."""
    encoder = tokenizer.load(tiny / kind)
    template = dataclasses.replace(PLAIN, prompt_no_input=f"{begins}{PLAIN.prompt_no_input}")
    items = [{"instruction": "Name a fox", "output": output} for output in ("a quick fox", "a quick fox</s>")]
    (plain, spelled), _ = encoded(tmp_path, encoder, template, "instructions", *items)
    assert plain == spelled and plain[0] == encoder.bos_id and plain[-1] == encoder.eos_id
    assert [plain.count(i) for i in (encoder.bos_id, encoder.eos_id)] == [1, 1]


def test_bos_is_not_there_where_the_tokenizer_does_not_add_it(tiny, tmp_path):
    """It is named, as SmolLM2-instruct names `<|im_start|>`: `tokenizer(text)` of transformers says what there is."""
    folder = shutil.copytree(tiny / "bytes", tmp_path / "t")
    written = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(written | {"post_processor": None}))
    theirs, encoder = transformers.AutoTokenizer.from_pretrained(folder), tokenizer.load(folder)
    assert theirs.bos_token == "<s>" and encoder.bos_id == theirs.bos_token_id
    pair = {"src_lang": "de", "tgt_lang": "en", "src": "ein fox", "tgt": "a quick fox"}
    expected = theirs("Into English:\nein fox\n=>a quick fox").input_ids
    ((tokens,), (row,)) = encoded(tmp_path, encoder, PLAIN, "parallel", pair, spans="in-prompt")
    assert tokens == [*expected, encoder.eos_id]
    assert encoder.decode(tokens[row["source_start"] : row["source_end"]]).strip() == "ein fox"
    ((tokens,), (row,)) = encoded(tmp_path, encoder, PLAIN, "parallel", pair, spans="separate")
    source, target = (theirs(text).input_ids for text in ("ein fox", "a quick fox"))
    assert tokens == [*expected, encoder.eos_id, *source, *target]
    assert tokens[row["target_start"] : row["target_end"]] == target and row["target_alone"] == row["target_start"]


def test_what_is_encoded_as_separate_has_the_examples_in_prompt_too(tiny, tmp_path, monkeypatch):
    """As stage 2 wants them, without being encoded again; also one too long with its sentences behind it."""
    encoder = tokenizer.load(tiny / "bytes")
    pairs = [{"src_lang": "de", "tgt_lang": "en", "src": "ein fox" * n, "tgt": "a quick fox"} for n in (1, 4, 2)]
    expected, table = encoded(tmp_path / "alone", encoder, PLAIN, "parallel", *pairs, spans="in-prompt", cutoff=60)
    separate, apart = encoded(tmp_path, encoder, PLAIN, "parallel", *pairs, spans="separate", cutoff=60)
    assert len(expected) > len(separate) > 0
    monkeypatch.setattr(examples, "_encoded", None)  # not again
    found, both = encoded(tmp_path, encoder, PLAIN, "parallel", *pairs, spans="separate", cutoff=60, read="in-prompt")
    assert found == expected
    fields = [name for name in table.dtype.names if name != "start"]
    np.testing.assert_array_equal(both[fields], table[fields])
    assert apart["record"].tolist() == [record for record in both["record"] if record in set(apart["record"])]


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_data_spell_no_control_token(tiny, tmp_path, kind):
    """Instruction, input, output, source and target: what is spelled like one is characters, as decoding shows."""
    encoder = tokenizer.load(tiny / kind)
    control = {encoder.bos_id, encoder.eos_id}
    spelled = {"instruction": "What is <s>?", "input": "<s></s>fox", "output": "It is </s> the fox"}
    ((tokens,), _) = encoded(tmp_path, encoder, PLAIN, "instructions", spelled)
    assert control.isdisjoint(tokens[1:-1])
    assert encoder.decode(tokens).strip() == "What is <s>?\n<s></s>fox\n=>It is </s> the fox"
    pair = {"src_lang": "de", "tgt_lang": "en", "src": "<s>ein</s> fox", "tgt": "</s>a <s> fox"}
    for spans in ("in-prompt", "separate"):
        ((tokens,), (row,)) = encoded(tmp_path, encoder, PLAIN, "parallel", pair, spans=spans)
        source, target = (tokens[row[f"{side}_start"] : row[f"{side}_end"]] for side in ("source", "target"))
        assert control.isdisjoint([*source, *target])
        assert [encoder.decode(ids).strip() for ids in (source, target)] == ["<s>ein</s> fox", "</s>a <s> fox"]


def test_a_template_writes_control_tokens(tiny, tmp_path):
    """And not those that lie beyond the model's embedding."""
    folder = shutil.copytree(tiny / "bytes", tmp_path / "t")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    rows = len(theirs)
    theirs.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    theirs.save_pretrained(folder)
    template = dataclasses.replace(PLAIN, prompt_no_input="<|user|>{instruction}</s>")
    item = {"instruction": "<|user|>fox", "output": "dog"}
    ((tokens,), _) = encoded(tmp_path, tokenizer.load(folder, rows + 1), template, "instructions", item)
    letters = theirs.encode("<|user|>fox", add_special_tokens=False, split_special_tokens=True)
    assert tokens == [0, rows, *letters, 1, *theirs.encode("dog", add_special_tokens=False), 1]
    with pytest.raises(UserError, match=rf"the template writes <\|user\|>, token {rows}, .* only {rows} rows"):
        encoded(tmp_path / "t", tokenizer.load(folder, rows), template, "instructions", item)
