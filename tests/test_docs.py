"""Executes the code of README.md and docs/, and checks what else those pages name."""

from __future__ import annotations

import contextvars
import re
import shlex
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import typer.main
from mpcore.cli import app

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\S*)[^\n]*\n(?P<body>.*?)^(?P=indent)```", re.M | re.S
)
LANGUAGES = {"python", "bash", "text", "toml", "diff"}


class Block(NamedTuple):
    language: str
    line: int
    code: str


def blocks(page):
    text = page.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start("body"))
        yield Block(match["language"], line, textwrap.dedent(match["body"]))


def page_id(page):
    return str(page.relative_to(ROOT))


def run_page(page):
    """Runs a page's blocks in one namespace, in order; tracebacks name the page's own lines."""
    namespace = {"__name__": page.stem}
    for block in blocks(page):
        if block.language == "python":
            code = compile("\n" * block.line + block.code, str(page), "exec")
            exec(code, namespace)


#: What the page on trainers imports, and what these warn of, which is theirs.
TRAINERS = ("accelerate", "transformers", "lightning", "ignite", "keras")
WARNED = (
    "`isinstance.treespec, LeafSpec.` is deprecated",
    "The 'train_dataloader' does not have many workers",
    "CUDA is not available or torch_xla is imported",
    "__array__ implementation doesn't accept a copy keyword",
)
OF_TRAINERS = [pytest.mark.trainers, *(pytest.mark.filterwarnings(f"ignore:{w}") for w in WARNED)]
RUNNABLE = [
    pytest.param(page, marks=OF_TRAINERS if page.stem == "trainers" else []) for page in PAGES
]


@pytest.mark.parametrize("page", RUNNABLE, ids=page_id)
def test_page_code_runs_in_order(page, tmp_path, monkeypatch):
    for name in TRAINERS if page.stem == "trainers" else ():
        monkeypatch.setenv("KERAS_BACKEND", "torch")
        pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    # a context of its own, so that a page may set the global policy
    contextvars.copy_context().run(run_page, page)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_page_marks_every_block_with_a_known_language(page):
    assert {block.language for block in blocks(page)} <= LANGUAGES
    assert page.read_text(encoding="utf-8").count("```") == 2 * len(list(blocks(page)))


def make_targets():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z-]+):", makefile, re.M))


def shell_commands(page):
    for block in blocks(page):
        if block.language == "bash":
            for line in block.code.splitlines():
                words = shlex.split(line, comments=True)
                if words:
                    yield words


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_page_names_shell_commands_that_exist(page):
    program = typer.main.get_command(app)
    commands = {*program.commands, *(name for option in program.params for name in option.opts)}
    extras = set(re.findall(r"^(\w+) = \[", project_table("optional-dependencies"), re.M))
    for words in shell_commands(page):
        if words[0] == "make":
            assert words[1] in make_targets(), words
        elif words[0] == "mpcore":
            assert words[1] in commands, words
        elif words[:2] == ["pip", "install"]:
            named = re.search(r"\[(.*)\]", words[-1])
            assert not named or set(named[1].split(",")) <= extras, words
        else:
            assert words[0] in {"git", "cd"}, words


def project_table(name):
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return text.split(f"[project.{name}]\n")[1].split("\n[")[0]


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_page_names_only_tests_that_exist(page):
    named = set(re.findall(r"`(test_\w+)`", page.read_text(encoding="utf-8")))
    sources = "\n".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/**/*.py"))
    defined = set(re.findall(r"def (test_\w+)\(", sources))
    assert named <= defined


def test_readme_links_to_files_that_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = {target.split("#")[0] for target in re.findall(r"\]\(([^)]+)\)", text)}
    missing = {t for t in targets if t and "://" not in t and not (ROOT / t).exists()}
    assert targets
    assert missing == set()
