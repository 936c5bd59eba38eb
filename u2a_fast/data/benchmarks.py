"""The papers' benchmarks in the layouts in which they are published; nothing is downloaded.

Each is image + text, with its own splits, and with its own task: genres of a film (several each), the dish of a
recipe, whether a meme is hateful.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .splits import Row, file_cell, make_dataset
from .table_files import parse_json_lines

if TYPE_CHECKING:
    import datasets

# The 23 genres that everybody keeps; films have a few others too.
GENRES = (
    *("Drama", "Comedy", "Romance", "Thriller", "Crime", "Action", "Adventure", "Horror", "Documentary", "Mystery"),
    *("Sci-Fi", "Music", "Fantasy", "Family", "Biography", "War", "History", "Animation", "Musical", "Western"),
    *("Sport", "Short", "Film-Noir"),
)
HATEFUL = ("not hateful", "hateful")
PICTURES = (".jpeg", ".jpg", ".png")


def load_mmimdb(folder: str | Path) -> datasets.DatasetDict:
    """MM-IMDb (Arevalo et al., arXiv 1702.01992): poster and plot of a film, to predict its genres.

    `folder` holds `split.json` ({"train": [id, ..], "dev", "test"}) and each film's `id.json` and `id.jpeg`, either in
    `dataset/` as published, or in `labels/` and `images/`. A film has one row, with the first of its plots.

    Raises:
        FileNotFoundError: a file that the layout needs is not there.
        ValueError: a file does not hold what the layout says.
    """
    folder = Path(folder)
    labels, images = _first_of(folder, "dataset", "labels", "."), _first_of(folder, "dataset", "images", ".")
    splits = {}
    for name, ids in _json(folder / "split.json", dict).items():
        rows = []
        for film in map(str, ids):
            said = _json(labels / f"{film}.json", dict)
            plots = said.get("plot") or [None]
            text = plots if isinstance(plots, str) else plots[0]
            marks = [float(genre in said.get("genres", ())) for genre in GENRES]
            rows.append({"image": _picture(images, film), "text": text, "label": marks})
        splits["validation" if name == "dev" else name] = rows
    return make_dataset(_complete(splits, folder / "split.json"), GENRES)


def load_food101(folder: str | Path) -> datasets.DatasetDict:
    """UPMC Food-101 (Wang et al., ICMEW 2015): photograph and title of a recipe's web page, to predict the dish.

    `folder` holds `images/train/CLASS/*.jpg`, `images/test/CLASS/*.jpg`, and `texts/train_titles.csv` and
    `texts/test_titles.csv` with a file name, a title and a class a line. There is no validation split. Every picture
    is a row; one without a title has no text.

    Raises:
        FileNotFoundError: a file that the layout needs is not there.
    """
    folder, splits = Path(folder), {}
    names: set[str] = set()
    for name in ("train", "test"):
        titles = _titles(folder / "texts" / f"{name}_titles.csv")
        classes = sorted(path for path in _present(folder / "images" / name).iterdir() if path.is_dir())
        names.update(dish.name for dish in classes)
        splits[name] = [
            {"image": file_cell(picture), "text": titles.get(picture.name), "label": dish.name}
            for dish in classes
            for picture in sorted(dish.iterdir())
            if picture.suffix.lower() in PICTURES
        ]
    return make_dataset(_complete(splits, folder / "images"), sorted(names))


def load_hateful_memes(folder: str | Path) -> datasets.DatasetDict:
    """Hateful Memes (Kiela et al., arXiv 2005.04790): picture and caption of a meme, to predict whether it is hateful.

    `folder` holds `train.jsonl`, `dev_seen.jsonl` (or `dev.jsonl`) and `test_seen.jsonl` (or `test.jsonl`), whose
    lines have `img` (a path below the folder), `text` and `label`.

    Raises:
        FileNotFoundError: a file that the layout needs is not there.
        ValueError: a line without a label; the test labels were published later than the test split.
    """
    folder = Path(folder)
    files = {"train": ["train"], "validation": ["dev_seen", "dev"], "test": ["test_seen", "test"]}
    splits = {}
    for split, names in files.items():
        file = next(
            (path for name in names if (path := folder / f"{name}.jsonl").exists()), folder / f"{names[0]}.jsonl"
        )
        rows = []
        for number, line in enumerate(parse_json_lines(_present(file).read_bytes(), str(file)), start=1):
            if line.get("label") not in (0, 1):
                raise ValueError(f"{file}, row {number} has no label 0 or 1: get the release whose {split} is labelled")
            picture = file_cell(_present(folder / str(line.get("img"))))
            rows.append({"image": picture, "text": line.get("text"), "label": HATEFUL[line["label"]]})
        splits[split] = rows
    return make_dataset(_complete(splits, folder), HATEFUL)


BENCHMARKS: dict[str, Callable[[str | Path], Any]] = {
    "mmimdb": load_mmimdb,
    "food101": load_food101,
    "hateful-memes": load_hateful_memes,
}


def _present(path: Path) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: the layout is described in docs/reproduce.md")
    return path


def _first_of(folder: Path, *names: str) -> Path:
    return next(place for name in names if (place := folder / name).is_dir() or name == ".")


def _picture(folder: Path, stem: str) -> Row | None:
    found = next((path for suffix in PICTURES if (path := folder / f"{stem}{suffix}").exists()), None)
    return file_cell(found or _present(folder / f"{stem}{PICTURES[0]}"))


def _json(path: Path, kind: type) -> Any:
    try:
        content = json.loads(_present(path).read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: get the file again") from error
    if not isinstance(content, kind):
        raise ValueError(f"{path} holds a {type(content).__name__}, not the {kind.__name__} of the published file")
    return content


def _titles(path: Path) -> dict[str, str]:
    """{file name: title}; a title that holds commas without quotes is the middle of its line."""
    with open(_present(path), encoding="utf-8-sig", errors="replace", newline="") as file:
        return {line[0]: ",".join(line[1:-1]) for line in csv.reader(file) if len(line) > 2}


def _complete(splits: Mapping[str, list[Row]], source: Path) -> dict[str, list[Row]]:
    empty = [name for name in ("train", "test") if not splits.get(name)]
    if empty:
        raise ValueError(f"{source} has no {empty[0]} samples: get the data set again")
    return {name: splits[name] for name in ("train", "validation", "test") if name in splits}
