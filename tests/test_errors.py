"""The exception tree, and the few helpers that turn a mistake into a message."""

from __future__ import annotations

import inspect
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tomexport import errors
from tomexport.errors import (
    MissingExtraError,
    TomexportError,
    UnknownNameError,
    did_you_mean,
    need,
    pick,
    plain,
)


@dataclass(frozen=True)
class Entry:
    name: str
    value: int = 0


TABLE = (Entry("tome", 1), Entry("evit", 2), Entry("dtem", 3))


def drawn_tree() -> dict[str, str]:
    """Read (class → parent) from the drawing in the module's docstring: four columns a level."""
    parents, path = {}, ["Exception"]
    for found in re.finditer(r"(?m)^([ │├└─]*)(\w+Error)  +\S", inspect.getdoc(errors)):
        branch, name = found.groups()
        del path[len(branch) // 4 :]
        parents[name] = path[-1]
        path.append(name)
    return parents


def real_tree() -> dict[str, str]:
    classes = inspect.getmembers(errors, inspect.isclass)
    return {name: c.__bases__[0].__name__ for name, c in classes if issubclass(c, Exception)}


def test_docstring_draws_the_tree_that_is() -> None:
    assert drawn_tree() == real_tree()


@pytest.mark.parametrize("name", sorted(real_tree()))
def test_every_error_is_caught_as_the_base(name: str) -> None:
    with pytest.raises(TomexportError, match=r"^what, why, how$"):
        raise getattr(errors, name)("what, why, how")


@pytest.mark.parametrize("entry", TABLE, ids=lambda entry: entry.name)
def test_pick_returns_the_entry_itself(entry: Entry) -> None:
    assert pick("method", TABLE, entry.name) is entry


def test_pick_reads_a_table_once() -> None:
    assert pick("method", iter(TABLE), "dtem") is TABLE[2]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("tom", " Did you mean 'tome'?"),
        ("evitt", " Did you mean 'evit'?"),
        ("TOME", ""),
        ("quantum", ""),
        ("", ""),
    ],
)
def test_pick_names_what_is_known_and_what_is_near(name: str, hint: str) -> None:
    with pytest.raises(UnknownNameError) as caught:
        pick("method", TABLE, name)
    assert str(caught.value) == f"Unknown method {name!r}; known: dtem, evit, tome.{hint}"


@pytest.mark.parametrize(
    ("name", "known", "hint"),
    [
        ("const", ["const", "linear"], " Did you mean 'const'?"),
        ("liner", ["const", "linear"], " Did you mean 'linear'?"),
        ("schedules", ["schema", "schedule", "plan"], " Did you mean 'schedule'?"),
        ("xyz", ["const", "linear"], ""),
        ("xyz", [], ""),
    ],
    ids=["equal", "one-letter-off", "nearest-of-two", "nothing-near", "nothing-known"],
)
def test_did_you_mean(name: str, known: list[str], hint: str) -> None:
    assert did_you_mean(name, iter(known)) == hint


def test_need_returns_the_module() -> None:
    assert need("json", "export") is json


def test_need_returns_the_submodule() -> None:
    assert need("json.decoder", "export") is json.decoder


@pytest.mark.parametrize("module", ["no_such_package", "no_such_package.part", "json.no_such_part"])
def test_need_names_the_command_that_installs_what_is_missing(module: str) -> None:
    with pytest.raises(MissingExtraError) as caught:
        need(module, "openvino")
    assert str(caught.value) == (
        f"This needs {module}, which is not installed. "
        "Install it with: pip install 'tomexport[openvino]'"
    )
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_need_of_a_blocked_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingExtraError, match=r"^This needs openvino, .*tomexport\[calib\]'$"):
        need("openvino", "calib")


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("import no_such_dependency", ModuleNotFoundError),
        ("from json import no_such_name", ImportError),
        ("raise RuntimeError('broken build')", RuntimeError),
    ],
    ids=["its-dependency-is-missing", "its-import-fails", "it-raises"],
)
def test_need_does_not_call_a_broken_module_missing(
    source: str, error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_module.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(error) as caught:
        need("broken_module", "export")
    assert type(caught.value) is error


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ValueError("a tensor has no name"), "a tensor has no name"),
        (ValueError("a tensor has no name."), "a tensor has no name"),
        (ValueError("the first sentence. The second."), "the first sentence"),
        (ValueError("the first line\nthe second"), "the first line"),
        (ValueError("\n\n  after blank lines  \n"), "after blank lines"),
        (ValueError("opset 18.5 is not known"), "opset 18.5 is not known"),
        (ValueError(), "ValueError"),
        (ValueError("\n"), "ValueError"),
        (ValueError("..."), "ValueError"),
        (KeyError("x"), "KeyError 'x'"),
        (ValueError("8 chars."), "ValueError 8 chars"),
        (ValueError("9 letters"), "9 letters"),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
        (ValueError("x" * 200), "x" * 200),
        (ValueError("x" * 201), "x" * 200 + "…"),
    ],
    ids=[
        "sentence",
        "full-stop",
        "two-sentences",
        "two-lines",
        "blank-lines-before",
        "a-point-inside",
        "empty",
        "blank",
        "dots",
        "one-key",
        "too-short-alone",
        "long-enough",
        "errno",
        "longest",
        "too-long",
    ],
)
def test_plain_is_the_first_sentence(error: Exception, sentence: str) -> None:
    assert plain(error) == sentence
