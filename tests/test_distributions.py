"""What strangers get before the first import: tags of wheels, links, addresses, pictures."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
import typing
import xml.etree.ElementTree as xml
from importlib import metadata
from pathlib import Path

import mpcore
import pytest
import torch
from mpcore.backends import NAMES
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PICTURES = sorted((ROOT / "docs" / "pictures").glob("*.svg"))
BUILD = runpy.run_path(str(ROOT / "hatch_build.py"))


@pytest.mark.parametrize(
    ("system", "machine", "macos", "tag"),
    [
        ("linux", "x86_64", "", "linux_x86_64"),
        ("linux", "aarch64", "", "linux_aarch64"),
        ("darwin", "arm64", "15.1", "macosx_15_0_arm64"),
        ("darwin", "x86_64", "11.7.10", "macosx_11_0_x86_64"),
        ("darwin", "x86_64", "10.15", None),  # its tags have other rules, and nobody has it
        ("darwin", "arm64", "", None),
        ("win32", "AMD64", "", None),
        ("emscripten", "wasm32", "", None),
    ],
)
def test_a_wheel_with_a_library_is_for_where_the_library_loads(system, machine, macos, tag):
    assert BUILD["platform_tag"](system, machine, macos) == tag


def repository():
    """The address that the package's metadata names; an older installation's would be another."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return re.search(r'^Repository = "(.*)"$', text, re.M)[1]


def test_the_description_of_the_package_links_to_no_file_beside_it():
    text = BUILD["absolute_links"](README, repository())
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert [target for target in targets if not re.match(r"https://|#", target)] == []
    assert "![Training loss" in text
    assert f"({repository()}/raw/main/docs/pictures/loss.svg)" in text
    assert f"({repository()}/blob/main/docs/design.md#invariants)" in text


def test_the_installed_package_describes_itself_with_those_links():
    described = metadata.metadata("mpcore")
    urls = dict(entry.split(", ", 1) for entry in described.get_all("Project-URL"))
    assert urls["Repository"] == repository()
    assert {"Documentation", "Changelog", "Issues"} <= urls.keys()
    assert all(url.startswith(repository()) for url in urls.values())
    assert f"({repository()}/raw/main/docs/pictures/overflow.svg)" in str(described.get_payload())


def test_the_repository_has_one_address():
    host = repository().split("/")[2]
    others = ("mkdocs.yml", "CONTRIBUTING.md", "SECURITY.md", "CITATION.cff")
    for path in [*PAGES, *(ROOT / name for name in others)]:
        text = path.read_text(encoding="utf-8")
        found = set(re.findall(rf"https://{host}/[\w-]+", text))
        assert found <= {repository()}, path
    mkdocs = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert f"\nrepo_url: {repository()}\n" in mkdocs


def test_the_citation_is_of_this_version():
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    citation = dict(re.findall(r'^([\w-]+): "?([^"\n]+)"?$', text, re.M))
    assert citation["version"] == metadata.version("mpcore")
    assert citation["repository-code"] == repository()
    assert citation["license"] == metadata.metadata("mpcore")["License-Expression"]
    assert {"cff-version", "message", "title", "type"} <= citation.keys()
    assert "\nauthors:\n  - name: " in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_nobody_is_told_to_install_what_no_index_has(page):
    text = page.read_text(encoding="utf-8")
    commands = re.findall(r"^pip install .*$", text, re.M)
    wrong = [
        line for line in commands if re.match(r'pip install "?mpcore(\[\w+\])?"?\s*(#|$)', line)
    ]
    assert wrong == []


@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.name)
def test_a_picture_is_small_and_fetches_nothing(path):
    text = path.read_text(encoding="utf-8")
    root = xml.fromstring(text)
    assert root.attrib["aria-label"]
    assert root.attrib["width"]
    assert f"](docs/pictures/{path.name})" in README
    assert len(text) < 100_000
    addresses = set(re.findall(r'="(https?:[^"]*)"', text))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "<script" not in text


def test_the_picture_of_a_report_is_what_a_monitor_says_today():
    pictures = runpy.run_path(str(ROOT / ".ci" / "pictures.py"))
    text = (ROOT / "docs" / "pictures" / "overflow.svg").read_text(encoding="utf-8")
    today, drawn = pictures["spike"](), xml.fromstring(text).attrib["aria-label"]

    def words(report):
        # the last digits belong to the processor; attributes have no line ends
        return re.sub(r"\d[\d.e+]*", "N", report).split()

    assert "A spike: the loss was" in today
    assert words(drawn) == words(today)


def test_a_row_of_versions_replaces_that_of_the_same_versions():
    compat = runpy.run_path(str(ROOT / ".ci" / "compat.py"))
    page = "Before.\n\n" + compat["BEGIN"] + "\nAfter.\n"
    first = "| 3.11.7 | 2.13.0+cpu | 3.9.0 | 1 | 0 | then |"
    other = "| 3.11.7 | 2.13.0+cpu | 3.8.0 | 1 | 0 | then |"
    page = compat["with_row"](compat["with_row"](page, first), other)
    again = compat["with_row"](page, first.replace("then", "now"))
    rows = again.split(compat["BEGIN"])[1].split("\n\n")[0].splitlines()
    assert rows == [other, first.replace("then", "now")]
    assert again.startswith("Before.")
    assert again.endswith("now |\n\nAfter.\n")
    assert compat["BEGIN"] in compat["PAGE"].read_text(encoding="utf-8")
    assert all((ROOT / name).is_file() for name in compat["FILES"])


def test_the_oldest_torch_that_is_promised_was_run():
    (needed,) = [Requirement(r) for r in metadata.requires("mpcore") if "extra" not in r]
    (bound,) = needed.specifier
    table = (ROOT / "docs" / "versions.md").read_text(encoding="utf-8")
    run = [Version(v).release for v in re.findall(r"^\| 3[\d.]+ \| ([\d.]+)", table, re.M)]
    assert bound.operator == ">="
    assert min(run)[:2] == Version(bound.version).release


def typed(line, home):
    """What bash gets for a half-written command line."""
    words = line.split(" ")
    asked = {
        "_MPCORE_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words) - 1),
        "HOME": str(home),
    }
    done = run_mpcore([], asked)
    return done.stdout.split()


def run_mpcore(arguments, environment):
    return subprocess.run(
        [sys.executable, "-m", "mpcore", *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )


def test_a_shell_completes_commands_and_options_after_completion_was_installed(tmp_path):
    named = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1", "HOME": str(tmp_path)}
    said = run_mpcore(["--install-completion", "bash"], named).stdout
    script = tmp_path / ".bash_completions" / "mpcore.sh"
    assert str(script) in said
    assert "complete_bash" in script.read_text(encoding="utf-8")
    assert str(script) in (tmp_path / ".bashrc").read_text(encoding="utf-8")
    assert typed("mpcore doc", tmp_path) == ["doctor"]
    assert typed("mpcore doctor --js", tmp_path) == ["--json"]


def test_type_checkers_know_every_word_that_the_optimizer_takes():
    hints = typing.get_type_hints(mpcore.MixedPrecisionOptimizer.__init__)
    param = torch.nn.Parameter(torch.ones(2))
    assert sorted(typing.get_args(hints["backend"])) == sorted(NAMES)
    for option in ("path", "on_weight_edit"):
        words = typing.get_args(hints[option])
        assert len(words) == 3
        for word in words:
            mpcore.MixedPrecisionOptimizer(torch.optim.SGD([param], lr=0.1), **{option: word})
        inner = torch.optim.SGD([param], lr=0.1)
        with pytest.raises(mpcore.errors.ArgumentError) as caught:
            mpcore.MixedPrecisionOptimizer(inner, **{option: "none of them"})
        assert all(word in str(caught.value) for word in words)


def test_python_m_mpcore_is_the_program(tmp_path):
    done = run_mpcore(["--version"], {})
    assert done.stdout.strip() == metadata.version("mpcore")
    assert "Usage: mpcore [OPTIONS]" in run_mpcore(["--help"], {"NO_COLOR": "1"}).stdout
