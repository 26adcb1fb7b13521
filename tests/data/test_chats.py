"""Which tokens of a chat the assistant writes, and chats on their way from a file to a batch."""

import json
import pathlib
import shutil

import datasets
import numpy as np
import pyarrow
import pytest
import sentencepiece
import torch
import transformers
from pyarrow import parquet

from alignx_jax.config import Config, DataConfig, TrainingConfig
from alignx_jax.data import chats, fields, pipeline, readers, sources, tokenizer
from alignx_jax.data.fields import Bad
from alignx_jax.exits import UserError
from alignx_jax.objectives.next_token import next_token

# Of the structure of the published templates: how turns begin and end, what is added, trimmed and refused.
LLAMA3 = """{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m.role + '<|end|>\n\n' }}{% generation %}\
{{ m.content | trim + '<|eot|>' }}{% endgeneration %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"""
QWEN2 = """{% if messages[0].role != 'system' %}{{ '<|start|>system\nYou help.<|eot|>\n' }}{% endif %}\
{% for m in messages %}{{ '<|start|>' + m.role + '\n' }}{% generation %}{{ m.content + '<|eot|>' }}{% endgeneration %}\
{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"""
GEMMA = """{{ bos_token }}\
{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}\
{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Roles must alternate') }}{% endif %}\
{{ '<|start|>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}{% generation %}\
{{ m.content | trim + '<|eot|>' }}{% endgeneration %}{{ '\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|start|>model\n' }}{% endif %}"""
MISTRAL = """{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}\
{{ ' ' + m.content | trim + eos_token }}{% endgeneration %}{% else %}{{ '<|start|> ' + m.content + ' <|end|>' }}\
{% endif %}{% endfor %}"""
TEMPLATES = {"llama3": LLAMA3, "qwen2": QWEN2, "gemma": GEMMA, "mistral": MISTRAL}
QWEN3 = """{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}\
{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}\
{% set said = m.content.split('</think>')[-1] if loop.index0 < ns.last else m.content %}\
{{ '<|start|>' + m.role + '\n' + said.lstrip('\n') + '<|eot|>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"""

CHAT = [
    {"role": "user", "content": "Wie geht es? 你好"},
    {"role": "assistant", "content": "  Gut, danke.\nGut, danke. "},
    {"role": "user", "content": "Gut, danke."},
    {"role": "assistant", "content": "Gut, danke."},
]


def _marked(template: str) -> str:
    """With the markers about the assistant's turns alone."""
    begin, end = "{% generation %}", "{% endgeneration %}"
    before, _, rest = template.partition(begin)
    said, _, after = rest.partition(end)
    return f"{before}{{% if m.role == 'assistant' %}}{begin}{said}{end}{{% else %}}{said}{{% endif %}}{after}"


def _plain(template: str) -> str:
    return template.replace("{% generation %}", "").replace("{% endgeneration %}", "")


@pytest.fixture(scope="module")
def with_template(tiny, tmp_path_factory):
    """A function that gives the folder of the byte-level tokenizer with a chat template and its special tokens."""

    def make(template: str | None) -> pathlib.Path:
        folder = tmp_path_factory.mktemp("chat")
        made = transformers.AutoTokenizer.from_pretrained(tiny / "bytes")
        made.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|end|>", "<|eot|>"]})
        made.chat_template = template
        made.save_pretrained(folder)
        return folder

    return make


def _decoded(ids, mask, folder) -> list[str]:
    """The stretches of text that the assistant writes, special tokens and all."""
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
    return [theirs.decode(ids[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_assistants_tokens_are_those_of_transformers(with_template, name):
    """Transformers needs the markers of {% generation %}; without them the same is found."""
    template = TEMPLATES[name]
    folders = [with_template(t) for t in (_marked(template), _plain(template))]
    theirs = transformers.AutoTokenizer.from_pretrained(folders[0])
    made = theirs.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    assert sum(made["assistant_masks"]) > 4
    for folder in folders:
        ids, mask = chats.encode(CHAT, tokenizer.load(folder))
        assert ids.tolist() == made["input_ids"] and mask.astype(int).tolist() == made["assistant_masks"]
    end = "</s>" if name == "mistral" else "<|eot|>"
    said = _decoded(ids, mask, folders[1])
    assert [text.strip().removesuffix(end).strip() for text in said] == ["Gut, danke.\nGut, danke.", "Gut, danke."]
    assert all(text.endswith(end) for text in said)


@pytest.mark.parametrize("marked", [True, False])
def test_what_contents_spell_is_no_control_token(with_template, marked):
    """Against transformers, which can leave them alone too, in templates without markers."""
    spelled = [{**one, "content": f"What is <|eot|>? <s>{one['content']}<|start|>"} for one in CHAT]
    theirs = transformers.AutoTokenizer.from_pretrained(with_template(_plain(LLAMA3)))
    expected = theirs.apply_chat_template(spelled, sanitize_control_tokens=True, return_dict=False)
    folder = with_template((_marked if marked else _plain)(LLAMA3))
    ids, mask = chats.encode(spelled, tokenizer.load(folder))
    assert ids.tolist() == expected
    assert _decoded(ids, mask, folder) == [f"{one['content'].strip()}<|eot|>" for one in spelled[1::2]]


@pytest.mark.parametrize(("name", "end"), [(name, "</s>" if name == "mistral" else "<|eot|>") for name in TEMPLATES])
def test_the_token_that_ends_a_turn(with_template, name, end):
    """Where generation_config.json is missing, generation stops there all the same."""
    folder = with_template(TEMPLATES[name])
    number = transformers.AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(end)
    assert chats.turn_ends(tokenizer.load(folder)) == [number]


@pytest.mark.parametrize(
    "template", [None, "{{ messages[1].content }} Human:", "{{ raise_exception('no') }}", "{% if %}"]
)
def test_a_template_that_ends_turns_with_no_token(with_template, template):
    assert chats.turn_ends(tokenizer.load(with_template(template))) == []


def test_a_chat_of_sentencepiece(tiny, tmp_path):
    """tokenizer.model with a template and tokens of its own beside it; each part against SentencePiece."""
    folder = shutil.copytree(tiny / "pieces", tmp_path / "t")
    sp = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    end = sp.vocab_size()
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_end|>": end, "<|im_start|>": end + 1}))
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    template += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    (folder / "chat_template.jinja").write_text(template)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    ids, mask = chats.encode([{**CHAT[0], "content": "the <|im_end|>"}, CHAT[3]], tokenizer.load(folder))
    user, said = sp.encode("user\nthe <|im_end|>"), sp.encode("assistant\nGut, danke.")
    assert ids.tolist() == [end + 1, *user, end, end + 1, *said, end]
    assert sp.decode(ids[mask].tolist()[:-1]) == "Gut, danke." and mask[-1]


def test_thinking_of_earlier_turns_that_the_template_drops(with_template):
    folder = with_template(QWEN3)
    thought = [{**one, "content": "<think>so</think>" + one["content"]} if n % 2 else one for n, one in enumerate(CHAT)]
    ids, mask = chats.encode(thought, tokenizer.load(folder))
    expected = ["  Gut, danke.\nGut, danke. <|eot|>", "<think>so</think>Gut, danke.<|eot|>"]
    assert _decoded(ids, mask, folder) == expected


@pytest.mark.parametrize(
    ("template", "chat", "says"),
    [
        (GEMMA, [{"role": "system", "content": "Be brief."}, *CHAT], r"refuses the chat \(System role not supported\)"),
        (GEMMA, CHAT[:1] + CHAT, r"refuses the chat \(Roles must alternate\)"),
        ("{% for m in messages %}{{ m.content | upper }}<|eot|>{% endfor %}", CHAT, "turn 1 otherwise than it stands"),
        ("{{ messages | length }}{{ messages[-1].content }}", CHAT, "does not show where turn 1 begins"),
        (
            "{% for m in messages %}{% generation %}{% endgeneration %}{{ m.content }}{% endfor %}",
            CHAT,
            "writes no token",
        ),
        ("{{ messages[9].content }}", CHAT, "refuses the chat"),
    ],
)
def test_what_a_template_does_not_show_is_refused(with_template, template, chat, says):
    with pytest.raises(Bad, match=says):
        chats.encode(chat, tokenizer.load(with_template(_plain(template) if template == GEMMA else template)))


def test_a_template_that_is_no_jinja(with_template):
    with pytest.raises(UserError, match="the model's chat template is no Jinja"):
        chats.encode(CHAT, tokenizer.load(with_template("{% for %}")))


def _turns(*roles: str, **changes) -> dict:
    return {"messages": [{"role": role, "content": "x"} | changes for role in roles]}


@pytest.mark.parametrize(
    ("item", "says"),
    [
        ({"messages": "hi"}, "'messages' has to be a list of turns, not str"),
        ({"messages": []}, "'messages' has no turn of the assistant"),
        (_turns("user"), "'messages' has no turn of the assistant"),
        (_turns("assistant", "user"), "'messages' begins with the assistant"),
        (_turns("user", "bot"), r"'messages\[1\].role' is 'bot'; it has to be one of system, user, assistant, tool"),
        (_turns("user", "assistant", content=" "), r"'messages\[0\].content' is empty"),
        (_turns("user", "assistant", content=[{"text": "x"}]), r"'messages\[0\].content' has to be a text, not list"),
        (_turns("user", "assistant", content=None), r"'messages\[0\].content' is missing"),
        (_turns("user", "assistant", tool_calls=[1]), r"'messages\[0\]' has 'tool_calls', which is not supported"),
        (_turns("user", "assistant") | {"tools": [1]}, "'tools' is not supported"),
        ({"messages": [3]}, r"'messages\[0\]' has to be an object with role and content, not int"),
        (
            {"conversations": [{"from": "human"}]},
            r"'conversations\[0\].value' is missing; every turn needs from and value",
        ),
    ],
)
def test_a_chat_that_is_none(item, says):
    with pytest.raises(Bad, match=says):
        fields.instruction(item)


def test_both_spellings_are_the_same_chat():
    chat = _turns("system", "user", "assistant")
    shared = {"conversations": [{"from": who, "value": "x"} for who in ("system", "human", "gpt")], "lang": "de"}
    assert fields.instruction(shared) == fields.instruction(chat | {"language": "de"})
    assert json.loads(fields.instruction(chat)["messages"]) == chat["messages"]


def _config(folder: pathlib.Path, *lines: dict, **data) -> Config:
    file = folder / "chats.jsonl"
    file.write_text("".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines), encoding="utf-8")
    settings = {"cutoff": 200, "row_length": 400, "examples_per_row": 4, "validation": 0, "translation_share": 0.0}
    given = {"instructions": (str(file),), "cache": str(folder / "cache")} | settings | data
    return Config(data=DataConfig(**given), training=TrainingConfig(rows=2, steps=2))


PLAIN = {"instruction": "Say it", "output": "Gut, danke."}


def test_chats_among_instructions_in_a_batch(with_template, tmp_path):
    """Chats and instructions are packed into the same rows; of a chat the assistant's tokens alone have weight."""
    encoder = tokenizer.load(with_template(_plain(LLAMA3)))
    data = pipeline.build(_config(tmp_path, {"messages": CHAT}, PLAIN, _turns("user", "assistant")), "2", encoder)
    expected = {
        tuple(ids.tolist()): mask
        for ids, mask in (chats.encode(c, encoder) for c in (CHAT, _turns("user", "assistant")["messages"]))
    }
    found = set()
    for batch in data.train.batches(0):
        for row in range(len(batch.tokens)):
            for segment in range(1, batch.segments[row].max() + 1):
                here = batch.segments[row] == segment
                tokens, weights = tuple(batch.tokens[row][here].tolist()), batch.loss_weights[row][here]
                mask = expected.get(tokens, np.arange(len(tokens)) > 0)
                assert weights.tolist() == mask.astype(float).tolist()
                found.add(tokens)
    assert len(found) == 3 and found > expected.keys()


def test_the_loss_is_torchs_with_other_labels_ignored(with_template, tmp_path):
    """Chats packed in a row, against torch on each chat alone: -100 for what is not the assistant's."""
    folder, talks = with_template(_marked(LLAMA3)), [CHAT, CHAT[:2], _turns("system", "user", "assistant")["messages"]]
    theirs, encoder = transformers.AutoTokenizer.from_pretrained(folder), tokenizer.load(with_template(_plain(LLAMA3)))
    config = _config(tmp_path, *({"messages": talk} for talk in talks))
    row = pipeline.build(config, "2", encoder).train.row(0)
    tokens, weights = row.tokens[None], row.loss_weights[None]
    rng = np.random.default_rng(0)
    states, output = (rng.normal(size=(encoder.vocab_size, 8)).astype(np.float32) for _ in range(2))
    settings = {"vocab_size": encoder.vocab_size, "chunk": 64}
    loss = next_token(states[tokens], output, tokens, weights, **settings)
    expected, count = 0.0, 0
    for talk in talks:
        made = theirs.apply_chat_template(talk, return_dict=True, return_assistant_tokens_mask=True)
        ids, mask = (torch.tensor(made[name]) for name in ("input_ids", "assistant_masks"))
        labels = torch.where(mask == 1, ids, -100)[1:]
        logits = torch.tensor(states, dtype=torch.float64)[ids[:-1]] @ torch.tensor(output, dtype=torch.float64).T
        expected += float(torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
        count += int((labels >= 0).sum())
    assert weights.sum() == count and row.segments.max() == len(talks)
    np.testing.assert_allclose(float(loss), expected, rtol=1e-5)


def test_the_date_of_a_template_is_the_same_every_day(with_template):
    dated = "{% set today = strftime_now('%d %b %Y') %}{{ bos_token + today + strftime_now(' %Y-%m-%d %B') }}"
    encoder = tokenizer.load(with_template(dated + _plain(LLAMA3).removeprefix("{{ bos_token }}")))
    ids, _ = chats.encode(CHAT, encoder)
    assert encoder.decode(ids).startswith("26 Jul 2024 2024-07-26 July")


def test_a_chat_without_the_assistant_before_the_cutoff(with_template, tmp_path):
    encoder, late = tokenizer.load(with_template(_plain(LLAMA3))), [{**CHAT[0], "content": "long " * 200}, CHAT[1]]
    cut = {"cutoff": 60, "overlong": "truncate"}
    with pytest.raises(UserError, match=r"chats.jsonl:2: no token of the assistant among the first --data.cutoff=60"):
        pipeline.build(_config(tmp_path, {"messages": CHAT}, {"messages": late}, **cut), "2", encoder)
    data = pipeline.build(
        _config(tmp_path, {"messages": CHAT}, {"messages": late}, on_error="skip", **cut), "2", encoder
    )
    (one,) = data.sources
    assert (len(one.index), one.skipped) == (1, 1)
    assert "chats.jsonl:2: no token of the assistant" in (one.folder / "skipped.txt").read_text()


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_a_tokenizer_without_a_template(tiny, tmp_path, kind):
    encoder = tokenizer.load(tiny / kind)
    with pytest.raises(UserError, match=r"chats.jsonl:1: a chat, and the model's tokenizer has no chat template; give"):
        pipeline.build(_config(tmp_path, {"messages": CHAT}), "2", encoder)


def test_another_template_is_encoded_again(with_template, tmp_path):
    config = _config(tmp_path, {"messages": CHAT})
    encoders = [tokenizer.load(with_template(_plain(TEMPLATES[name]))) for name in ("llama3", "qwen2", "llama3")]
    built = [pipeline.build(config, "2", encoder).sources[0] for encoder in encoders]
    assert built[0].folder == built[2].folder != built[1].folder


def test_chats_of_parquet(tmp_path):
    columns = {"messages": [CHAT, None], "instruction": [None, "Say it"], "output": [None, "Gut."]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "saved", num_proc=1)
    for source in (tmp_path / "a.parquet", tmp_path / "saved"):
        chat, plain = readers.read_instructions(sources.instructions(str(source)).files)
        assert json.loads(chat["messages"]) == CHAT and plain["output"] == "Gut."
