import json
import pathlib
import re

import pytest
from py3langid.langid import MODEL_FILE, LanguageIdentifier

from alignx_jax.data import builders
from alignx_jax.data.languages import is_variety, language_name, normalize
from alignx_jax.exits import UserError

CODES = json.loads((pathlib.Path(builders.__file__).parent / "codes.json").read_text())
OPUS = {code for name in ("opus100", "opus100 zero-shot") for pair in CODES[name] for code in pair.split("-")}
IDENTIFIER = set(LanguageIdentifier.from_model_file(MODEL_FILE).labels)
ALL = (
    OPUS | IDENTIFIER | {code for name in ("flores200", "flores101", "ntrex128", "bactrian_x") for code in CODES[name]}
) - {"zxx"}  # what has no language
SAME = [  # in different data sets; of each group every code names one language, whatever the script of the last word
    "no nb nob nob_Latn nor",
    "zh zho_Hans zho zho-CN cmn zho_simpl zh-Hans zh_CN",
    "zh-Hant zho_Hant zho-TW zho_trad cmn_Hant",
    "fil tl tgl tgl_Latn",
    "he iw heb heb_Hebr",
    "id in ind ind_Latn",
    "sr srp srp_Cyrl srp-Cyrl",
    "sr-Latn sh srp-Latn",
    "pt por por_Latn por-BR pt-BR pt_PT",
    "en eng eng_Latn eng-GB eng-US eng-IN",
    "ps pus pbt_Arab",
    "qu quy_Latn que",
    "ff ful fuv fuv_Latn fuc",
    "fa fas pes_Arab prs_Arab prs",
    "ar ara arb arb_Arab",
    "sw swa swh swh_Latn",
    "ms msa zsm_Latn",
    "et est est_Latn ekk",
    "lv lav lvs_Latn",
    "az aze-Latn azj azj_Latn",
    "uz uzb uzn_Latn uzs",
    "mg mlg plt_Latn",
    "om orm gaz_Latn",
    "ku kmr kmr_Latn",
    "mn mon khk_Cyrl",
    "ne nep npi npi_Deva",
    "or ory ory_Orya",
    "sq sqi als_Latn",
    "yi ydd_Hebr ji",
    "ko kor kor_Hang",
    "ak aka_Latn twi_Latn",
    "apc apc_Arab ajp_Arab",
    "crh crh_Latn",
    "gn grn_Latn gug",
    "jv jav jav_Latn",
    "yue yue_Hant",
    "ro ron ron_Latn mo",
]
APART = [
    "nn no",
    "zh zh-Hant yue wuu",
    "az azb",
    "ku ckb sdh",
    "ar arz ary acm ars",
    "he hbo",
    "sr sr-Latn hr bs",
    "id ms",
]


@pytest.mark.parametrize(
    ("code", "normal", "name"),
    [
        ("de", "de", "German"),
        ("deu_Latn", "de", "German"),
        ("de-AT", "de", "German"),
        ("zh_TW", "zh-Hant", "Traditional Chinese"),
        ("sr_Latn", "sr-Latn", "Serbian (Latin)"),
        ("EN", "en", "English"),
        ("nob_Latn", "no", "Norwegian"),
        ("acm_Arab", "acm", "Mesopotamian Arabic"),
        ("taq_Tfng", "taq-Tfng", "Tamasheq (Tifinagh)"),
    ],
)
def test_codes_and_names(code, normal, name):
    assert normalize(code) == normal
    assert language_name(code) == name


@pytest.mark.parametrize("codes", SAME)
def test_codes_of_one_language_are_one(codes):
    first, *others = codes.split()
    assert {normalize(code) for code in others} == {normalize(first)} == {first}


@pytest.mark.parametrize("codes", APART)
def test_neighbours_stay_apart(codes):
    codes = codes.split()
    assert len({normalize(code) for code in codes}) == len(codes)


def test_every_code_of_the_published_data_sets_and_the_identifier_is_one_of_its_language():
    """Of two codes with one language, the groups above say so, or they are one ISO code, short and long."""
    known = {normalize(group.split()[0]): set(group.split()) for group in SAME}
    for code in ALL:
        assert normalize(normalize(code)) == normalize(code) and language_name(code), code
    by_language = {}
    for code in ALL:
        by_language.setdefault(normalize(code), set()).add(code)
    for language, codes in by_language.items():
        parts = {re.split("[-_]", code)[0] for code in codes - known.get(language, set())}
        assert len([part for part in parts if len(part) == 3]) <= 1, (language, codes)
    with pytest.raises(UserError):
        normalize("zxx")


def test_varieties_of_a_data_set():
    assert [code for code in ("fra-CA", "fra", "zho_Hans", "twi_Latn", "prs_Arab", "aka_Latn") if is_variety(code)] == [
        "fra-CA",
        "twi_Latn",
        "prs_Arab",
    ]


@pytest.mark.parametrize("code", ["dex", "", "german", "und", "mul", "zxx", "de_Abcd", "d", "de-en"])
def test_unknown_codes_are_refused(code):
    with pytest.raises(UserError, match="is no language code"):
        normalize(code)


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        ("jp", "'jp' is no language code; Japanese is ja"),
        ("cz", "'cz' is no language code; Czech is cs"),
        ("German", "'German' is no language code; German is de"),
        ("cn", "'cn' is no language code; Chinese is zh"),
        ("xx", "'xx' is no language code; give an ISO 639 code such as 'de'"),
    ],
)
def test_countries_and_names_are_answered_with_the_code(code, remedy):
    with pytest.raises(UserError) as error:
        normalize(code)
    assert remedy in str(error.value)
