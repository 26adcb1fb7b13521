"""What may import what: rooms in layers, of which each knows those below it, and no circles."""

import ast
import functools
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
LAYERS = (
    {"run"},
    {"stages", "command_line"},
    {"evaluation", "planning", "training", "runs", "losses", "sample"},
    {"data", "models", "objectives"},
    {"sharding", "hosts", "config_files"},
    {"batch", "config", "console", "storage"},
    {"exits"},
)
NEVER = {  # beside what the layers say
    "objectives": {"data", "models", "config"},
    "models": {"data", "objectives"},
    "data": {"models", "objectives", "sharding", "hosts"},
    "training": {"evaluation"},
    "runs": {"evaluation", "planning"},
    "planning": {"evaluation"},
}
LAYER = {room: number for number, rooms in enumerate(LAYERS) for room in rooms}
MODULES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
    for file in [ROOT / "run.py", *ROOT.glob("alignx_jax/**/*.py")]
}


def room(module: str) -> str:
    return module.removeprefix("alignx_jax.").partition(".")[0]


@functools.cache
def tree(file: pathlib.Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


@functools.cache
def imports(module: str) -> set[str]:
    """The project's modules that it imports, also within functions; not those for its annotations alone."""
    nodes = list(ast.walk(tree(MODULES[module])))
    typing = {
        id(node)
        for test in nodes
        if isinstance(test, ast.If) and "TYPE_CHECKING" in ast.unparse(test.test)
        for node in ast.walk(test)
    }
    found = set()
    for node in nodes:
        if id(node) in typing:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "alignx_jax":
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in MODULES}
    return found - {module}


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {"alignx_jax"}))
def test_nothing_imports_upward(module):
    here = room(module)
    for other in map(room, imports(module)):
        assert LAYER[other] >= LAYER[here], f"{module} imports {other}, which is above it"
        assert other not in NEVER.get(here, ()), f"{module} imports {other}"


@pytest.mark.parametrize("module", sorted(module for module in MODULES if module.startswith("alignx_jax.evaluation.")))
def test_what_measures_and_what_shows_meet_in_rows(module):
    """Nothing that shows knows how a number was measured, nothing that measures how it is shown."""
    other = {"measure": "show", "show": "measure"}.get(module.split(".")[2], "show")
    assert not [name for name in imports(module) if name.startswith(f"alignx_jax.evaluation.{other}.")]


OURS = [ROOT / name for name in ("alignx_jax", "benchmarks", "tests")]


@functools.cache
def names(module: pathlib.Path) -> set[str]:
    """What can be imported from a module, or from a folder of modules."""
    found = {path.stem for path in module.iterdir()} if module.is_dir() else set()
    file = module / "__init__.py" if module.is_dir() else module.with_suffix(".py")
    for node in ast.walk(tree(file)) if file.is_file() else ():
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


@pytest.mark.parametrize(
    "file",
    [ROOT / "run.py", *sorted(path for folder in OURS for path in folder.rglob("*.py"))],
    ids=lambda file: str(file.relative_to(ROOT)),
)
def test_every_import_leads_somewhere(file):
    """Those within functions too, which are not met before the function is called."""
    for node in ast.walk(tree(file)):
        module = ROOT.joinpath(*(node.module or "").split(".")) if isinstance(node, ast.ImportFrom) else ROOT
        if any(module.is_relative_to(folder) for folder in OURS):
            missing = {alias.name for alias in node.names} - names(module)
            assert not missing, f"{node.module} has no {', '.join(sorted(missing))}"


def test_there_are_no_circles():
    graph = {module: imports(module) for module in MODULES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path, module])
        if module not in done:
            for other in graph[module]:
                visit(other, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_every_room_is_in_the_picture():
    """That of CONTRIBUTING.md, top to bottom."""
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## What may import what")[1].split("```")[1]
    lines = [line.strip() for line in page.strip().splitlines()]
    assert [set(line.removesuffix("->").replace(",", " ").replace("run.py", "run").split()) for line in lines] == [
        *map(set, LAYERS)
    ]
