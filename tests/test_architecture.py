"""The shape of the house: import directions, sizes, exported names."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import upweight

ROOT = Path(upweight.__file__).parent
REPOSITORY = ROOT.parent.parent
FILES = sorted(ROOT.rglob("*.py"))

# Low to high: a module imports from its own layer's package or from lower ones only.
LAYERS = [
    {"errors", "forms"},
    {"packages", "bars", "fingerprints", "sources", "budget", "noise"},
    {"tables", "probes", "parameters", "precision", "states", "refusals"},
    {"store", "data", "losses", "kernels", "report", "reference"},
    {"criteria"},
    {"objective"},
    {"checks"},
    {"risk", "meaning", "guard", "sinks"},
    {"linalg"},
    {"keepers"},
    {"gradients"},
    {"curvature"},
    {"solvers", "projections"},
    {"engine", "scores", "audits", "damping", "factors"},
    {"evaluation", "exports", "trainers"},
    {"retraining"},
    {"weighing", "neighbours", "newton", "outcomes"},
    {"bm25"},
    {"methods"},
    {"answers"},
    {"prepared", "baselines", "changes", "groups", "l2"},
    {"validation", "explanation", "plan", "derivatives", "evidence", "calibration"},
    {"tuning", "whatifs"},
    {"front"},
    {"onecall", "attacks", "ensemble"},
    {"recipe"},
    {"study"},
    {"demo"},
    {"cli"},
]


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0]


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = (
                [node.module]
                if node.module != "upweight"
                else [f"upweight.{alias.name}" for alias in node.names]
            )
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("upweight.")}
    return found


def level(module: str) -> int:
    return next(i for i, layer in enumerate(LAYERS) if module in layer)


def modules() -> list[Path]:
    return [path for path in FILES if path.name != "__init__.py" or path.parent != ROOT]


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    own = module_of(path)
    for other in imports(path) - {own, "__version__"}:
        assert level(other) < level(own), f"{own} imports {other}, which does not lie below it"


def test_every_module_has_a_layer_and_every_layer_a_module():
    found = {module_of(path) for path in modules()}
    known = set().union(*LAYERS)
    assert found == known


def test_no_cycles_inside_packages():
    graph: dict[str, set[str]] = {}
    for path in FILES:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if name.endswith("__init__"):
            continue
        nodes = ast.walk(ast.parse(path.read_text()))
        graph[name] = {
            node.module.removeprefix("upweight.")
            for node in nodes
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("upweight.")
        }
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, f"cycle: {' -> '.join((*above, name))}"
        if name not in done:
            for other in graph.get(name, ()):
                visit(other, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def functions(tree):
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def body_lines(node) -> int:
    first = node.body[0]
    documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    start = node.body[1].lineno if documented and len(node.body) > 1 else first.lineno
    return node.end_lineno - start + 1


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_sizes_and_signatures(path):
    text = path.read_text()
    assert text.count("\n") <= 400
    for node in functions(ast.parse(text)):
        where = f"{path.name}:{node.name}"
        assert body_lines(node) <= 60, where
        arguments = [a.arg for a in node.args.posonlyargs + node.args.args]
        positional = [a for a in arguments if a not in ("self", "cls")]
        assert len(positional) + len(node.args.kwonlyargs) <= 6, where
        kwarg = node.args.kwarg
        # A decorator's are typed: those of the function it wraps, by a ParamSpec.
        typed = kwarg is not None and ast.unparse(kwarg.annotation).endswith(".kwargs")
        assert kwarg is None or typed, f"{where} passes **kwargs through"
        for inner in ast.walk(node):
            assert not isinstance(inner, (ast.Import, ast.ImportFrom)), f"import inside {where}"
        if not node.name.startswith("_") and node.args.kwonlyargs:
            assert len(positional) <= 3, f"{where}: keyword-only after three"


def code_lines(path: Path) -> int:
    """Lines that are neither blank, nor comment, nor docstring."""
    documented = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            documented |= set(range(node.lineno, node.end_lineno + 1))
    lines = enumerate(path.read_text().splitlines(), 1)
    return sum(
        bool(line.strip()) and not line.strip().startswith("#") and i not in documented
        for i, line in lines
    )


# From losses to scores: what computes the numbers. The rest reads data, asks, compares, shows.
CORE = {
    *("parameters", "losses", "objective", "risk", "meaning", "linalg", "gradients", "curvature"),
    "engine",
}
# What rows of the table add to it, each by itself.
ROWS = {"solvers", "projections", "weighing", "methods"}


@pytest.mark.parametrize(("names", "limit"), [(CORE, 5000), (ROWS, 2200)], ids=["core", "rows"])
def test_what_computes_numbers_stays_small(names, limit):
    lines = sum(code_lines(path) for path in FILES if module_of(path) in names)
    assert lines <= limit, lines


def test_classes_are_abstract_or_final():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ClassDef):
                continue
            bases = {ast.unparse(base) for base in node.bases}
            decorators = {ast.unparse(d) for d in node.decorator_list}
            abstract = any("abstractmethod" in ast.unparse(item) for item in node.body)
            allowed = "Error" in node.name or bases & {"StrEnum", "Protocol", "ABC"}
            assert "final" in decorators or abstract or allowed, f"{path.name}:{node.name}"


def test_exported_names_are_reachable_and_no_others():
    assert sorted(upweight.__all__) == sorted(
        {name for names in upweight._HOMES.values() for name in names} | {"__version__"}
    )
    for name in upweight.__all__:
        assert getattr(upweight, name) is not None
    with pytest.raises(AttributeError):
        _ = upweight.nothing_of_the_kind


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_all_lists_what_a_module_defines(path):
    name = ".".join(("upweight", *path.relative_to(ROOT).with_suffix("").parts))
    module = importlib.import_module(name.removesuffix(".__init__"))
    for exported in getattr(module, "__all__", []):
        value = getattr(module, exported)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__doc__, f"{name}.{exported} has no docstring"


def test_importing_the_package_does_not_import_torch():
    code = "import sys, upweight; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nothing_is_unpickled():
    for path in FILES:
        text = path.read_text()
        assert "pickle.load" not in text
        assert "allow_pickle=True" not in text
        assert not re.search(r"torch\.load\((?!.*weights_only=True)", text)


def test_no_file_names_this_machine():
    listed = subprocess.run(
        ["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    private = re.compile(r"(?<![\w.])/(?:wo" + r"rk|root|home)/")
    for name in listed.stdout.splitlines():
        path = REPOSITORY / name
        if (
            path.suffix in {".py", ".md", ".toml", ".json", ".txt", ".sh", ".j2", ""}
            and path.is_file()
        ):
            assert not private.search(path.read_text(errors="ignore")), name
