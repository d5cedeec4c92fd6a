"""What the packages import, ship and declare, and the house rules that a parser can check."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import mpcore
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
ENGINE = sorted((ROOT / "mpcore").rglob("*.py"))
KERNELS = sorted((ROOT / "kernels" / "mpcore_kernels").rglob("*.py"))
AUDIT = sorted((ROOT / "kernels" / "mpcore_audit").rglob("*.py"))
# the command line, its demo, benchmark and pages are an application on top of the library: they may
# print, and need an extra
APPLICATION = [
    p
    for p in ENGINE
    if p.relative_to(ROOT / "mpcore").parts[0] in {"cli", "demo", "bench", "report"}
]
LIBRARY = [path for path in ENGINE if path not in APPLICATION]
# each is imported by those alone who have the package of its name
INTEGRATIONS = sorted((ROOT / "mpcore" / "integrations").glob("[!_]*.py"))
LONGEST_FILE = 350
LONGEST_FUNCTION = 50


def short(path):
    return str(path.relative_to(ROOT))


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported(nodes):
    """The top-level names of the packages that `nodes` import."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


def at_import_time(node):
    """Yields the nodes that run when the module is imported: not function bodies, not typing."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            continue
        yield child
        yield from at_import_time(child)


def modules_after(*statements):
    """The modules that are there after each of some statements, in one process."""
    code = "import sys\n" + "".join(f"{each}\nprint(*sys.modules)\n" for each in statements)
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    return [set(line.split()) for line in run.stdout.splitlines()]


def test_import_mpcore_loads_nothing_but_torch_and_the_standard_library():
    before, after = modules_after("import torch", "import mpcore")
    foreign = {name.split(".")[0] for name in after - before} - set(sys.stdlib_module_names)
    assert foreign == {"mpcore", "torch"} & foreign
    assert "mpcore" in foreign
    assert not {"triton", "typer", "rich", "matplotlib", "mpcore.integrations"} & after


@pytest.mark.parametrize("path", LIBRARY, ids=short)
def test_library_module_imports_only_torch_and_the_standard_library(path):
    allowed = {"mpcore", "torch", *sys.stdlib_module_names}
    allowed |= {path.stem} if path in INTEGRATIONS else set()
    assert imported(at_import_time(tree(path))) <= allowed


@pytest.mark.parametrize("path", ENGINE, ids=short)
def test_engine_reaches_the_kernels_only_from_backends_and_lazily(path):
    module = tree(path)
    nodes = list(ast.walk(module))
    strings = {n.value.split(".")[0] for n in nodes if is_module_name(n)}
    reaches = "mpcore_kernels" in imported(nodes) | strings
    assert not reaches or short(path).startswith("mpcore/backends/")
    assert not {"mpcore_kernels", "triton"} & imported(at_import_time(module))


def is_module_name(node):
    return (
        isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and re.fullmatch(r"[\w.]+", node.value) is not None
    )


@pytest.mark.parametrize("path", [*KERNELS, *AUDIT], ids=short)
def test_kernels_never_import_the_engine(path):
    assert "mpcore" not in imported(ast.walk(tree(path)))


@pytest.mark.parametrize("path", [*ENGINE, *KERNELS], ids=short)
def test_nothing_that_ships_knows_the_audit(path):
    nodes = list(ast.walk(tree(path)))
    strings = {n.value.split(".")[0] for n in nodes if is_module_name(n)}
    assert "mpcore_audit" not in imported(nodes) | strings


def test_a_wheel_is_made_of_what_ships():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    wheel = text[text.index("[tool.hatch.build.targets.wheel]") :]
    packages = re.search(r"^packages = (.*)$", wheel, re.M)[1]
    assert ast.literal_eval(packages) == ["mpcore", "kernels/mpcore_kernels"]


@pytest.mark.parametrize("path", ENGINE, ids=short)
def test_engine_takes_nothing_from_environment_variables(path):
    names = {getattr(node, "attr", getattr(node, "id", "")) for node in ast.walk(tree(path))}
    assert not {"environ", "getenv", "putenv"} & names


@pytest.mark.parametrize("path", [*LIBRARY, *KERNELS, *AUDIT], ids=short)
def test_library_code_has_no_assert_print_or_global(path):
    nodes = list(ast.walk(tree(path)))
    assert not [node.lineno for node in nodes if isinstance(node, (ast.Assert, ast.Global))]
    if (
        short(path) == "kernels/mpcore_audit/command.py"
    ):  # a program, whose output is what it prints
        return
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    assert not [c.lineno for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"]


@pytest.mark.parametrize(
    "path", [*ENGINE, *KERNELS, *AUDIT, *sorted(ROOT.glob("tests/**/*.py"))], ids=short
)
def test_source_file_is_short_enough_to_read(path):
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= LONGEST_FILE
    functions = [n for n in ast.walk(tree(path)) if isinstance(n, ast.FunctionDef)]
    # docstrings explain; only the code counts
    sizes = [(n.name, n.end_lineno - n.lineno + 1 - docstring_lines(n)) for n in functions]
    assert [(name, size) for name, size in sizes if size >= LONGEST_FUNCTION] == []


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "two_dimensions"])
def test_script_of_a_layout_is_read_at_a_glance(name):
    assert len((ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8").splitlines()) < 60


@pytest.mark.parametrize("path", [*ENGINE, *KERNELS, *AUDIT], ids=short)
def test_calls_say_what_their_arguments_are(path):
    calls = [node for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]
    long = [f"line {call.lineno}: {ast.unparse(call)}" for call in calls if has_a_long_list(call)]
    assert long == []


def has_a_long_list(call):
    """Whether a call has more than six positional arguments, or pieces them together with stars."""
    starred = [each.value for each in call.args if isinstance(each, ast.Starred)]
    displays = [value for value in starred if isinstance(value, (ast.Tuple, ast.List))]
    return len(call.args) > 6 or len(starred) > 1 or displays != []


@pytest.mark.parametrize(
    ("call", "long"),
    [
        ("f(a, b, c, d, e, g, key=h)", False),
        ("f(a, *rest, key=b)", False),
        ("f([*a, *b], (*c, *d))", False),
        ("f(a, b, c, d, e, g, h)", True),
        ("f(*first, *rest)", True),
        ("f(*(a, b), key=c)", True),
        ("f(a, *[b, c])", True),
    ],
)
def test_a_long_list_of_arguments_is_told(call, long):
    assert has_a_long_list(ast.parse(call).body[0].value) == long


def docstring_lines(node):
    return len((ast.get_docstring(node, clean=False) or "").splitlines())


def test_tests_hold_no_packages_that_could_shadow_an_import():
    assert list((ROOT / "tests").glob("**/__init__.py")) == []
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_both_packages_are_marked_as_typed():
    assert (ROOT / "mpcore" / "py.typed").is_file()
    assert (ROOT / "kernels" / "mpcore_kernels" / "py.typed").is_file()


def test_core_depends_on_torch_alone():
    core = [r for r in map(Requirement, metadata.requires("mpcore")) if r.marker is None]
    assert [requirement.name for requirement in core] == ["torch"]


def test_every_foreign_import_is_declared_by_the_package_or_an_extra():
    names = {
        name for path in [*ENGINE, *KERNELS, *AUDIT] for name in imported(ast.walk(tree(path)))
    }
    foreign = names - {"mpcore", "mpcore_kernels", "mpcore_audit", *sys.stdlib_module_names}
    provided = metadata.packages_distributions()
    # what is not installed here has the name of its distribution
    providers = {
        name: {canonicalize_name(d) for d in provided.get(name, [name])} for name in foreign
    }
    declared = {canonicalize_name(Requirement(r).name) for r in metadata.requires("mpcore")}
    assert foreign >= {"torch", "triton", "typer"}
    assert {name for name in foreign if not providers[name] & declared} == set()


def test_constraints_pin_every_declared_requirement():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    pinned = {canonicalize_name(pin.name) for pin in pins}
    assert {canonicalize_name(Requirement(r).name) for r in metadata.requires("mpcore")} <= pinned
    assert all(re.fullmatch(r"==[\w.]+", str(pin.specifier)) for pin in pins)


def test_no_project_file_names_a_package_index():
    names = ["Makefile", "constraints.txt", "pyproject.toml", ".ci/run", "README.md"]
    text = "\n".join((ROOT / name).read_text(encoding="utf-8") for name in names)
    assert not re.search(r"index-url|find-links|trusted-host", text)


def test_version_is_the_same_in_metadata_and_changelog():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## \[([\d.]+)\]", changelog, re.M)[1]
    assert metadata.version("mpcore") == newest
    assert mpcore.__version__ == newest
