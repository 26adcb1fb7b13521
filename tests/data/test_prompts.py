import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignx_jax.data import prompts
from alignx_jax.exits import UserError

ALPACA = {
    "prompt_input": "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n"
    "### Input:\n{input}\n\n### Response:\n",
    "prompt_no_input": "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n",
}


@given(st.text(), st.text(), st.text())
def test_alpaca_is_plain_substitution(instruction, input, output):
    prompt = prompts.load("alpaca").render(instruction, input, output)
    before, after = ALPACA["prompt_input" if input else "prompt_no_input"].split("{instruction}")
    assert prompt.text == before + instruction + after.replace("{input}", input) + output
    assert prompt.text[slice(*prompt.source)] == input
    assert prompt.text[slice(*prompt.target)] == output
    assert prompt.target[1] == len(prompt.text)


def test_translation_names_the_languages():
    prompt = prompts.load("alpaca").render_translation("Guten {input} Tag", "Jioni njema", "de", "sw")
    assert "\nTranslate the following text from German to Swahili.\n" in prompt.text
    assert prompt.text[slice(*prompt.source)] == "Guten {input} Tag"
    assert prompt.text[slice(*prompt.target)] == "Jioni njema"


GOOD = ALPACA | {"translation": "Into {target_language}."}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_input": "{instruction} {input} {instruction.__class__}"}, "unknown field {instruction.__class__}"),
        ({"prompt_input": "{instruction}"}, "'prompt_input' has to hold {input} exactly once"),
        ({"prompt_input": "{instruction} {input} {input}"}, "exactly once"),
        ({"prompt_no_input": "nothing"}, "'prompt_no_input' has to hold {instruction}"),
        ({"translation": "{input}"}, "'translation' has the unknown field {input}"),
        ({"translation": None}, "'translation' is missing"),
        ({"translation": "\ud800"}, "'translation' holds half of a surrogate pair"),
        ({"translation": "{0}{}"}, "unknown field {}"),
        ({"x" * 100_000: ""}, "unknown entry 'xxx"),
        ({"response_split": "###"}, "unknown entry 'response_split'"),
    ],
)
def test_bad_templates(tmp_path, change, message):
    path = tmp_path / "template.json"
    path.write_text(json.dumps(GOOD | change))
    with pytest.raises(UserError) as error:
        prompts.load(str(path))
    assert message in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), ("{", "not JSON"), ("[]", "JSON object"), ("[" * 100_000, "not JSON")],
)
def test_unreadable_templates(tmp_path, content, message):
    path = tmp_path / "template.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        prompts.load(str(path))


def test_a_folder_is_no_template(tmp_path):
    with pytest.raises(UserError, match=r"cannot be read .Is a directory"):
        prompts.load(str(tmp_path))
