"""The page: whole, self-contained, escaped, as wide as a telephone; TensorBoard data and the terminal's table."""

import dataclasses
import html.parser
import io
import re
import shutil
import subprocess

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from alignx_jax.evaluation import rows
from alignx_jax.evaluation.show import report, verdict
from tests.evaluation import examples

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
    return examples.results(models=3, languages=5, layers=4)


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
    results = examples.results(models=1, languages=2, layers=2)
    metrics = {row.measure for row in results.rows if row.direction and row.layer is None}
    results = examples.without(results, *metrics, *examples.OF_TEXT, *examples.TASKS, "tasks")
    results = dataclasses.replace(examples.with_model(results, 0, projection=[]), translation=None)
    page = Page(report.write(results, tmp_path).read_text(encoding="utf-8"))
    found = [attributes["id"] for tag, attributes in page.elements if tag == "h2"]
    assert found == ["verdict", "models", "depth", "measures", "by_language", "matrix", "definitions", "about"]
    assert {f"#{section}" for section in found} == {
        a["href"] for t, a in page.elements if t == "a" and "#" in a["href"]
    }
    assert "".join(page.texts).count("+0") == 0  # no changes


def test_the_numbers_of_the_page_are_those_of_the_results(results, page):
    text = re.sub(r"\s+", " ", "".join(page.texts)).replace("−", "-")
    shown = 0
    for row in results.rows:
        change = row.against == results.baseline and row.layer in (None, 2)
        if row.measure == "chrF++" and row.against is None:
            assert f"{row.value:.1f} [{row.low:.1f}, {row.high:.1f}]" in text, row
        elif row.measure == "bits_per_byte" and row.against is None:
            assert f"{row.value:.3f} [{row.low:.3f}, {row.high:.3f}]" in text, row
        elif row.measure == "retrieval" and change and row[3:5] == (None, None):
            assert f"{100 * row.value:+.1f} [{100 * row.low:.1f}, {100 * row.high:.1f}]" in text, row
        else:
            continue
        shown += 1
    assert shown == 3 * 10 + 3 * 6 + 2
    for found in verdict.verdicts(results):
        assert found.text in text
    assert "among the first 546, of means" in text
    for known in ("nrefs:1|tok:13a", "--run=runs/example", "jax 0.10.2", "evaluation.sentences"):
        assert known in text


def test_languages_and_directions_of_text_are_marked(page):
    marked = {(a.get("lang"), a.get("dir")) for tag, a in page.elements if tag == "p" and "lang" in a}
    assert marked == {("de", "auto"), ("en", "auto"), ("ar", "auto"), ("zh", "auto")}


def test_what_users_give_is_escaped(results, tmp_path):
    name = results.models[1].name
    evil = examples.with_model(results, 1, name=EVIL, path=EVIL)
    made = results.translation
    samples = [dataclasses.replace(sample, outputs={EVIL: EVIL}) for sample in made.samples]
    evil = dataclasses.replace(
        evil,
        controls=[(EVIL, control) for _, control in results.controls],
        rows=[row._replace(model=EVIL) if row.model == name else row for row in results.rows],
        translation=dataclasses.replace(made, notes=[EVIL], samples=samples),
        sentences=dataclasses.replace(results.sentences, file=EVIL),
        command=EVIL,
        machine=EVIL,
        tasks={f"tasks/{EVIL}/acc,none": True},
        config={EVIL: {"a": EVIL, "b": [EVIL]}},
    )
    evil = examples.put(evil, 1, f"tasks/{EVIL}/acc,none", 0.5)
    text = report.write(evil, tmp_path).read_text(encoding="utf-8")
    page = Page(text)
    assert "<script" not in text.lower() and "".join(page.texts).count(EVIL) > 20
    assert any(EVIL in attributes.get("aria-label", "") for tag, attributes in page.elements if tag == "svg")


def test_the_same_results_have_the_same_bytes_and_survive_json(results, path, tmp_path):
    again = report.write(rows.from_json(results.to_json().encode()), tmp_path)
    assert again.read_bytes() == path.read_bytes()


def test_six_models_and_27_languages(tmp_path):
    results = examples.results(models=6, languages=27, layers=3)
    page = Page(report.write(results, tmp_path).read_text(encoding="utf-8"))
    assert sum(tag == "svg" for tag, _ in page.elements) == 4 + 14 + 2 + 6 + 18 + 3 + 2


def test_a_telephone_scrolls_down_only(results, tmp_path):
    """The page says how wide it is, in frames of two widths: a window of Chromium cannot be that narrow."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs chromium on the PATH")
    name = results.models[1].name
    text = results.to_json().replace(f'"{name}"', f'"/models/{"long" * 30}"').replace('"Last week"', f'"{"x" * 400}"')
    long = rows.from_json(text.encode())
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
    results = examples.results(models=2, languages=3, layers=4)
    report.to_tensorboard(results, tmp_path)
    assert len(list(tmp_path.glob("**/events.out.tfevents.*"))) == 3
    model = EventAccumulator(str(tmp_path / "stage 1")).Reload()
    probe = [(event.step, event.value) for event in model.Scalars("layers/language_probe")]
    assert [step for step, _ in probe] == [0, 1, 2, 3, 4]
    assert [v for _, v in probe] == pytest.approx(results.curve(results.models[1], "language_probe"), abs=1e-6)
    board = EventAccumulator(str(tmp_path), size_guidance={"images": 0, "tensors": 0}).Reload()
    pictures = {"depth", "by-language", "matrix", "losses", "translation", "measures-1", "plane-0", "plane-1"}
    assert pictures <= set(board.Tags()["images"])
    table = board.Tensors("Models side by side/text_summary")[0].tensor_proto.string_val[0].decode()
    value = results.find(results.models[1], "retrieval", "aligned").value
    assert table.startswith("|  | base model | stage 1 |") and f"{100 * value:.1f}% [" in table
    assert "verdict/stage 1 against base model/text_summary" in board.Tags()["tensors"]


def test_a_name_leads_no_events_out_of_the_folder(tmp_path):
    text = examples.results(models=1, languages=2, layers=2).to_json().replace('"base model"', '"../up"')
    results = rows.from_json(text.encode())
    report.to_tensorboard(results, tmp_path / "board")
    assert [path.name for path in tmp_path.iterdir()] == ["board"]


def test_the_terminal_has_the_overview_and_takes_names_literally(results):
    odd = rows.from_json(results.to_json().replace('"stage 1"', '"[red]x[/red]"').encode())
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(report.terminal_table(odd))
    text = console.export_text()
    before, now = (odd.find(model, "retrieval", "aligned") for model in odd.models[:2])
    change = odd.find(odd.models[1], "retrieval", "aligned", against=odd.base)
    assert "[red]x[/red]" in text and f"{100 * now.value:.1f}% {100 * change.value:+.1f}" in text
    assert f"[{100 * before.low:.1f}, {100 * before.high:.1f}]" in text
    assert f"[{100 * change.low:.1f}, {100 * change.high:.1f}]" in text
    assert "chrF++, English to others" in text and "Language probe, last layer" in text


def test_below_the_table_is_what_the_scores_were_made_with_and_what_is_in_doubt():
    results = examples.put(examples.results(models=2), 0, "unknown_rate", 0.25, language="es")
    assert report.terminal_notes(results) == [
        ("scores", "BLEU nrefs:1|tok:13a|version:2.6.0"),
        ("scores", "chrF++ nrefs:1|nc:6|nw:2|version:2.6.0"),
        ("note", "The language identifier knows no Swahili; its off-target rate is left out."),
        ("note", "stage 2 was trained with another template."),
        *(("note", text) for text in verdict.warnings(results)),
    ]
    assert any("Spanish" in text for text in verdict.warnings(results))
