"""The papers' benchmarks in the layouts in which they are published; nothing is downloaded.

Each is image + text, with its own splits, and with its own task: genres of a film (several each), the dish of a
recipe, whether a meme is hateful.
"""

from __future__ import annotations

import csv
import json
import logging
import re
from collections.abc import Callable, Mapping, Set
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from .splits import Row, file_cell, make_dataset
from .table_files import SPLITS, parse_json_lines

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

# The 23 genres that everybody keeps; films have a few others too.
GENRES = (
    *("Drama", "Comedy", "Romance", "Thriller", "Crime", "Action", "Adventure", "Horror", "Documentary", "Mystery"),
    *("Sci-Fi", "Music", "Fantasy", "Family", "Biography", "War", "History", "Animation", "Musical", "Western"),
    *("Sport", "Short", "Film-Noir"),
)
HATEFUL = ("not hateful", "hateful")
PICTURES = (".jpeg", ".jpg", ".png")
# A line of titles: a picture, perhaps behind a number, and what follows it.
TITLED = re.compile(
    r'(?:.*?[,;\t])??"?(?P<file>[^",;\t]+\.(?:jpe?g|png))"?(?P<delimiter>[,;\t])(?P<rest>.*)', re.IGNORECASE
)


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
    source = folder / "split.json"
    splits: dict[str, list[Row]] = {}
    for name, ids in _json(source, dict).items():
        split = SPLITS.get(name.strip().casefold())
        if split is None or split in splits:
            raise ValueError(f"{source} has the split {name!r}{' too' if split else ''}: write train, dev and test")
        splits[split] = [_film(labels, images, film) for film in _several(ids, str | int, source, name)]
    return make_dataset(_complete(splits, source), GENRES)


def _film(labels: Path, images: Path, film: str | int) -> Row:
    file = labels / f"{film}.json"
    said = _json(file, dict)
    plot, genres = said.get("plot"), _several(said.get("genres"), str, file, "genres")
    plots = _several([plot] if isinstance(plot, str) else plot or [], str | None, file, "plot")
    marks = [float(genre in genres) for genre in GENRES]
    return {"image": _picture(images, str(film)), "text": plots[0] if plots else None, "label": marks}


def load_food101(folder: str | Path) -> datasets.DatasetDict:
    """UPMC Food-101 (Wang et al., ICMEW 2015): photograph and title of a recipe's web page, to predict the dish.

    `folder` holds `images/train/CLASS/*.jpg`, `images/test/CLASS/*.jpg`, and `texts/train_titles.csv` and
    `texts/test_titles.csv` with a file name, a title and a class a line. There is no validation split. Every picture
    is a row; one without a title has no text.

    Raises:
        FileNotFoundError: a file that the layout needs is not there.
        ValueError: the titles are those of no picture.
    """
    folder = Path(folder)
    splits: dict[str, list[Row]] = {}
    for name in ("train", "test"):
        place, file = _present(folder / "images" / name), _present(folder / "texts" / f"{name}_titles.csv")
        # Names with a dot in front are what macOS and notebooks leave behind.
        pictures = sorted(path for path in place.glob("[!.]*/[!.]*") if path.suffix.lower() in PICTURES)
        titles = _titles(file, {picture.parent.name for picture in pictures})
        splits[name] = []
        for picture in pictures:
            dish = picture.parent.name
            title = titles.get((dish, picture.name.casefold())) or titles.get(("", picture.name.casefold()))
            splits[name].append({"image": file_cell(picture), "text": title, "label": dish})
        without = [row["image"]["path"] for row in splits[name] if row["text"] is None]
        if without and len(without) == len(pictures):
            raise ValueError(
                f"{file} names none of the {len(pictures)} pictures of {place}, {without[0]!r} for one: "
                "write file name, title and class a line"
            )
        if without:
            logger.warning(
                "%s: %d of %d pictures have no title, %r for one", file, len(without), len(pictures), without[0]
            )
    names = sorted({row["label"] for part in splits.values() for row in part})
    return make_dataset(_complete(splits, folder / "images"), names)


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
            image, text = line.get("img"), line.get("text")
            if not isinstance(image, str) or (folder / image).is_dir():
                raise ValueError(f"{file}, row {number} has the img {image!r}: write the path of its picture")
            if not isinstance(text, str | None):
                raise ValueError(f"{file}, row {number} has the text {text!r}: write a string")
            picture = file_cell(_present(folder / image))
            rows.append({"image": picture, "text": text, "label": HATEFUL[int(line["label"])]})
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


def _several(value: Any, kind: Any, file: Path, name: str) -> list[Any]:
    if not isinstance(value, list) or not all(isinstance(part, kind) for part in value):
        raise ValueError(
            f"{file} has {value!r:.100} under {name!r}, which must be a list of strings: get the file again"
        )
    return value


def _titles(path: Path, dishes: Set[str]) -> dict[tuple[str, str], str]:
    """{(its class where the line has it in its path, file name): title}.

    A title that holds commas without quotes is the middle of its line, and none goes on in the next one: what looks
    like a quote that is never closed is a letter.
    """
    titles = {}
    for line in path.read_text(encoding="utf-8-sig", errors="replace").split("\n"):
        found = TITLED.fullmatch(line.strip())
        if found is None:
            continue
        file = PurePosixPath(found["file"].replace("\\", "/"))
        try:
            cells = next(csv.reader([found["rest"]], delimiter=found["delimiter"], strict=True))
        except csv.Error:
            cells = found["rest"].split(found["delimiter"])
        title = found["delimiter"].join(cells[:-1] if len(cells) > 1 or set(cells) <= dishes else cells)
        if title.strip():
            titles[file.parent.name if file.parent.name in dishes else "", file.name.casefold()] = title
    return titles


def _complete(splits: Mapping[str, list[Row]], source: Path) -> dict[str, list[Row]]:
    empty = [name for name in ("train", "test") if not splits.get(name)]
    if empty:
        raise ValueError(f"{source} has no {empty[0]} samples: get the data set again")
    return {name: splits[name] for name in ("train", "validation", "test") if name in splits}
