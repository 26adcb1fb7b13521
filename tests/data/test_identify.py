import pytest

from alignx_jax.data import identify


@pytest.mark.parametrize(
    ("code", "label"),
    [
        ("zh-Hant", "zh"), ("nb", "no"), ("no", "no"), ("fil", "tl"), ("ht", "ht"), ("ff", "fuv"), ("uz", "uz"),
        ("bik", "bcl"), ("ee", None),
    ],
)  # fmt: skip
def test_names_of_the_identifier(code, label):
    assert identify.label_of(code) == label


def test_a_sentence_in_another_language_is_improbable():
    german = "Guten Morgen, liebe Freunde, wie geht es euch heute?"
    assert identify.is_improbable(german, "en") and not identify.is_improbable(german, "de")
    assert identify.most_probable(german) == "de"
