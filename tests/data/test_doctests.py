import doctest
import importlib
import pkgutil

import pytest

import u2a_fast.data

MODULES = [module.name for module in pkgutil.iter_modules(u2a_fast.data.__path__)]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_the_docstrings_hold(name):
    result = doctest.testmod(importlib.import_module(f"u2a_fast.data.{name}"))
    assert result.failed == 0


def test_every_public_name_is_there_and_documented():
    for name in u2a_fast.data.__all__:
        assert getattr(u2a_fast.data, name).__doc__
