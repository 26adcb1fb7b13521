"""Prompts against the tokens of training; translations against transformers, each prompt alone there."""

import dataclasses
import types

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from alignx_jax import sharding
from alignx_jax.config import TranslationConfig
from alignx_jax.data import pipeline, prompts, spans, tokenizer
from alignx_jax.evaluation.measure import translation
from alignx_jax.exits import UserError
from alignx_jax.models import generation
from tests.data.scripts import sentences

SPACE = prompts.Template("{instruction} {input} => ", "{instruction} => ", "Into {target_language}:")  # ends in one
TEMPLATES = {"alpaca": prompts.load("alpaca"), "sample": prompts.load("sample"), "space": SPACE}


@pytest.fixture(scope="module", params=["sample", "llama2", "deepseek_r1"])
def any_tokenizer(request, sample):
    if request.param == "sample":
        return sample[1]
    return tokenizer.load(request.getfixturevalue("shared") / "data" / "tokenizers" / request.param)


@pytest.mark.parametrize(
    ("specs", "expected"),
    [
        ((), []),
        (("none",), []),
        (("de-en",), [("de", "en")]),
        (("deu_Latn-eng_Latn", "de-en", "en-de"), [("de", "en"), ("en", "de")]),
        (("zh-Hant-en", "en-zh-TW", "zh-zh-Hant"), [("zh-Hant", "en"), ("en", "zh-Hant"), ("zh", "zh-Hant")]),
        (
            ("pivot",),
            [("en", "de"), ("en", "zh"), ("en", "zh-Hant"), ("de", "en"), ("zh", "en"), ("zh-Hant", "en")],
        ),
        (("zh-de", "en-de"), [("zh", "de"), ("en", "de")]),
    ],
)
def test_directions(specs, expected):
    assert translation.parse_directions(specs, ["de", "en", "zh", "zh-Hant"], "en") == expected


def test_every_direction_once():
    found = translation.parse_directions(("pivot", "all", "de-en"), ["de", "en", "zh"], "en")
    assert found[:4] == [("en", "de"), ("en", "zh"), ("de", "en"), ("zh", "en")]
    assert sorted(found) == [("de", "en"), ("de", "zh"), ("en", "de"), ("en", "zh"), ("zh", "de"), ("zh", "en")]


@pytest.mark.parametrize("spec", ["de", "de-de", "de-fr", "xx-en", "en-", "-", "", "de-en-zh", "Pivot"])
def test_what_is_no_direction(spec):
    with pytest.raises(UserError, match=rf"directions: '{spec}' does not name two languages .*\(de, en, zh\)"):
        translation.parse_directions(("pivot", spec), ["de", "en", "zh"], "en")


def test_a_direction_that_can_be_read_in_two_ways():
    """Brazilian Portuguese to German, or Portuguese to the Breton of Germany."""
    assert translation.parse_directions(("pt-BR-de",), ["de", "en", "pt"], "en") == [("pt", "de")]
    with pytest.raises(UserError, match="'pt-BR-de' does not name two"):
        translation.parse_directions(("pt-BR-de",), ["br", "de", "en", "pt"], "en")


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=40, deadline=None)
@given(source=sentences(), target=st.one_of(sentences(), sentences().map("“{}”".format), sentences().map("7{}".format)))
def test_a_prompt_is_what_training_put_before_the_response(any_tokenizer, name, source, target):
    trained = TEMPLATES[name].render_translation(source, target, "th", "zh")
    (encoding,) = any_tokenizer.encode_batch([trained.text])
    settings = {"cutoff": 4096, "overlong": "drop", "min_target_tokens": None, "loss_on": "response"}
    example = spans.mark(encoding, trained, any_tokenizer, **settings)
    config = TranslationConfig(shots=0)
    (text,) = translation.prompts(TEMPLATES[name], {"th": [source]}, {}, "th", "zh", config)
    assert text == trained.text[: trained.target[0]]
    (ids,) = translation.encode(any_tokenizer, [text])
    assert ids == example.tokens[: len(ids)].tolist()
    if name != "space":
        assert len(ids) == np.argmax(example.labels)  # so the model begins where the response began


def test_shots_are_whole_prompts_in_the_same_direction():
    material = (
        {"de": ["Ja.", "Nein."], "en": ["Yes.", "No."]},
        {"de": ["Gut.", "Rot.", "Neu."], "en": ["Good.", "Red.", "New."]},
    )
    got = translation.prompts(SPACE, *material, "de", "en", TranslationConfig(shots=2))
    shown = "Into English: Gut. => Good.\n\nInto English: Rot. => Red.\n\n"
    assert got == [f"{shown}Into English: Ja. => ", f"{shown}Into English: Nein. => "]


@pytest.mark.parametrize(
    ("text", "line"),
    [("", ""), (" \n", ""), (" Yes.", "Yes."), ("Yes. \n\n### Instruction:\nNo.", "Yes."), ("\n\nYes.\nNo.", "Yes.")],
)
def test_the_first_line_counts(text, line):
    assert translation.first_line(text) == line


@pytest.fixture
def one_thread():
    """torch with several threads waits for them most of the time where other tests run beside it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("shots", "template"), [(0, "sample"), (2, "space")])
def test_translations_are_those_of_transformers(sample, one_thread, shots, template):
    source, encoder = sample
    everything = pipeline.multiway("sample")
    material = {code: everything[code][:3] for code in ("de", "en", "hi")}
    examples = {code: everything[code][3:] for code in ("de", "en", "hi")}
    directions = [("en", "hi"), ("de", "en")]
    mesh, heard = sharding.make_mesh("2x1"), []
    got, cut = translation.translate(
        source.load(mesh),
        encoder,
        TEMPLATES[template],
        material,
        examples,
        directions,
        TranslationConfig(shots=shots, max_tokens=16, rows=4),
        mesh,
        eos_ids=[encoder.eos_id],
        dtype=jnp.float32,
        seed=0,
        progress=lambda *of: heard.append(of),
    )
    assert heard == [(4, 6), (6, 6)]

    model = transformers.AutoModelForCausalLM.from_pretrained(source.huggingface, dtype=torch.float32)
    for a, b in directions:
        shown = [
            TEMPLATES[template].render_translation(examples[a][n], examples[b][n], a, b).text for n in range(shots)
        ]
        for sentence, output, stopped in zip(material[a], got[a, b], cut[a, b], strict=True):
            text = "\n\n".join([*shown, TEMPLATES[template].render_translation(sentence, "", a, b).text]).rstrip(" ")
            ((ids, _),) = encoder.encode_batch([text])
            tokens = torch.tensor([[encoder.bos_id, *ids]])
            with torch.no_grad():
                (out,) = model.generate(
                    tokens,
                    attention_mask=torch.ones_like(tokens),
                    max_new_tokens=16,
                    do_sample=False,
                    eos_token_id=encoder.eos_id,
                    pad_token_id=0,
                )
            new = out[tokens.shape[1] :].tolist()
            expected = encoder.decode(new[: new.index(encoder.eos_id)] if encoder.eos_id in new else new)
            assert output == expected.strip().split("\n")[0].strip()
            assert stopped == (encoder.eos_id not in new and "\n" not in expected.lstrip())
    assert any(line for lines in got.values() for line in lines)


def test_settings_reach_the_generator(sample, monkeypatch):
    source, encoder = sample
    config = TranslationConfig(
        method="sample", beams=3, length_penalty=0.5, temperature=0.7, top_k=5, top_p=0.9, max_tokens=9, rows=2
    )
    ((ids, _),) = encoder.encode_batch(["Ja."])

    def generate(decoder, requests, mesh, **options):
        assert (len(requests), mesh) == (1, "mesh")
        assert options == {
            "max_tokens": 9,
            "eos_ids": [3, 5],
            "rows": 2,
            "dtype": jnp.float32,
            "decoding": generation.Decoding("sample", 3, 0.5, 0.7, 5, 0.9),
            "seed": 7,
            "progress": None,
        }
        return [[*ids.tolist(), encoder.vocab_size + 3]]  # a row of the embedding that no token has

    monkeypatch.setattr(generation, "generate", generate)
    decoder = source.load(sharding.make_mesh("1x1"))
    got = translation.translate(
        decoder,
        encoder,
        TEMPLATES["sample"],
        {"de": ["Ja."], "en": ["Yes."]},
        {},
        [("en", "de")],
        config,
        "mesh",
        eos_ids=[3, 5],
        dtype=jnp.float32,
        seed=7,
    )
    assert got == ({("en", "de"): ["Ja."]}, {("en", "de"): [False]})


@pytest.mark.parametrize("begins", ["", "<s>"])
def test_a_prompt_begins_as_in_training_and_its_sentence_spells_no_control_token(sample, monkeypatch, begins):
    """BOS once, whether or not the template writes it; `</s>` in a sentence is characters."""
    encoder, asked = sample[1], []
    monkeypatch.setattr(generation, "generate", lambda decoder, requests, *_, **options: asked.extend(requests) or [[]])
    template = dataclasses.replace(TEMPLATES["sample"], prompt_input=begins + TEMPLATES["sample"].prompt_input)
    decoder = types.SimpleNamespace(config=types.SimpleNamespace(max_positions=1024))
    sentences = {"de": ["Ja."], "en": ["Yes</s> <s>."]}
    options = {"eos_ids": [2], "dtype": jnp.float32, "seed": 0}
    directions, config = [("en", "de")], TranslationConfig(max_tokens=9)
    translation.translate(decoder, encoder, template, sentences, {}, directions, config, None, **options)
    (ids,) = asked
    assert ids[0] == encoder.bos_id and {encoder.bos_id, encoder.eos_id}.isdisjoint(ids[1:])
    assert "Yes</s> <s>." in encoder.decode(ids)


@pytest.mark.parametrize(
    ("text", "more", "cut"), [("Ja", 0, True), ("Ja", 1, False), ("\n\nJa", 0, True), ("Ja\nNein", 0, False)]
)
def test_a_line_is_cut_where_nothing_ended_it(sample, monkeypatch, text, more, cut):
    """`more` tokens could have followed: the model ended the text itself."""
    source, encoder = sample
    ((ids, _),) = encoder.encode_batch([text])
    monkeypatch.setattr(generation, "generate", lambda *_, **options: [ids.tolist()])
    mesh, sentences = sharding.make_mesh("1x1"), {"de": ["Ja."], "en": ["Yes."]}
    config = TranslationConfig(max_tokens=len(ids) + more)
    got = translation.translate(
        source.load(mesh),
        encoder,
        TEMPLATES["sample"],
        sentences,
        {},
        [("en", "de")],
        config,
        mesh,
        eos_ids=[encoder.eos_id],
        dtype=jnp.float32,
        seed=0,
    )
    assert got.cut == {("en", "de"): [cut]}


def test_a_prompt_has_to_leave_room_for_its_translation(sample):
    source, encoder = sample
    mesh = sharding.make_mesh("1x1")
    with pytest.raises(UserError, match=r"prompt of sentence 2 \(de-en\) has \d+ tokens, .*max-tokens=1000 .* 1024; "):
        translation.translate(
            source.load(mesh),
            encoder,
            TEMPLATES["sample"],
            {"en": ["Yes.", "No."], "de": ["Ja.", "Nein, nein, nein, nein, nein, nein, nein, nein, nein."]},
            {},
            [("en", "de"), ("de", "en")],
            TranslationConfig(max_tokens=1000),
            mesh,
            eos_ids=[encoder.eos_id],
            dtype=jnp.float32,
            seed=0,
        )


def test_what_cannot_be_translated_is_refused_first(tmp_path, monkeypatch):
    template, examples = TEMPLATES["sample"], {"de": ["Ja."], "en": ["Yes."]}
    translation.check(TranslationConfig(shots=1), template, examples)
    with pytest.raises(UserError, match=r"--data.template: its 'translation' is empty"):
        translation.check(TranslationConfig(), dataclasses.replace(template, translation=" "), examples)
    with pytest.raises(UserError, match=r"translation.shots=2: only 1 sentences are left when 100 are translated"):
        translation.check(TranslationConfig(shots=2), template, examples)

    checkpoint = tmp_path / "model.ckpt"
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="comet needs the program comet-score; install unbabel-comet"):
        translation.check(TranslationConfig(comet=str(checkpoint)), template, examples)
    (tmp_path / "comet-score").touch(mode=0o755)
    for file in (checkpoint, tmp_path / "comet-score"):
        with pytest.raises(UserError, match=rf"comet={file}: no such checkpoint"):
            translation.check(TranslationConfig(comet=str(file)), template, examples)
    checkpoint.touch()
    translation.check(TranslationConfig(comet=str(checkpoint)), template, examples)
