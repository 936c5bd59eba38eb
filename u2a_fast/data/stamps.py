"""Tux Paint stamps: picture + written caption + spoken caption, to predict the category; recordings have real holes.

The data is the Debian package `tuxpaint-stamps-default`, GPL-2. It is fetched where it is needed and never copied into
this repository or a wheel. Beside a picture `frog.png` lie, where they exist, `frog.txt` (its first line is the
English caption) and `frog_desc_fr.ogg` (the caption spoken in French).
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from .carriers import MissingPackageError, build_once, cache_folder, content_hash
from .splits import Row, file_cell, make_dataset, split_rows

if TYPE_CHECKING:
    import datasets

VERSION = "2022.06.04-1"
ARCHIVE = f"tuxpaint-stamps-default_{VERSION}_all.deb"
ARCHIVE_HASH = "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34"
STAMPS = "usr/share/tuxpaint/stamps"
NOTICE = f"""Fetching tuxpaint-stamps-default {VERSION} (161 MB) with apt-get; it is not installed, only unpacked.
Licence: GNU General Public License, version 2. Source: https://tuxpaint.org/stamps/, packaged by Debian."""

# In other languages the recordings exist for some classes only, so that presence alone would tell the label.
LANGUAGES = ("fr", "es", "ro", "ru")
SMALLEST_CLASS = 12
VARIANT = re.compile(r"_(mirror|flip)$")


def load_stamps(folder: str | Path | None = None, language: str = "fr", seed: int = 0) -> datasets.DatasetDict:
    """Train, validation and test with the columns image, text, audio, label and group.

    605 stamps in 12 classes. `image` and `audio` are paths, not decoded; `text` is the English caption; `audio` is the
    caption spoken in `language` (fr, es, ro or ru), None where nobody recorded it. Stamps of one group share the
    caption and lie in one split. `folder` is the unpacked package; without it, `fetch_stamps` gets it.

    Raises:
        ValueError: another language or folder.
        MissingPackageError: the package cannot be fetched.
    """
    if language not in LANGUAGES:
        raise ValueError(
            f"language must be one of {', '.join(LANGUAGES)}, not {language!r}: "
            "elsewhere the recordings exist for some classes only, so presence would tell the label"
        )
    rows = stamp_rows(fetch_stamps() if folder is None else Path(folder), language)
    return make_dataset(split_rows(rows, seed), sorted({row["label"] for row in rows}))


def fetch_stamps(cache: str | Path | None = None) -> Path:
    """The folder of the stamps in `cache` (default: `carriers.cache_folder`), downloaded and unpacked there once.

    Prints the licence and the source.

    Raises:
        MissingPackageError: it failed; the message has the commands to run by hand.
    """
    target = (cache_folder() if cache is None else Path(cache)) / f"tuxpaint-stamps-{VERSION}"
    return build_once(target, _download_and_unpack)


def _download_and_unpack(folder: Path) -> None:
    print(NOTICE, flush=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as download:
        _run(["apt-get", "download", f"tuxpaint-stamps-default={VERSION}"], download)
        archive = Path(download, ARCHIVE)
        if content_hash(archive) != ARCHIVE_HASH:
            raise MissingPackageError(f"apt-get brought another file than the known {ARCHIVE}; {_by_hand()}")
        _run(["dpkg", "-x", str(archive), str(folder)], download)


def _run(command: list[str], folder: str) -> None:
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=900)
    except OSError as error:
        raise MissingPackageError(f"{command[0]} could not be started; {_by_hand()}") from error
    except subprocess.SubprocessError as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
        raise MissingPackageError(f"the stamps could not be fetched ({reason}); {_by_hand()}") from error


def _by_hand() -> str:
    return (
        "on a machine with Debian's packages run `apt-get download tuxpaint-stamps-default` (after `apt-get update`) "
        f"and `dpkg -x {ARCHIVE} FOLDER`, then load_stamps(FOLDER)"
    )


def stamp_rows(folder: Path, language: str) -> list[Row]:
    """The stamps with a PNG, in alphabetic order of their path, without alphabets and small classes."""
    root = next((place for place in (folder / STAMPS, folder) if (place / "animals").is_dir()), None)
    if root is None:
        raise ValueError(f"there are no Tux Paint stamps under {folder}; {_by_hand()}")
    rows = []
    for picture in sorted(root.rglob("*.png"), key=lambda path: (path.parent.parts, path.stem)):
        folders = picture.relative_to(root).parent.parts
        caption_file = picture.with_suffix(".txt")
        if not folders or "alphabets" in folders or VARIANT.search(picture.stem) or not caption_file.exists():
            continue
        caption = caption_file.read_text(encoding="utf-8").splitlines()[0].strip()
        recording = picture.with_name(f"{picture.stem}_desc_{language}.ogg")
        rows.append(
            {
                "image": file_cell(picture),
                "text": caption,
                "audio": file_cell(recording if recording.exists() else None),
                "label": folders[0],
                "group": caption.lower(),
            }
        )
    sizes = Counter(row["label"] for row in rows)
    return [row for row in rows if sizes[row["label"]] >= SMALLEST_CLASS]
