import concurrent.futures
import gzip
import json
import time

import pytest

from alignx_jax.data import cache, corpora
from alignx_jax.exits import UserError

PAIRS = [("Guten Tag", "Good day"), ("Здравствуй мир", "Hello world"), ("你好 \u2028 世界", "Hello")]


def _all(corpus):
    return [(r["source_language"], r["target_language"], r["source"], r["target"]) for r in _records(corpus)]


def _records(corpus):
    return corpus.records(range(len(corpus)))


def _prepare(source, tmp_path, kind="parallel", on_error="stop"):
    return corpora.prepare(kind, str(source), tmp_path / "cache", on_error)


def _jsonl(items) -> bytes:
    return "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items).encode()


def _expected(language):
    return [(language, "en", source, target) for source, target in PAIRS]


FORMATS = {
    "four.tsv": "".join(f"deu_Latn\ten\t{s}\t{t}\n" for s, t in PAIRS).encode(),
    "de-en.train.tsv": "".join(f"{s}\t{t}\r\n" for s, t in PAIRS).encode(),
    "marked.tsv": b"\xef\xbb\xbf" + "".join(f"de\ten\t{s} \t  {t}\n" for s, t in PAIRS).encode(),
    "pairs.jsonl": _jsonl({"src_lang": "de", "tgt_lang": "en", "src": s, "tgt": t, "id": 1} for s, t in PAIRS),
    "blank.jsonl": b"\n" + _jsonl({"src_lang": "de", "tgt_lang": "en", "src": s, "tgt": t} for s, t in PAIRS) + b" \n",
    "ways.jsonl": _jsonl({"id": 1, "text": {"en": t, "de": s}} for s, t in PAIRS),
}


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_formats_of_parallel_text(tmp_path, name, zipped):
    path = tmp_path / (f"{name}.gz" if zipped else name)
    path.write_bytes(gzip.compress(FORMATS[name]) if zipped else FORMATS[name])
    corpus = _prepare(path, tmp_path)
    assert _all(corpus) == _expected("de")
    first = 2 if name == "blank.jsonl" else 1
    assert [r["origin"] for r in _records(corpus)] == [f"{path}:{first + i}" for i in range(3)]
    assert corpus.skipped == 0


def test_multiway_lines_are_paired_with_english(tmp_path):
    path = tmp_path / "ways.jsonl"
    lines = [{"text": {"de": "Tag", "en": "day", "zh_TW": "日"}}, {"text": {"en": "sun", "fr": "jour"}}]
    path.write_bytes(_jsonl(lines))
    assert _all(_prepare(path, tmp_path)) == [
        ("de", "en", "Tag", "day"),
        ("zh-Hant", "en", "日", "day"),
        ("fr", "en", "jour", "sun"),
    ]


def test_every_two_languages_of_a_multiway_line(tmp_path):
    path = tmp_path / "ways.jsonl"
    path.write_bytes(
        _jsonl([{"text": {"de": "Tag", "en": "day", "fr": "jour"}}, {"text": {"fr": "soleil", "sw": "jua"}}])
    )
    corpus = corpora.prepare("parallel", str(path), tmp_path / "cache", "stop", "all")
    assert _all(corpus) == [
        ("de", "en", "Tag", "day"),
        ("de", "fr", "Tag", "jour"),
        ("en", "fr", "day", "jour"),
        ("fr", "sw", "soleil", "jua"),
    ]
    with pytest.raises(UserError, match=r"ways.jsonl:2: field 'text' has to hold 'en'"):
        _prepare(path, tmp_path)  # of other pairs there is another cache
    path.write_bytes(_jsonl([{"text": {"fr": "soleil"}}]))
    with pytest.raises(UserError, match="two languages or more"):
        corpora.prepare("parallel", str(path), tmp_path / "cache", "stop", "all")


def test_moses_pairs(tmp_path):
    (tmp_path / "corpus.de-en.de").write_text("".join(f"{s}\n" for s, _ in PAIRS), encoding="utf-8")
    (tmp_path / "corpus.de-en.en").write_text("".join(f"{t}\n" for _, t in PAIRS), encoding="utf-8")
    corpus = _prepare(tmp_path / "corpus.de-en", tmp_path)
    assert _all(corpus) == _expected("de")
    assert _records(corpus)[2]["origin"] == f"{tmp_path}/corpus.de-en.de:3"
    assert _all(_prepare(tmp_path, tmp_path)) == _expected("de")  # as a folder


def test_moses_pairs_under_their_names_in_opus_100(tmp_path):
    for part in ("dev", "train"):
        for side, lines in zip(("de", "en"), zip(*PAIRS, strict=True), strict=True):
            text = "".join(f"{line} {part}\n" for line in lines)
            (tmp_path / f"opus.de-en-{part}.{side}").write_text(text, encoding="utf-8")
    corpus = _prepare(tmp_path, tmp_path)
    assert _all(corpus) == [("de", "en", f"{s} train", f"{t} train") for s, t in PAIRS]


@pytest.mark.parametrize("longer", ["de", "en"])
def test_moses_sides_of_unequal_length(tmp_path, longer):
    for side in ("de", "en"):
        (tmp_path / f"c.de-en.{side}").write_text("a\nb\n" + ("c\n" if side == longer else ""))
    with pytest.raises(UserError, match=rf"c\.de-en\.{longer} has more lines than .*c\.de-en\... \(2\)") as error:
        _prepare(tmp_path / "c.de-en", tmp_path, on_error="skip")
    assert "match line by line" in str(error.value)


def test_a_folder_is_read_in_order_and_never_its_dev_files(tmp_path):
    for name, text in (("de-en.train", "z"), ("de-en.dev", "y"), ("ar-en.train", "x"), ("fr-en.test", "w")):
        (tmp_path / f"{name}.tsv").write_text(f"{text}\t{text}\n")
    (tmp_path / "README.md").write_text("not data")
    assert [pair[2] for pair in _all(_prepare(tmp_path, tmp_path))] == ["x", "z"]


BAD = {
    "utf8": (b"de\ten\t\xff\tb\n", "c.tsv:3: not UTF-8 at byte 6"),
    "columns": (b"de\ten\ta\n", "c.tsv:3: 3 columns"),
    "pair": (b"a\tb\n", "c.tsv:3: 2 columns, and no language pair in the file's name"),
    "empty": (b"de\ten\t  \tb\n", "c.tsv:3: field 'src' is empty"),
    "language": (b"de\txxx\ta\tb\n", "c.tsv:3: field 'tgt_lang': 'xxx' is no language code"),
    "json": (b"{]\n", "c.jsonl:3: not JSON"),
    "deep": (b"[" * 100_000 + b"\n", "c.jsonl:3: not JSON"),
    "array": (b"[1]\n", "c.jsonl:3: not a JSON object"),
    "missing": (_jsonl([{"src_lang": "de", "tgt_lang": "en", "src": "a"}]), "c.jsonl:3: field 'tgt' is missing"),
    "type": (_jsonl([{"src_lang": "de", "tgt_lang": "en", "src": 5, "tgt": "b"}]), "c.jsonl:3: field 'src' has to be"),
    "half": (b'{"src_lang":"de", "tgt_lang":"en", "src":"\\ud83d", "tgt":"b"}\n', "c.jsonl:3: field 'src' holds half"),
    "english": (_jsonl([{"text": {"de": "a", "fr": "b"}}]), "c.jsonl:3: field 'text' has to hold 'en'"),
    "ways": (_jsonl([{"text": {"en": "a", "fr": ""}}]), "c.jsonl:3: field 'text.fr' is empty"),
    "twice": (_jsonl([{"text": {"en": "a", "fr": "b", "fra": "c"}}]), "c.jsonl:3: field 'text' names a language twice"),
    "nul": (b"de\ten\ta\0\tb\n", "c.tsv:3: field 'src' holds a NUL character"),
    "key": (
        b'{"src_lang":"de", "tgt_lang":"en", "src":"a", "tgt":"b", "src":"c"}\n',
        "c.jsonl:3: not JSON (the key 'src' twice",
    ),
    "escapes": (
        b"de\t\x1b[2J\xe2\x80\xa8x\ta\tb\n",
        r"c.tsv:3: field 'tgt_lang': '\x1b[2J\u2028x' is no language code",
    ),
    "texts": (_jsonl([{"text": "a"}]), "c.jsonl:3: field 'text' has to be an object"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_lines_stop_with_their_place_or_are_listed(tmp_path, case):
    bad, message = BAD[case]
    name = "c.tsv" if ".tsv" in message else "c.jsonl"
    good = FORMATS["four.tsv" if name == "c.tsv" else "pairs.jsonl"].splitlines(keepends=True)
    (tmp_path / name).write_bytes(b"".join(good[:2]) + bad + good[2])
    with pytest.raises(UserError) as error:
        _prepare(tmp_path / name, tmp_path)
    assert str(tmp_path / message) in str(error.value)
    assert "--data.on-error=skip" in str(error.value)
    for _ in range(2):  # prepared, and found again
        corpus = _prepare(tmp_path / name, tmp_path, on_error="skip")
        assert _all(corpus) == _expected("de")
        assert corpus.skipped == 1
        (line,) = (corpus.folder / "skipped.txt").read_text().splitlines()
        assert line.startswith(str(tmp_path / message))


def test_bad_moses_lines_name_the_side(tmp_path):
    (tmp_path / "c.de-en.de").write_bytes(b"a\nb\n")
    (tmp_path / "c.de-en.en").write_bytes(b"a\n\n")
    with pytest.raises(UserError, match=r"c\.de-en\.de:2: field 'tgt' is empty"):
        _prepare(tmp_path / "c.de-en", tmp_path)


INSTRUCTIONS = [
    {"instruction": "Sum up", "input": "A text", "output": "Short", "lang": "fi"},
    {"instruction": "Greet", "output": "Hello", "language": "en"},
    {"instruction": "Greet", "input": None, "output": "Hei"},
]


@pytest.mark.parametrize("name", ["i.jsonl", "i.jsonl.gz", "i.json", "i.json.gz"])
def test_instructions(tmp_path, name):
    content = _jsonl(INSTRUCTIONS) if "jsonl" in name else json.dumps(INSTRUCTIONS, indent=1).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    for source in (tmp_path / name, tmp_path):
        records = _records(_prepare(source, tmp_path, "instructions"))
        fields = ("instruction", "input", "output", "language")
        assert [tuple(r[field] for field in fields) for r in records] == [
            ("Sum up", "A text", "Short", "fi"),
            ("Greet", "", "Hello", "en"),
            ("Greet", "", "Hei", ""),
        ]
        assert records[1]["origin"] == f"{tmp_path / name}:" + ("2" if "jsonl" in name else " element 2")


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"instruction": "a"}, "field 'output' is missing"),
        ({"instruction": "a", "output": " "}, "field 'output' is empty"),
        ({"instruction": "a", "output": "b", "input": 0}, "field 'input' has to be a text, not int"),
        ({"instruction": "a", "output": "b", "language": "xxx"}, "field 'language': 'xxx' is no language code"),
        (["a"], "not an object"),
    ],
)
def test_bad_instructions(tmp_path, item, message):
    (tmp_path / "i.json").write_text(json.dumps([*INSTRUCTIONS, item]))
    with pytest.raises(UserError, match=f"i.json: element 4: {message}"):
        _prepare(tmp_path / "i.json", tmp_path, "instructions")


@pytest.mark.parametrize(
    ("kind", "name", "content", "message"),
    [
        ("parallel", "gone.tsv", None, "gone.tsv: no such file or folder"),
        ("parallel", "gone.de-en", None, "gone.de-en.de: no such file; the Moses pair"),
        ("parallel", "a.txt", b"a", "a.txt: parallel text is read from"),
        ("parallel", "a.tsv", b"\n", "a.tsv: not one record"),
        ("parallel", "a.tsv.gz", gzip.compress(FORMATS["four.tsv"])[:-12], "a.tsv.gz: damaged gzip file"),
        ("parallel", "a.tsv.gz", b"plain", "a.tsv.gz: damaged gzip file"),
        ("parallel", "a.tsv", b"", "a.tsv: empty, as a copy is that was cut short"),
        ("parallel", "\udcff.tsv", b"a", r"\udcff.tsv: its name is not UTF-8; rename it"),
        ("parallel", "", None, "no file here that can be read"),
        ("instructions", "gone.json", None, "gone.json: no such file"),
        ("instructions", "a.csv", b"a", "a.csv: instructions are read from"),
        ("instructions", "a.json", b"{}", "a.json: has to be a JSON array"),
        ("instructions", "a.json", b"\xff", "a.json: not JSON in UTF-8"),
        ("instructions", "a.json", b"[" * 100_000, "a.json: not JSON in UTF-8"),
        ("instructions", "a.json", b"[" + b"9" * 5000 + b"]", "a.json: not JSON in UTF-8"),
    ],
)
def test_unreadable_sources(tmp_path, kind, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        _prepare(tmp_path / name, tmp_path, kind, on_error="skip")
    assert message in str(error.value)


def test_a_corpus_is_prepared_once_for_its_content(tmp_path, monkeypatch):
    path = tmp_path / "c.tsv"
    path.write_bytes(FORMATS["four.tsv"])
    first = _prepare(path, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(corpora.ParallelText, "READ", None)  # reading again would fail
        again = _prepare(path, tmp_path)
    assert _all(again) == _all(first)
    path.write_bytes(FORMATS["four.tsv"].replace(b"Guten", b"Gutes"))  # as long as before
    assert _all(_prepare(path, tmp_path))[0][2] == "Gutes Tag"


def test_an_interrupted_preparation_is_not_taken_for_a_finished_one(tmp_path, monkeypatch):
    path = tmp_path / "c.tsv"
    path.write_bytes(FORMATS["four.tsv"])
    read = corpora.ParallelText.READ

    def interrupted(files, pairs):
        yield next(read(files, pairs))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(corpora.ParallelText, "READ", staticmethod(interrupted))
        with pytest.raises(KeyboardInterrupt):
            _prepare(path, tmp_path)
    (partial,) = (tmp_path / "cache" / "parallel").glob("*.partial")
    (partial / "left by a kill").write_text("")
    corpus = _prepare(path, tmp_path)
    assert _all(corpus) == _expected("de")
    assert not list((tmp_path / "cache").rglob("left by a kill"))
    assert not list((tmp_path / "cache" / "parallel").glob("*.partial"))


def test_of_two_at_once_one_prepares(tmp_path):
    written = []

    def write(partial):
        written.append(partial)
        time.sleep(0.2)
        (partial / "a").write_text("whole")

    with concurrent.futures.ThreadPoolExecutor() as pool:
        made = [pool.submit(cache.make_once, tmp_path / "made", write) for _ in range(3)]
        assert [(future.result() / "a").read_text() for future in made] == ["whole"] * 3
    assert len(written) == 1


def test_fingerprints_tell_parts_apart():
    assert cache.fingerprint("a", ["b"]) == cache.fingerprint("a", ["b"])
    assert len({cache.fingerprint(*parts) for parts in (("ab",), ("a", "b"), (["a", "b"],), ("b", "a"))}) == 4


@pytest.mark.parametrize(
    "header", ["source\ttarget", "de\ten", '"German"\t"English"', "Deutsch\tEnglish", "src_text\ttgt_text"]
)
def test_a_header_is_refused(tmp_path, header):
    path = tmp_path / "de-en.tsv"
    path.write_text(f"{header}\nGuten Tag\tGood day\nDeutsch\tEnglish\n")
    with pytest.raises(
        UserError, match=r"de-en\.tsv:1: looks like a header .*; remove the line .--data\.on-error=skip"
    ):
        _prepare(path, tmp_path)
    pairs = [("de", "en", "Guten Tag", "Good day"), ("de", "en", "Deutsch", "English")]
    assert _all(_prepare(path, tmp_path, on_error="skip")) == pairs
    path.write_text("src_lang\ttgt_lang\tsrc\ttgt\n")
    with pytest.raises(UserError, match=r"de-en\.tsv:1: looks like a header"):
        _prepare(path, tmp_path)


@pytest.mark.parametrize("first", ["Der Text\tThe text", "Deutsch\tGerman, a language", "Text\t12"])
def test_a_first_pair_is_no_header(tmp_path, first):
    (tmp_path / "de-en.tsv").write_text(f"{first}\n")
    assert len(_prepare(tmp_path / "de-en.tsv", tmp_path)) == 1


def test_skipping_is_offered_only_where_it_leaves_something(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(_jsonl([{"source": "a", "target": "b"}] * 3))
    with pytest.raises(UserError) as error:
        _prepare(path, tmp_path)
    assert "a.jsonl:1: field 'src' is missing" in str(error.value) and "on-error" not in str(error.value)
    path.write_bytes(_jsonl([{"source": "a"}, {"src": "a", "tgt": "b", "src_lang": "de", "tgt_lang": "en"}]))
    with pytest.raises(UserError, match=r"a\.jsonl:1: field 'src' is missing.*--data\.on-error=skip"):
        _prepare(path, tmp_path)
