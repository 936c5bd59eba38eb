"""Packages that some kinds of files need, and what is said where they are not installed or cannot read a file."""

from __future__ import annotations

import importlib
from types import ModuleType


class DecodeError(ValueError):
    """A file, or its content, cannot be decoded."""


def needed(module: str, what: str, extra: str) -> ModuleType:
    """A package without which no file of a kind can be read."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{what}; get it with `pip install 'u2a-fast[{extra}]'`", name=error.name) from error


def optional(module: str, package: str, what: str) -> ModuleType:
    """A package that only some files need; without it they count as absent, and the message says what to do."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise DecodeError(f"{what} is read with {package}: `pip install {package}`, or u2a-fast[media]") from error
