import json

import datasets
import pytest

from alignx_jax.data import corpora, sources
from alignx_jax.exits import UserError

LINE = json.dumps({"src": "Guten Tag", "tgt": "Good day", "src_lang": "de", "tgt_lang": "en"}) + "\n"


def _names(source) -> list[str]:
    return [file.name for file in source.files]


@pytest.mark.parametrize(
    ("train", "held_out"),
    [
        ("train_de-en.jsonl", "test_de-en.jsonl"),
        ("de-en.train.jsonl", "de-en.dev.jsonl"),
        ("opus-TRAIN.jsonl", "opus-valid.jsonl"),
        ("deEnTrain.jsonl", "deEnValidation.jsonl"),
        ("train-00000-of-00001.jsonl", "val-00000-of-00001.jsonl"),
        ("training_set.jsonl", "eval_set.jsonl"),
        ("train2.jsonl", "dev2.jsonl"),
        ("traindata.jsonl", "newstest2019.jsonl"),
        ("wmt.trainset.jsonl", "wmt.devtest.jsonl"),
        ("a.trn.jsonl", "a.tst2013.jsonl"),
        ("train.jsonl", "held-out.jsonl"),
        ("train.jsonl", "my_holdout.jsonl"),
        ("train.jsonl", "evaluation.jsonl"),
        ("train.jsonl", "development.jsonl"),
    ],
)
def test_of_a_folder_what_is_for_training_by_its_name(tmp_path, train, held_out):
    for name in (train, held_out):
        (tmp_path / name).write_text(LINE)
    for read in (sources.parallel, sources.instructions):
        source = read(str(tmp_path))
        assert _names(source) == [train]
        assert source.unread == f"{tmp_path}: not read: {held_out} (for tests by their names)"
    (tmp_path / train).rename(tmp_path / "b.jsonl")  # now no name says train
    assert _names(sources.parallel(str(tmp_path))) == ["b.jsonl"]
    (tmp_path / "b.jsonl").unlink()
    with pytest.raises(UserError, match=r"for tests by their names.; name the files themselves"):
        sources.parallel(str(tmp_path))
    assert _names(sources.parallel(str(tmp_path / held_out))) == [held_out]  # as it was asked for


@pytest.mark.parametrize(
    "name", ["strain.jsonl", "latest.jsonl", "value.jsonl", "contest.jsonl", "devil.jsonl", "a.jsonl"]
)
def test_words_that_only_contain_such_a_name(name):
    assert sources.split_in(name) is None


def test_a_name_that_says_both(tmp_path):
    (tmp_path / "train_test.jsonl").write_text(LINE)
    with pytest.raises(UserError, match=r"train_test\.jsonl: is it for training or for tests"):
        sources.parallel(str(tmp_path))


def test_what_is_not_read_of_a_folder_is_said_in_one_line(tmp_path):
    for name in ("train.jsonl", "more.jsonl", "a.csv", "b.csv", "c.txt", "d.txt", "e.xml", "x.jp-en.jp", ".DS_Store"):
        (tmp_path / name).write_text(LINE)
    (tmp_path / "deeper").mkdir()
    assert sources.parallel(str(tmp_path)).unread == (
        f"{tmp_path}: not read: more.jsonl (no 'train' in their names, which others have); a.csv, b.csv, c.txt and 3 "
        "more (no format that is read); deeper (folders in a folder)"
    )
    corpus = corpora.prepare("parallel", str(tmp_path), tmp_path / "cache", "stop")
    assert len(corpus) == 1 and corpus.unread.startswith(f"{tmp_path}: not read: more.jsonl")


def test_other_splits_of_a_data_set_are_named(tmp_path):
    one = datasets.Dataset.from_dict({"translation": [{"de": "Tag", "en": "day"}]})
    datasets.DatasetDict(train=one, test=one).save_to_disk(tmp_path / "data")
    assert sources.parallel(str(tmp_path / "data")).unread == f"{tmp_path}/data: not read: test (other splits)"


@pytest.mark.parametrize(
    ("name", "pair"),
    [
        ("de-en.tsv", ("de", "en")),
        ("de_en.tsv", ("de", "en")),
        ("train_de-en.tsv", ("de", "en")),
        ("opus.de-en-train.tsv", ("de", "en")),
        ("deu_Latn-eng_Latn.tsv", ("deu_Latn", "eng_Latn")),
        ("deu_Latn_eng_Latn.train.tsv", ("deu_Latn", "eng_Latn")),
        ("zh-TW_en.tsv.gz", ("zh-TW", "en")),
        ("news-v7.pt-BR-en.tsv", ("pt-BR", "en")),
        ("pt-br-fr.tsv", None),
        ("de-de.tsv", None),
        ("jp-en.tsv", None),
        ("corpus.tsv", None),
    ],
)
def test_the_two_languages_in_a_name(name, pair):
    assert sources.pair_in(name) == pair


def test_a_name_of_a_thousand_words_takes_no_time():
    assert sources.pair_in("-".join(["word"] * 1000)) is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("jp-en.tsv", "'jp' is no language code; Japanese is ja"),
        ("cz-en.train.tsv", "'cz' is no language code; Czech is cs"),
        ("train.german-english.tsv", "'german' is no language code; German is de"),
        ("xx-en.tsv", "'xx' is no language code; give an ISO 639 code"),
        ("pt-br-fr.tsv", "(pt and br-fr or pt-br and fr?)"),
        ("corpus.tsv", "no language pair in the file's name; name the file like de-en.train.tsv"),
    ],
)
@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_two_columns_without_two_languages_are_of_the_whole_file(tmp_path, name, message, on_error):
    (tmp_path / name).write_text("Guten Tag\tGood day\nDanke\tThanks\n")
    with pytest.raises(UserError) as error:
        corpora.prepare("parallel", str(tmp_path / name), tmp_path / "cache", on_error)
    assert f"{tmp_path / name}: 2 columns, and no language pair in the file's name" in str(error.value)
    assert message in str(error.value) and "on-error" not in str(error.value)


def test_a_moses_prefix_with_a_country(tmp_path):
    for side in ("jp", "en"):
        (tmp_path / f"corpus.jp-en.{side}").write_text("a\n")
    with pytest.raises(UserError, match="'jp' is no language code; Japanese is ja"):
        sources.parallel(str(tmp_path / "corpus.jp-en"))
