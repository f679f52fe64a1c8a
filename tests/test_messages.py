"""Every refusal is of our own tree, says how to mend it, and has its text in some test."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import tomexport
from tomexport import errors

PACKAGE = Path(tomexport.__file__).parent
TESTS = Path(__file__).parent
OURS = {
    name for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, errors.TomexportError)
} | {"ProofError"}  # fmt: skip
# not messages for people: control flow of the command line and of attribute look-up
INNER = {"AttributeError", "Exit", "UsageError"}


def _raises():
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                function = node.exc.func
                name = function.attr if isinstance(function, ast.Attribute) else function.id
                yield pytest.param(name, node.exc, id=f"{path.relative_to(PACKAGE)}:{node.lineno}")


def _words(node):
    """Return the fixed words of a message, one list per unbroken run of them."""
    parts = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant)]
    return [re.findall(r"[\w'-]+", part) for part in parts if isinstance(part, str)]


@pytest.fixture(scope="module")
def tested():
    sources = " ".join(path.read_text() for path in TESTS.rglob("test_*.py"))
    return " ".join(re.findall(r"[\w'-]+", sources.replace("\\", "")))


@pytest.mark.parametrize(("name", "call"), list(_raises()))
def test_only_errors_of_our_tree_are_raised(name, call):
    assert name in OURS | INNER


@pytest.mark.parametrize(("name", "call"), list(_raises()))
def test_messages_have_a_test(name, call, tested):
    runs = _words(call)
    if name in INNER or not any(len(run) >= 2 for run in runs):
        return  # made by a function, whose words are tested where it is
    pairs = {" ".join(run[i : i + 2]) for run in runs for i in range(len(run) - 1)}
    assert any(words in tested for words in pairs), f"no test has any words of: {runs}"


def test_no_print_outside_the_command_line():
    for path in PACKAGE.rglob("*.py"):
        calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        names = {n.func.id for n in calls if isinstance(n.func, ast.Name)}
        assert "print" not in names, path
