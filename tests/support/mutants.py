"""A copy of the package `kernels` with one planted slip, loaded beside the real one."""

import contextlib
import importlib.util
import itertools
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import u2a_fast.kernels

SOURCE = Path(u2a_fast.kernels.__file__).parent
_numbers = itertools.count()


@dataclass(frozen=True)
class Mutant:
    """`old` stands once or more in `file` and becomes `new`; `probe(kernels)` must then fail."""

    file: str
    old: str
    new: str
    probe: object


@contextlib.contextmanager
def copy_of_kernels(mutant: Mutant | None = None):
    """The copied package, its ops registered under a namespace of their own; its backend is `.backend`."""
    name = f"mutant_{next(_numbers)}"
    with tempfile.TemporaryDirectory() as folder:
        for path in SOURCE.glob("*.py"):
            text = path.read_text().replace('NAMESPACE = "u2a_fast"', f'NAMESPACE = "{name}"')
            if mutant is not None and path.name == mutant.file:
                assert mutant.old in text, f"{mutant.old!r} is no longer in {mutant.file}"
                text = text.replace(mutant.old, mutant.new)
            (Path(folder) / path.name).write_text(text)
        spec = importlib.util.spec_from_file_location(
            name, f"{folder}/__init__.py", submodule_search_locations=[folder]
        )
        package = sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(package)
            yield package
        finally:
            for module in [m for m in sys.modules if m == name or m.startswith(f"{name}.")]:
                del sys.modules[module]
