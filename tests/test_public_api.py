"""The flat public interface: what it has, where it lives, how it is described."""

from __future__ import annotations

import inspect

import pytest

import tomexport


def test_all_is_what_can_be_reached():
    assert set(tomexport.__all__) | {"__version__"} == set(dir(tomexport))
    functions = ["plan", "reduce", "export", "load", "verify", "profile", "search"]
    assert tomexport.__all__ == ["Plan", "Schedule", *functions]


@pytest.mark.parametrize("name", tomexport.__all__)
def test_public_names_are_documented(name):
    doc = inspect.getdoc(getattr(tomexport, name))
    assert doc, f"tomexport.{name} needs a docstring"
    if inspect.isfunction(getattr(tomexport, name)):
        assert "Raises:" in doc


def test_the_function_plan_stands_where_the_module_was():
    from tomexport.plan import Plan

    assert callable(tomexport.plan)
    assert tomexport.Plan is Plan


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'tomexport' has no attribute 'nothing'"):
        tomexport.nothing  # noqa: B018
