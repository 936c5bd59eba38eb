"""The examples in docstrings run and print what they say."""

import doctest
import importlib
import pkgutil

import pytest

import u2a_fast

# kernels/ is mapped into the package, so an editable install does not list it below u2a_fast.
PACKAGES = {"u2a_fast.": u2a_fast.__path__, "u2a_fast.kernels.": u2a_fast.kernels.__path__}
MODULES = sorted({i.name for prefix, path in PACKAGES.items() for i in pkgutil.walk_packages(path, prefix)})


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    if name == "u2a_fast.kernels.nf4":
        pytest.importorskip("bitsandbytes")
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0


@pytest.mark.slow
def test_the_public_names_have_examples():
    tested = {name: doctest.testmod(importlib.import_module(name)).attempted for name in MODULES}
    for name in (
        "methods.u2a",
        "methods.pmf",
        "methods.joint_embedding",
        "encoders.build",
        "lora",
        "lora_config",
        "memory",
    ):
        assert tested[f"u2a_fast.{name}"] > 0, name
    assert sum(count for name, count in tested.items() if name.startswith("u2a_fast.kernels.")) > 5
