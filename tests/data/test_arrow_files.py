"""Files that pyarrow and Hugging Face `datasets` wrote, read as sources."""

import json
import tracemalloc

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from alignx_jax.data import corpora, text_files
from alignx_jax.exits import UserError

PAIRS = [("Guten Tag", "Good day"), ("Здравствуй мир", "Hello world"), ("你好", "Hello")]
PARALLEL = {
    "fields": {
        "src": [s for s, _ in PAIRS],
        "tgt": [t for _, t in PAIRS],
        "src_lang": ["de"] * 3,
        "tgt_lang": ["en"] * 3,
        "score": [1.0, None, 2.0],
    },
    "translation": {"translation": [{"de": s, "en": t} for s, t in PAIRS]},
    "multi-way": {"text": [{"en": t, "de": s, "fr": None} for s, t in PAIRS], "id": [0, 1, 2]},
}


def _read(source, tmp_path, kind="parallel", on_error="stop"):
    corpus = corpora.prepare(kind, str(source), tmp_path / "cache", on_error)
    return corpus.records(range(len(corpus)))


@pytest.mark.parametrize("layout", PARALLEL)
@pytest.mark.parametrize("form", ["parquet", "folder", "splits"])
def test_parallel_text(tmp_path, layout, form):
    source = tmp_path / "data"
    if form == "parquet":
        source = tmp_path / "train-00000-of-00001.parquet"
        pq.write_table(pa.table(PARALLEL[layout]), source, row_group_size=2)
    else:
        table = datasets.Dataset.from_dict(PARALLEL[layout])
        if form == "splits":
            table = datasets.DatasetDict(train=table, test=table.select([0]))
        table.save_to_disk(source, num_proc=1)
    records = _read(source, tmp_path)
    fields = ("source_language", "target_language", "source", "target")
    assert [tuple(r[field] for field in fields) for r in records] == [("de", "en", s, t) for s, t in PAIRS]
    assert records[2]["origin"].endswith(".parquet: row 3" if form == "parquet" else ".arrow: row 3")


def test_shards_stand_in_their_order(tmp_path):
    table = datasets.Dataset.from_dict({"translation": [{"de": f"eins {n}", "en": f"one {n}"} for n in range(30)]})
    table.save_to_disk(tmp_path / "data", num_shards=12)
    assert [r["target"] for r in _read(tmp_path / "data", tmp_path)] == [f"one {n}" for n in range(30)]


@pytest.mark.parametrize("form", ["parquet", "folder"])
def test_instructions(tmp_path, form):
    columns = {"instruction": ["Greet", "Sum up"], "input": [None, "A text"], "output": ["Hello", "Short"]}
    if form == "parquet":
        pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    else:
        datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "data")
    records = _read(tmp_path / ("a.parquet" if form == "parquet" else "data"), tmp_path, "instructions")
    assert [(r["instruction"], r["input"], r["output"]) for r in records] == [
        ("Greet", "", "Hello"),
        ("Sum up", "A text", "Short"),
    ]


def _text(values: list[bytes]) -> pa.Array:
    """Text that nobody has checked."""
    return pa.array(values, pa.binary()).view(pa.string())


BAD = {
    "null": ({"translation": [{"de": None, "en": "b"}]}, "field 'translation' has to hold two languages, not 1"),
    "three": ({"translation": [{"de": "a", "en": "b", "fr": "c"}]}, "has to hold two languages, not 3"),
    "missing": ({"src": ["a"]}, "field 'tgt' is missing; the line has 'src'"),
    "number": ({"src": [1], "tgt": ["b"], "src_lang": ["de"], "tgt_lang": ["en"]}, "'src' has to be a text, not int"),
    "utf8": ({"src": _text([b"\xff"]), "tgt": ["b"], "src_lang": ["de"], "tgt_lang": ["en"]}, "cannot be read"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rows_have_their_place(tmp_path, case):
    columns, message = BAD[case]
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(UserError) as error:
        _read(tmp_path / "a.parquet", tmp_path)
    assert f"{tmp_path}/a.parquet: row 1: " in str(error.value) and message in str(error.value)


def test_damaged_files(tmp_path):
    pq.write_table(pa.table(PARALLEL["fields"]), tmp_path / "a.parquet")
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(content[:-9])
    with pytest.raises(UserError, match=r"a.parquet: row 1: damaged"):
        _read(tmp_path / "a.parquet", tmp_path, on_error="skip")
    (tmp_path / "a.parquet").write_bytes(content.replace(b"score", b"sc\xffre"))
    with pytest.raises(UserError, match=r"a.parquet: row 1: damaged"):
        _read(tmp_path / "a.parquet", tmp_path, on_error="skip")
    (tmp_path / "a.arrow").write_bytes(b"not Arrow at all")
    with pytest.raises(UserError, match=r"a.arrow: row 1: damaged"):
        _read(tmp_path / "a.arrow", tmp_path, on_error="skip")
    datasets.DatasetDict(test=datasets.Dataset.from_dict(PARALLEL["fields"])).save_to_disk(tmp_path / "data")
    with pytest.raises(UserError, match="no split 'train'"):
        _read(tmp_path / "data", tmp_path)
    (tmp_path / "data" / "test" / "state.json").write_text("{}")
    with pytest.raises(UserError, match=r"state.json: does not name the files"):
        _read(tmp_path / "data" / "test", tmp_path)
    (tmp_path / "data" / "test" / "state.json").write_text('{"_data_files": []}')
    with pytest.raises(UserError, match=r"state.json: does not name the files of the data set \(an empty list\)"):
        _read(tmp_path / "data" / "test", tmp_path)


@pytest.mark.parametrize(
    "name", ["../other.arrow", "{}/other.arrow", "sub/../../other.arrow", "state.json", "gone.arrow"]
)
def test_files_of_another_folder_are_not_read(tmp_path, name):
    datasets.Dataset.from_dict(PARALLEL["fields"]).save_to_disk(tmp_path / "data")
    (tmp_path / "data" / "sub").mkdir()
    (tmp_path / "data" / "data-00000-of-00001.arrow").rename(tmp_path / "other.arrow")
    state = tmp_path / "data" / "state.json"
    state.write_text(json.dumps({"_data_files": [{"filename": name.format(tmp_path)}]}))
    with pytest.raises(UserError, match=r"state.json: .* is no Arrow file of its folder.; save it again"):
        _read(tmp_path / "data", tmp_path)


LONG = "a" * (text_files.LONGEST_LINE + 1)


def _stream(path, table, **options) -> None:
    with pa.ipc.new_stream(path, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize("form", ["text", "dictionary", "chat"])
def test_a_row_that_is_too_long_has_its_place(tmp_path, kind, form):
    texts = pa.array(["Tag", LONG, "Tag"])
    if form == "chat":
        turns = [[{"role": "user", "content": t}, {"role": "assistant", "content": "a"}] for t in texts.to_pylist()]
        table = pa.table({"messages": turns})
    else:
        texts = texts.dictionary_encode() if form == "dictionary" else texts
        table = pa.table({"src": texts, "tgt": ["day"] * 3, "src_lang": ["de"] * 3, "tgt_lang": ["en"] * 3})
    path = tmp_path / f"a.{kind}"
    pq.write_table(table, path) if kind == "parquet" else _stream(path, table)
    with pytest.raises(UserError, match=rf"a\.{kind}: row 2: more than 1,048,576 bytes"):
        _read(path, tmp_path, "instructions" if form == "chat" else "parallel")
    assert len(_read(path, tmp_path, "instructions" if form == "chat" else "parallel", "skip")) == 2


@pytest.mark.parametrize("values", [1, 20])
def test_a_parquet_that_inflates_without_end_is_not_read(tmp_path, values):
    """Of 100 MB in one value, and in twenty under the limit: some kilobytes on disk."""
    size = 100_000_000 if values == 1 else 1_000_000
    table = pa.table({"src": [f"{n}" + "a" * size for n in range(values)]})
    pq.write_table(table, tmp_path / "a.parquet", compression="zstd")
    assert (tmp_path / "a.parquet").stat().st_size < 100_000
    del table
    before = pa.total_allocated_bytes()
    with pytest.raises(UserError, match=r"a\.parquet: rows 1 to \d+: column 'src' inflates to"):
        _read(tmp_path / "a.parquet", tmp_path)
    assert pa.total_allocated_bytes() - before < 1e6


@pytest.mark.parametrize("compression", ["zstd", "lz4"])
@pytest.mark.parametrize("dictionary", [False, True])
def test_an_arrow_file_that_is_compressed_inside_is_not_read(tmp_path, compression, dictionary):
    column = pa.array(["a" * 10_000] * 3)
    table = pa.table({"src": column.dictionary_encode() if dictionary else column})
    _stream(tmp_path / "a.arrow", table, compression=compression)
    with pytest.raises(UserError, match=r"a\.arrow: compressed inside; save it again without"):
        _read(tmp_path / "a.arrow", tmp_path)


def test_a_list_of_a_thousand_times_one_value_is_not_made(tmp_path):
    value = pa.DictionaryArray.from_arrays(pa.array([0] * 1000, pa.int32()), pa.array(["a" * 1_000_000]))
    _stream(tmp_path / "a.arrow", pa.table({"messages": pa.ListArray.from_arrays(pa.array([0, 1000]), value)}))
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"a\.arrow: row 1: cannot be read .list.*dictionary.* is not supported"):
            _read(tmp_path / "a.arrow", tmp_path, "instructions")
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()
