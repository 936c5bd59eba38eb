"""One name in several spellings."""

import re
import unicodedata

# Marks of width nothing and of direction, control characters; joiners, which shape emoji and the letter before them, in
# front alone.
UNSEEN = re.compile(
    "[\u00ad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff\x00-\x08\x0e-\x1b\x7f]|^[\u200c\u200d]+"
)


def tidy(name: str) -> str:
    """A name without what nobody sees, with single blanks, and accented letters in one of Unicode's two ways.

    >>> tidy(" Jose\\u0301\\u200b  Maria ") == "Jos\\u00e9 Maria"
    True
    """
    return " ".join(unicodedata.normalize("NFC", UNSEEN.sub("", name)).split())
