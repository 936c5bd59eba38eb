"""Names of classes, and the number of each however it is spelled."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal

from .spelling import tidy

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?|[+-]?(nan|inf|infinity)", re.ASCII | re.IGNORECASE)
TRUTH = {"false": "0", "true": "1"}
LONGEST_NUMBER = 100  # characters; a longer label is a name
NAMED = 10  # classes in a message


def meaning(name: str) -> str | Decimal:
    """What a class name stands for, the same for all spellings of a number or a truth value.

    >>> meaning("1.0") == meaning("1") == meaning("True"), meaning("Dog") == meaning("dog")
    (True, False)
    """
    plain = TRUTH.get(name.casefold(), name)
    if len(plain) > LONGEST_NUMBER or not NUMBER.fullmatch(plain) or Decimal(plain).is_nan():
        return name
    return Decimal(plain)


class Classes:
    """The classes of a model or a split, and the number of each however it is spelled."""

    def __init__(self, names: Sequence[str]):
        self.names = names
        self.numbers = {meaning(tidy(name)): i for i, name in enumerate(names)}  # a model's may be from before `tidy`
        self.numbers |= {name: i for i, name in enumerate(names)}

    def find(self, name: str) -> int | None:
        return self.numbers.get(name, self.numbers.get(meaning(tidy(name))))

    def number(self, name: str) -> int:
        found = self.find(name)
        if found is None:
            known = ", ".join(self.names[:NAMED]) + (
                f" and {more} more" if (more := len(self.names) - NAMED) > 0 else ""
            )
            raise ValueError(f"this model has no class {name!r}: its classes are {known}; leave such rows out")
        return found
