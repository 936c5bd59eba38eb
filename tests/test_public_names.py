"""What a user may import explains itself: an example or its arguments, and no argument that is not there."""

import inspect
import re
from types import ModuleType

import pytest

import u2a_fast
from u2a_fast import kernels

PUBLIC = {
    f"{package.__name__}.{name}": getattr(package, name) for package in (u2a_fast, kernels) for name in package.__all__
}
CALLABLE = {name: thing for name, thing in PUBLIC.items() if not isinstance(thing, ModuleType)}


def parameters(thing) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(thing).parameters)


def documented_arguments(docstring: str) -> list[str]:
    """The names that the Args section explains: "x: ...", "q, k: ..."."""
    section = re.search(r"^Args:\n((?:^(?: .*)?\n?)+)", docstring, re.M)
    entries = re.findall(r"^ {4}(\w[\w, ]*):", section[1], re.M) if section else []
    return [name for entry in entries for name in entry.split(", ")]


@pytest.mark.parametrize("name", PUBLIC)
def test_is_described(name):
    assert inspect.getdoc(PUBLIC[name])


@pytest.mark.parametrize("name", CALLABLE)
def test_shows_an_example_or_explains_its_arguments(name):
    docstring = inspect.getdoc(CALLABLE[name])
    assert not parameters(CALLABLE[name]) or ">>> " in docstring or documented_arguments(docstring)


@pytest.mark.parametrize("name", CALLABLE)
def test_explains_no_argument_that_it_does_not_take(name):
    taken = parameters(CALLABLE[name])
    if not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        assert set(documented_arguments(inspect.getdoc(CALLABLE[name]))) <= taken.keys()
