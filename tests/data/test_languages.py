import pytest

from alignx_jax.data.languages import language_name, normalize
from alignx_jax.exits import UserError


@pytest.mark.parametrize(
    ("code", "normal", "name"),
    [
        ("de", "de", "German"),
        ("deu_Latn", "de", "German"),
        ("de-AT", "de", "German"),
        ("arb_Arab", "ar", "Arabic"),
        ("swh_Latn", "sw", "Swahili"),
        ("zh", "zh", "Chinese"),
        ("zh-Hans", "zh", "Chinese"),
        ("zh_CN", "zh", "Chinese"),
        ("zho_Hans", "zh", "Chinese"),
        ("zh_TW", "zh-Hant", "Traditional Chinese"),
        ("sr_Latn", "sr-Latn", "Serbian (Latin)"),
        ("EN", "en", "English"),
    ],
)
def test_codes_of_one_language_are_one(code, normal, name):
    assert normalize(code) == normal
    assert language_name(code) == name
    assert normalize(normal) == normal


@pytest.mark.parametrize("code", ["dex", "", "german", "und", "mul", "de_Abcd", "d", "de-en"])
def test_unknown_codes_are_refused(code):
    with pytest.raises(UserError, match="unknown language code"):
        normalize(code)
