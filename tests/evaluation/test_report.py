"""The page: whole, self-contained, escaped, as wide as a telephone; TensorBoard data and the terminal's table."""

import copy
import html.parser
import io
import json
import re
import shutil
import subprocess

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from alignx_jax.evaluation import report, verdict
from tests.evaluation import results_example

SECTIONS = ["verdict", "models", "depth", "measures", "by_language", "matrix", "projections", "losses", "translation"]
SECTIONS += ["forgetting", "language_tables", "samples", "definitions", "about"]
EVIL = "<script>alert(1)</script>\"'&"
VOID = {"meta", "br"}


class Page(html.parser.HTMLParser):
    """Every element with its attributes; fails where tags do not nest."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.headings, self.texts, self._open = [], [], [], []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if "style" not in self._open:
            self.texts.append(data)
        if self._open and self._open[-1] == "h2":
            self.headings.append(data)


@pytest.fixture(scope="module")
def results():
    return results_example.build(models=3, languages=5, layers=4)


@pytest.fixture(scope="module")
def path(results, tmp_path_factory):
    return report.write(results, tmp_path_factory.mktemp("page") / "new")


@pytest.fixture(scope="module")
def page(path):
    return Page(path.read_text(encoding="utf-8"))


def test_the_page_loads_nothing(path, page):
    assert path.name == "report.html"
    for tag, attributes in page.elements:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base")
        for name in ("src", "href", "xlink:href", "srcset", "poster"):
            value = attributes.get(name, "#")
            assert value.startswith(("#", "data:image/")) or (tag == "a" and value.startswith("https://"))
        assert not any(name.startswith("on") for name in attributes)
    text = path.read_text(encoding="utf-8")
    assert "@import" not in text and not re.search(r"url\((?!#)", text)


def test_every_picture_says_what_it_shows(page):
    pictures = [attributes for tag, attributes in page.elements if tag == "svg"]
    assert len(pictures) == 4 + 14 + 2 + 3 + 9 + 3 + 2
    assert all(p["role"] == "img" and re.search(r"\d", p["aria-label"]) for p in pictures)
    assert not any(tag == "img" for tag, _ in page.elements)


def test_ids_are_unique_and_links_lead_somewhere(page):
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for tag, a in page.elements if tag == "a" and a["href"].startswith("#")} <= set(ids)


def test_sections_with_data_are_there_in_order_and_in_the_contents(page):
    assert [attributes["id"] for tag, attributes in page.elements if tag == "h2"] == SECTIONS
    links = [a["href"] for tag, a in page.elements if tag == "a" and a["href"].startswith("#")]
    assert [link for link in links if link != "#definitions"] == [f"#{s}" for s in SECTIONS if s != "definitions"]


def test_sections_without_data_are_left_out(tmp_path):
    results = results_example.build(models=1, languages=2, layers=2)
    (model,) = results["models"]
    model.update(translation=None, tasks=None, choices=None, continuation_choice={}, perplexity={}, projection={})
    model["alignment"].update(dali=None, dali_strict=None, in_prompt=None, matching_head=None)
    page = Page(report.write(results, tmp_path).read_text(encoding="utf-8"))
    found = [attributes["id"] for tag, attributes in page.elements if tag == "h2"]
    assert found == ["verdict", "models", "depth", "measures", "by_language", "matrix", "definitions", "about"]
    assert {f"#{section}" for section in found} == {
        a["href"] for t, a in page.elements if t == "a" and "#" in a["href"]
    }
    assert "".join(page.texts).count("+0") == 0  # no changes


def test_the_numbers_of_the_page_are_those_of_the_results(results, page):
    text = re.sub(r"\s+", " ", "".join(page.texts)).replace("−", "-")
    for model in results["models"]:
        for code, score in model["translation"]["directions"].items():
            assert f"{score['chrF++']:.1f}" in text, code
        for value, low, high in (p["bits_per_byte"] for p in model["perplexity"].values()):
            assert f"{value:.3f} [{low:.3f}, {high:.3f}]" in text
        change = model["intervals"].get("retrieval_change", {}).get("mean")
        assert change is None or f"{100 * change[0]:+.1f} [{100 * change[1]:.1f}, {100 * change[2]:.1f}]" in text
    for found in verdict.verdicts(results):
        assert found.text in text
    assert "among the first 100, of means" in text
    for known in ("nrefs:1|case:mixed|eff:no", "--run=runs/example", "jax 0.10.2", "evaluation.translation.method"):
        assert known in text


def test_languages_and_directions_of_text_are_marked(page):
    marked = {(a.get("lang"), a.get("dir")) for tag, a in page.elements if tag == "p" and "lang" in a}
    assert marked == {("de", "auto"), ("en", "auto"), ("ar", "auto"), ("zh", "auto")}


def test_what_users_give_is_escaped(results, tmp_path):
    evil = copy.deepcopy(results)
    evil["models"][1]["name"] = evil["models"][1]["path"] = evil["against_control"][0]["model"] = EVIL
    evil["models"][1]["translation"]["samples"][0]["output"] = EVIL
    evil["models"][1]["translation"]["notes"] = evil["sentences"]["file"] = evil["command"] = evil["machine"] = EVIL
    evil["models"][1]["translation"]["notes"] = [EVIL]
    evil["models"][1]["tasks"] = {EVIL: {"acc,none": [0.5, 0.1, True]}}
    evil["config"] = {EVIL: {"a": EVIL, "b": [EVIL]}}
    text = report.write(evil, tmp_path).read_text(encoding="utf-8")
    page = Page(text)
    assert "<script" not in text.lower() and "".join(page.texts).count(EVIL) > 20
    assert any(EVIL in attributes.get("aria-label", "") for tag, attributes in page.elements if tag == "svg")


def test_the_same_results_have_the_same_bytes_and_survive_json(results, path, tmp_path):
    again = report.write(json.loads(json.dumps(results)), tmp_path)
    assert again.read_bytes() == path.read_bytes()


def test_six_models_and_27_languages(tmp_path):
    results = results_example.build(models=6, languages=27, layers=3)
    page = Page(report.write(results, tmp_path).read_text(encoding="utf-8"))
    assert sum(tag == "svg" for tag, _ in page.elements) == 4 + 14 + 2 + 6 + 18 + 3 + 2


def test_a_telephone_scrolls_down_only(results, tmp_path):
    """The page says how wide it is, in frames of two widths: a window of Chromium cannot be that narrow."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs chromium on the PATH")
    long = copy.deepcopy(results)
    long["models"][1]["name"] = long["against_control"][0]["model"] = "/models/" + "long" * 30
    long["models"][1]["translation"]["samples"][0]["output"] = "x" * 400
    page = report.write(long, tmp_path)
    tell = "<script>parent.postMessage(`${innerWidth}:${document.documentElement.scrollWidth};`, '*')</script>"
    page.write_text(page.read_text(encoding="utf-8").replace("</body>", f"{tell}</body>"), encoding="utf-8")
    frame = "<iframe src=report.html width={} height=700 style='border: 0'></iframe>"
    (tmp_path / "frames.html").write_text(
        "<!doctype html><title></title><script>onmessage = e => document.title += e.data</script>"
        f"{frame.format(360)}{frame.format(390)}"
    )
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    flags += "--disable-component-update --disable-sync --virtual-time-budget=10000 --dump-dom"
    command = [chromium, *flags.split(), f"--user-data-dir={tmp_path / 'user'}", (tmp_path / "frames.html").as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    widths = {int(inner): int(scroll) for inner, scroll in re.findall(r"(\d+):(\d+);", dom)}
    assert set(widths) == {360, 390} and all(scroll <= inner for inner, scroll in widths.items())


def test_tensorboard_has_layers_pictures_and_tables(tmp_path):
    results = results_example.build(models=2, languages=3, layers=4)
    report.to_tensorboard(results, tmp_path)
    assert len(list(tmp_path.glob("**/events.out.tfevents.*"))) == 3
    model = EventAccumulator(str(tmp_path / "stage 1")).Reload()
    probe = [(event.step, event.value) for event in model.Scalars("layers/probe")]
    assert [step for step, _ in probe] == [0, 1, 2, 3, 4]
    assert [v for _, v in probe] == pytest.approx(results["models"][1]["alignment"]["language_probe"], abs=1e-6)
    board = EventAccumulator(str(tmp_path), size_guidance={"images": 0, "tensors": 0}).Reload()
    pictures = {"depth", "by-language", "matrix", "losses", "translation", "measures-1", "plane-0", "plane-1"}
    assert pictures <= set(board.Tags()["images"])
    table = board.Tensors("Models side by side/text_summary")[0].tensor_proto.string_val[0].decode()
    value = results["models"][1]["intervals"]["retrieval"]["mean"][0]
    assert table.startswith("|  | base model | stage 1 |") and f"{100 * value:.1f}% [" in table
    assert "verdict/stage 1 against base model/text_summary" in board.Tags()["tensors"]


def test_a_name_leads_no_events_out_of_the_folder(tmp_path):
    results = results_example.build(models=1, languages=2, layers=2)
    results["models"][0]["name"] = results["baseline"] = "../up"
    report.to_tensorboard(results, tmp_path / "board")
    assert [path.name for path in tmp_path.iterdir()] == ["board"]


def test_the_terminal_has_the_overview_and_takes_names_literally(results):
    odd = copy.deepcopy(results)
    odd["models"][1]["name"] = odd["against_control"][0]["model"] = "[red]x[/red]"
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(report.terminal_table(odd))
    text = console.export_text()
    before, now = (model["intervals"]["retrieval"]["mean"] for model in odd["models"][:2])
    change, low, high = odd["models"][1]["intervals"]["retrieval_change"]["mean"]
    assert "[red]x[/red]" in text and f"{100 * now[0]:.1f}% {100 * change:+.1f}" in text
    assert f"[{100 * before[1]:.1f}, {100 * before[2]:.1f}]" in text and f"[{100 * low:.1f}, {100 * high:.1f}]" in text
    assert "chrF++, English to others" in text and "Language probe, last layer" in text


def test_below_the_table_is_what_the_scores_were_made_with_and_what_is_in_doubt():
    results = results_example.build(models=2)
    assert report.terminal_notes(results) == [
        ("scores", "BLEU nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0"),
        ("scores", "chrF++ nrefs:1|case:mixed|eff:yes|nc:6|nw:2|space:no|version:2.6.0"),
        ("note", "The language identifier knows no Swahili; its off-target rate is left out."),
        ("note", "stage 2 was trained with another template."),
        *(("note", text) for text in verdict.warnings(results)),
    ]
    assert any("Hindi" in text for text in verdict.warnings(results))
