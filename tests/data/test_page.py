"""The page on a corpus: what it says first, escaped text, its histograms, as wide as a telephone."""

import html.parser
import re
from types import SimpleNamespace

import pytest

from alignx_jax.config import DataConfig
from alignx_jax.data import page

VOID = {"meta"}
EVIL = "<script>alert(1)</script>\"'&"
ARABIC = "ذهب الولد إلى المدرسة."


class Page(html.parser.HTMLParser):
    """Every element with its attributes, its text and the classes around it; fails where tags do not nest."""

    def __init__(self, text):
        super().__init__()
        self.elements, self._open = [], []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        around = [element.attributes.get("class") for element in self._open]
        self.elements.append(SimpleNamespace(tag=tag, attributes=attributes, text="", around=around))
        if tag not in VOID:
            self._open.append(self.elements[-1])

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self._open.pop()

    def handle_endtag(self, tag):
        assert self._open.pop().tag == tag

    def handle_data(self, data):
        for element in self._open:
            element.text += data

    def all(self, tag, **attributes):
        return [e for e in self.elements if e.tag == tag and attributes.items() <= e.attributes.items()]


def direction(histogram=(0, 6, 3, 1), duplicates=0, longest=39):
    tokens = {"mean": 18.0, "median": 17.0, "p95": 31.4, "max": longest, "all": 180}
    examples = sum(histogram)
    return {"examples": examples, "duplicates": duplicates, "tokens": tokens, "histogram": list(histogram)}


def corpus(directions=None, source="a.tsv", bad_lines=(), dropped=(), doubts=None, languages=None, notes=()):
    """Facts of one source of German and English, and what the page asks the source for."""
    side = {"checked": 100, "doubtful": 0, "taken_for": {}, "examples": []}
    of_source = {"kind": "parallel", "source": source, "records": 300}
    of_source |= {"bad_lines": dict(bad_lines), "dropped": dict(dropped)}
    facts = {"sources": [of_source], "edges": [0, 10, 20, 30, 40]}
    facts["directions"] = directions or {"de > en": direction()}
    facts["languages"] = languages or {"de": side, "en": side}
    pair = {"records": 300, "same": 0, "languages": {"de": side, "en": side}}
    return facts, [SimpleNamespace(doubts=doubts or [pair], notes=list(notes), used=300)]


def verdict(*of, **settings):
    (first,) = Page(page.html(*of, DataConfig(**settings))).all("p", **{"class": "verdict"})
    return first.text


def test_nothing_stands_out():
    assert verdict(*corpus()).startswith("Nothing stands out: ")


def test_what_stands_out_is_the_first_sentence():
    facts, sources = corpus(
        directions={"de > en": direction(duplicates=1), "en > de": direction()},
        bad_lines={"field 'tgt' is empty": 1},
        dropped={"overlong": 1200, "few target tokens": 1},
    )
    assert verdict(facts, sources, cutoff=500) == (
        "Worth a look: 1 faulty line, left out; 1,200 examples longer than the cutoff of 500 tokens, left out; "
        "1 example with fewer than 3 tokens of the translation before the last, left out; "
        "1 duplicate among 20 examples (5.0%)."
    )
    text = page.html(facts, sources, DataConfig())
    assert text.index("Worth a look") < text.index("<h2")


def test_languages_in_doubt_and_equal_sides_stand_out():
    french = {"checked": 10, "doubtful": 2, "taken_for": {"fr": 2}, "examples": []}
    single = {"checked": 1, "doubtful": 1, "taken_for": {"fr": 1}, "examples": []}
    pair = {"records": 200, "same": 40, "languages": {"de": french, "en": single}}
    assert verdict(*corpus(doubts=[pair])) == (
        "Worth a look: 40 of 200 pairs with the same sentence on both sides; "
        "2 of 10 checked sentences of German that do not look like their language."
    )


def test_a_language_with_few_pairs_stands_out():
    """Below 100 pairs, or below a tenth of the median language's."""
    pairs = [("de", 99), ("fr", 100), ("hi", 100), ("sw", 100)]
    doubts = [{"records": n, "same": 0, "languages": {code: None, "en": None}} for code, n in pairs]
    assert verdict(*corpus(doubts=doubts)) == "Worth a look: very few pairs of German (99)."
    pairs = [("de", 1999), ("fr", 20_000), ("hi", 20_000), ("sw", 2000)]
    doubts = [{"records": n, "same": 0, "languages": {code: None, "en": None}} for code, n in pairs]
    assert verdict(*corpus(doubts=doubts)) == "Worth a look: very few pairs of German (1,999)."


def test_examples_that_are_cut_off_stand_out():
    assert verdict(*corpus(), cutoff=40, overlong="truncate").startswith("Nothing stands out: ")
    assert verdict(*corpus(), cutoff=39, overlong="drop").startswith("Nothing stands out: ")
    assert verdict(*corpus(), cutoff=39, overlong="truncate") == (
        "Worth a look: examples of 1 direction cut off after 39 tokens."
    )


def test_a_long_title_is_cut():
    text = page.html(*corpus(source="/data/" + "long/" * 20 + "a.tsv"), DataConfig())
    assert Page(text).all("title")[0].text == "AlignX corpus: .../a.tsv"
    assert page._last_part("x" * 41) == f"{'x' * 40}..."
    assert page._listed(list("abc")) == "a, b and c" and page._listed(list("abcde")) == "a, b, c and 2 more"


def test_text_of_the_data_is_escaped():
    doubtful = {"checked": 1, "doubtful": 1, "taken_for": {}, "examples": [{"origin": EVIL, "text": f"{EVIL}\0\x1b"}]}
    facts, sources = corpus(source=EVIL, bad_lines={EVIL: 1}, languages={"de": doubtful, "en": None}, notes=[EVIL])
    facts["directions"][f"instructions of {EVIL}"] = direction()
    text = page.html(facts, sources, DataConfig())
    assert not Page(text).all("script") and EVIL not in text and "\0" not in text and "\x1b" not in text
    assert text.count("&lt;script&gt;") == 11
    assert f"{EVIL}\\x00\\x1b" in [p.text for p in Page(text).all("p", dir="auto")]


def test_sentences_of_a_language_in_doubt_are_open():
    example = {"origin": "a.tsv:3", "text": ARABIC}
    few, many = ({"checked": 20, "doubtful": n, "taken_for": {}, "examples": [example]} for n in (3, 4))
    shown = Page(page.html(*corpus(languages={"de": few, "fr": many}), DataConfig())).all("details")
    assert ["open" in element.attributes for element in shown] == [False, True]


def test_a_sentence_is_read_in_its_own_direction():
    examples = [{"origin": "a.tsv:3", "text": ARABIC}, {"origin": "a.tsv:4", "text": "x" * 301}]
    doubtful = {"checked": 9, "doubtful": 2, "taken_for": {}, "examples": examples}
    shown = Page(page.html(*corpus(languages={"de": doubtful, "en": None}), DataConfig())).all("p", dir="auto")
    assert [p.text for p in shown] == [ARABIC, f"{'x' * 300}..."]


def test_it_needs_no_other_file_and_its_links_lead_somewhere():
    facts, sources = corpus({"de > en": direction(duplicates=1)}, bad_lines={"not JSON": 1}, dropped={"overlong": 1})
    text = page.html(facts, sources, DataConfig())
    elements = Page(text).elements
    assert not {e.tag for e in elements} & {"script", "link", "img", "iframe", "object", "embed", "base"}
    assert not re.search(r"@import|url\(|src=|https?:", text)
    ids = [e.attributes["id"] for e in elements if "id" in e.attributes]
    links = [e.attributes["href"] for e in elements if "href" in e.attributes]
    assert len(ids) == len(set(ids)) and links and {link.removeprefix("#") for link in links} <= set(ids)


def test_tables_scroll_in_their_own_box():
    text = page.html(*corpus(), DataConfig())
    tables = Page(text).all("table")
    assert len(tables) == 3 and all(table.around[-1] == "scroll" for table in tables)
    assert re.search(r"\.scroll \{ overflow-x: auto;[^}]* max-width: 100%", text)
    assert 'name="viewport" content="width=device-width' in text


def test_a_histogram_has_a_bar_for_each_count_and_names_its_axes():
    drawn = Page(page.html(*corpus(), DataConfig()))
    (picture,) = drawn.all("svg")
    assert picture.attributes["aria-label"] == (
        "Lengths of de > en: 10 examples; median 17, 95% up to 31, longest 39 tokens"
    )
    bars = drawn.all("rect")
    heights = [float(bar.attributes["height"]) for bar in bars]
    assert [h / heights[0] for h in heights] == pytest.approx([1, 3 / 6, 1 / 6], abs=0.01)
    feet = {round(float(bar.attributes["y"]) + h, 1) for bar, h in zip(bars, heights, strict=True)}
    assert len(feet) == 1
    places = [float(bar.attributes["x"]) for bar in bars]
    assert places[2] - places[1] == pytest.approx(places[1] - places[0], abs=0.11)
    assert [title.text for title in drawn.all("title")[1:]] == [
        "10 to 19 tokens: 6 examples",
        "20 to 29 tokens: 3 examples",
        "30 to 39 tokens: 1 example",
    ]
    labels = [text.text for text in drawn.all("text")]
    assert labels == ["0", "2", "4", "6", "0", "10", "20", "30", "40", "length in tokens", "examples"]


def test_of_many_directions_the_largest_are_drawn(monkeypatch):
    monkeypatch.setattr(page, "_PICTURES", 2)
    sizes = {"de > en": 5, "en > de": 9, "fr > en": 7}
    facts, sources = corpus({name: direction((0, size, 0, 0)) for name, size in sizes.items()})
    drawn = Page(page.html(facts, sources, DataConfig()))
    assert [re.match(r"\S+ > \S+", caption.text)[0] for caption in drawn.all("figcaption")] == ["en > de", "fr > en"]
    assert any("Shown are the 2 directions with the most examples" in p.text for p in drawn.all("p"))


def test_ticks_are_round_numbers():
    assert page._ticks(1, 5) == [0, 1]
    assert page._ticks(127, 5) == [0, 50, 100]
    assert page._ticks(513, 6) == [0, 100, 200, 300, 400, 500]
    assert page._ticks(1_000_000, 5) == [0, 200_000, 400_000, 600_000, 800_000, 1_000_000]
