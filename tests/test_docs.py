"""What the documentation names is there: flags, configurations, files, sections."""

import dataclasses
import pathlib
import re
import shlex
from collections.abc import Iterator

import pytest
import yaml

from alignx_jax import command_line
from alignx_jax.config import Config

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("dev/*.md")])
FILES = [*PAGES, *sorted([*ROOT.glob("configs/*.py"), *ROOT.glob("deploy/*.*"), ROOT / "run.py"])]
YOURS = re.compile(r"configs/my_\w+\.py")
"""A configuration that a reader is to write."""


def flags(settings: type, prefix: str = "") -> Iterator[str]:
    """The program's flags: its settings are nothing else."""
    for field in dataclasses.fields(settings):
        name = prefix + field.name.replace("_", "-")
        default = field.default
        yield from flags(type(default), f"{name}.") if dataclasses.is_dataclass(default) else [f"--{name}"]


FLAGS = {*flags(Config), "--config", "--help"}


def commands(text: str) -> Iterator[list[str]]:
    """Arguments of the program in blocks, in backquotes, and in comments of files."""
    text = re.sub(r"\s*\\\n#?\s*", " ", text)
    program = r"(?:python (?:/opt/alignx_jax/)?run\.py|sbatch deploy/slurm\.sbatch|docker run [^\n]*-jax:\w+)"
    for found in re.finditer(program + r" (--[^`\n|'#&;]*)", text):
        yield shlex.split(found.group(1).split("     ")[0])


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_commands_are_understood(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    for arguments in commands(file.read_text(encoding="utf-8")):
        if arguments != ["--help"]:
            mended = [YOURS.sub("configs/llama3_8b_opus100.py", one) for one in arguments if one != "..."]
            command_line.parse([one.replace("/opt/alignx_jax/", "").replace("$i", "0") for one in mended])


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_flags_with_a_dot_are_flags(file):
    named = set(
        re.findall(r"(?<![\w-])--[a-z]+(?:[.-][a-z0-9-]+)*\.[a-z0-9-]+(?<!-)", file.read_text(encoding="utf-8"))
    )
    groups = {flag.rpartition(".")[0] for flag in FLAGS}
    assert not named - FLAGS - groups, sorted(named - FLAGS - groups)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://", "#")):
            continue
        name, _, section = target.partition("#")
        assert (page.parent / name).exists(), f"{page.name}: {target}"
        if section:
            headings = re.findall(r"^#+ (.*)$", (page.parent / name).read_text(encoding="utf-8"), flags=re.MULTILINE)
            slugs = {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}
            assert section in slugs, f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_tests_that_are_named_are_there(page):
    """By their file, or their function; of a long name the beginning, and three dots."""
    files = {f"/{file.relative_to(ROOT)}": file.read_text(encoding="utf-8") for file in ROOT.glob("tests/**/test_*.py")}
    functions = set(re.findall(r"^def (test_\w+)", "\n".join(files.values()), flags=re.MULTILINE))
    for folder, name, end in re.findall(r"([\w/]*)\b(test_\w+)(\.py|\.\.\.)?", page.read_text(encoding="utf-8")):
        if end == ".py":
            assert any(file.endswith(f"/{folder}{name}.py") for file in files), f"{folder}{name}.py"
        else:
            assert any(one.startswith(name) if end else one == name for one in functions), name


def test_every_page_is_in_the_site():
    def pages(entries) -> Iterator[str]:
        for entry in entries:
            (value,) = entry.values()
            yield from [value] if isinstance(value, str) else pages(value)

    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert set(pages(site["nav"])) == {page.name for page in ROOT.glob("docs/*.md")}
