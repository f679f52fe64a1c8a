"""The pages tell the truth: every module is on the map, every command and option is real."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

import tomexport
from tomexport.cli import cli

ROOT = Path(__file__).parents[1]
PACKAGE = Path(tomexport.__file__).parent
PAGES = ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "SUPPORT.md"]


def _page(name):
    return (ROOT / name).read_text()


def _public_modules():
    for path in PACKAGE.rglob("*.py"):
        relative = path.relative_to(PACKAGE)
        if relative.name != "__init__.py":
            yield relative


@pytest.mark.parametrize("module", sorted(_public_modules()), ids=str)
def test_every_module_is_on_the_map(module):
    page = _page("ARCHITECTURE.md")
    folder = f"`{module.parent}/`" if module.parent != Path() else ""
    named = f"`{module}`" in page or (folder in page and f"`{module.name}`" in page)
    inside_operator = module.parts[0] == "kernels" and f"`{module.name}`" in page
    assert named or inside_operator, f"ARCHITECTURE.md does not name {module}"


def test_every_path_on_the_map_exists():
    for path in re.findall(r"`([\w/]+\.py)`", _page("ARCHITECTURE.md")):
        candidates = [PACKAGE / path, *PACKAGE.rglob(path), ROOT / path]
        if path not in ("exporter/methods/x.py", "exporter/families/x.py", "exporter/layouts/x.py",
                        "exporter/models/x.py",
                        "runtime/x_backend.py", "tomexport/plan.py"):  # fmt: skip
            assert any(candidate.exists() for candidate in candidates), path


def _commands():
    groups = {name: c for name, c in cli.commands.items() if isinstance(c, click.Group)}
    inner = {f"{name} {n}": c for name, group in groups.items() for n, c in group.commands.items()}
    return {"tomexport": cli, **cli.commands, **inner}


@pytest.mark.parametrize("name", list(_commands()))
def test_commands_and_options_have_help(name):
    command = _commands()[name]
    assert command.help
    for option in command.params:
        if isinstance(option, click.Option):
            assert option.help, f"{name} {option.opts} has no help"


def test_options_in_the_readme_are_real():
    known = {opt for command in _commands().values() for p in command.params for opt in p.opts}
    for line in re.findall(r"tomexport (?!\[).*", _page("README.md")):
        for option in re.findall(r"(?<![\w-])--[\w-]+", line):
            assert option in known, f"README uses {option}"


def test_every_command_is_in_the_readme():
    for name in _commands():
        if name not in ("tomexport", "export"):  # the default: it goes without its name
            assert f"tomexport {name}" in _page("README.md"), name


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", _page(page)):
        assert (ROOT / target).exists(), f"{page} links to {target}"


def test_version_is_in_the_changelog():
    assert f"## {tomexport.__version__}" in _page("CHANGELOG.md")


def test_make_targets_in_the_readme_exist():
    makefile = _page("Makefile")
    for target in re.findall(r"make (\w+) ", _page("README.md")):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_ci_runs_what_a_person_runs():
    assert "make test" in _page(".ci/run")
    assert "make test" in _page("README.md")
