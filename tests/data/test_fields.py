import hashlib
import json

import numpy as np
import pytest

from alignx_jax.data import fields, readers
from alignx_jax.data.fields import Bad

ASKED, ANSWERED = {"role": "user", "content": "How are you?"}, {"role": "assistant", "content": "Ahoy!"}
SHAREGPT = {"conversations": [{"from": "human", "value": "How are you?"}, {"from": "gpt", "value": "Ahoy!"}]}
CHAT = {"messages": [ASKED, ANSWERED]}
ALPACA = {"instruction": "Greet", "output": "Ahoy!"}
INVISIBLE = [
    "\u200b\u200e\u2060\ufeff", "\u00ad", "\u3164", "\uffa0 \u115f", "\u2800", "\ufe0f", "\u034f", "\U000e0041",
    "\u00a0\u2003\u3000", "\u2028\u0085\u001b", "\u180e",
]  # fmt: skip
VISIBLE = ["a", "\u0301", "。", "\u200d👩", "\ue000", "ㅤ한", "🏳️‍🌈", "-", "\u0e34"]


def _messages(item) -> list[dict]:
    return json.loads(fields.instruction(item)["messages"])


@pytest.mark.parametrize("field", ["system", "system_prompt", "system_message"])
@pytest.mark.parametrize("chat", [SHAREGPT, CHAT])
def test_a_system_column_is_the_first_turn(field, chat):
    item = {field: "You are a pirate.", "prompt": " How are you?", "id": 7, "tools": []} | chat
    assert _messages(item) == [{"role": "system", "content": "You are a pirate."}, ASKED, ANSWERED]
    for nothing in (None, "", " ", "\u200b"):
        assert _messages(item | {field: nothing}) == [ASKED, ANSWERED]


def test_the_case_is_tokenized_as_transformers_does(shared):
    transformers = pytest.importorskip("transformers")
    folder = shared / "cases" / "system_column"
    if not folder.is_dir():
        pytest.skip("needs the cases")
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder / "model")
    items = [json.loads(line) for line in (folder / "chats.jsonl").read_text().splitlines()]
    roles = {"human": "user", "gpt": "assistant"}
    for item, record in zip(items, readers.read_instructions([folder / "chats.jsonl"]), strict=True):
        turns = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in item["conversations"]]
        turns.insert(0, {"role": "system", "content": item["system"]})
        expected = tokenizer.apply_chat_template(turns, tokenize=False)
        assert tokenizer.apply_chat_template(json.loads(record["messages"]), tokenize=False) == expected
        assert "pirate" in expected


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (
            CHAT | {"system": "a", "messages": [{"role": "system", "content": "b"}, ASKED, ANSWERED]},
            "has another; keep one",
        ),
        (CHAT | {"system": "a", "system_prompt": "b"}, "both 'system' and 'system_prompt' are there"),
        (CHAT | SHAREGPT, "both 'messages' and 'conversations' are there"),
        (CHAT | {"system": 5}, "field 'system' has to be a text, not int"),
        (CHAT | {"documents": [{"text": "a"}]}, "field 'documents' is not supported"),
        (CHAT | {"chat_template_kwargs": {"enable_thinking": False}}, "field 'chat_template_kwargs' is not supported"),
        (CHAT | {"enable_thinking": False}, "field 'enable_thinking' is not supported"),
        (CHAT | {"tools": [{"name": "f"}]}, "field 'tools' is not supported"),
        (CHAT | {"tools": '[{"name": "f"}]'}, "field 'tools' is not supported"),
        (CHAT | {"images": ["a.png"]}, "field 'images' is not supported"),
        (CHAT | {"prompt": "Speak as a pirate."}, "field 'prompt' is no turn of the chat"),
        (ALPACA | {"history": [["Hi", "Hello"]]}, "field 'history' is not supported"),
        (ALPACA | {"system": "You are a pirate."}, "field 'system' has no place in a prompt template"),
        (ALPACA | {"context": "A ship."}, "field 'context' is not supported"),
    ],
)
def test_what_would_have_changed_the_prompt_is_refused_by_name(item, message):
    with pytest.raises(Bad) as error:
        fields.instruction(item)
    assert message in str(error.value)


def test_fields_that_say_nothing_are_no_fields():
    nothing = {
        "tools": [],
        "functions": None,
        "documents": [],
        "chat_template_kwargs": {},
        "history": [],
        "tool_calls": [],
    }
    empty_calls = [ASKED | {"name": None}, ANSWERED | {"tool_calls": [], "function_call": None, "refusal": ""}]
    assert _messages({"messages": empty_calls} | nothing) == [ASKED, ANSWERED]
    assert fields.instruction(ALPACA | nothing | {"system": ""})["output"] == "Ahoy!"


def test_nulls_of_json_lines_are_absent(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [
        {"translation": {"de": "Tag", "fr": None, "en": "day"}},
        {"translation": None, "src": "Tag", "tgt": "day", "src_lang": "de", "tgt_lang": "en"},
        {"translation": None, "text": {"en": "day", "fr": None, "de": "Tag"}},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    records = list(readers.read_parallel([path]))
    assert [(r["source_language"], r["source"], r["target"]) for r in records] == [("de", "Tag", "day")] * 3


@pytest.mark.parametrize("text", INVISIBLE)
def test_a_side_without_a_visible_character_is_empty(tmp_path, text):
    assert not fields.is_visible(text)
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"src": "Der Hund", "tgt": text, "src_lang": "de", "tgt_lang": "en"}) + "\n")
    (bad,) = readers.read_parallel([path])
    assert str(bad).startswith(f"{path}:1: field 'tgt' is empty")
    for item in (ALPACA | {"output": text}, {"messages": [ASKED, ANSWERED | {"content": text}]}):
        with pytest.raises(Bad, match="is empty"):
            fields.instruction(item)
    assert fields.instruction(ALPACA | {"input": text})["input"] == ""


@pytest.mark.parametrize("text", VISIBLE)
def test_a_side_with_one_is_taken_to_the_letter(text):
    assert fields.sentence(text, "src") == text


@pytest.mark.parametrize("text", ["", "guten tag", "สวัสดี", "😀"])
def test_hashes_are_the_first_bytes_of_blake2b(text):
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
    assert fields.text_hash(text) == np.frombuffer(digest, "<i4")[0]


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("Guten Tag", " guten  TAG\u00a0"),
        ("Straße", "STRASSE"),
        ("Ａ１", "a1"),
        ("ｶﾞ", "ガ"),
        ("caf\u00e9", "CAFE\u0301"),
        ("ﬁn", "FIN"),
        ("\u0345", "\u03b9"),
    ],
)
def test_sentences_equal_but_for_case_width_form_and_spaces_are_one(text, other):
    assert fields.text_hash(text) == fields.text_hash(other) != fields.text_hash(text + "x")
