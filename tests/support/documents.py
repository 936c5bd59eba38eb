"""What people read: pages, their code blocks, and a working directory with the files that they name."""

import csv
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import tiny_data

import u2a_fast

ROOT = Path(__file__).parents[2]
PAGES = {path.stem: path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.M | re.S)
STAND_INS = {  # for hub ids: tiny, random and local
    "facebook/dinov2-small": "image",
    "google/vit-base-patch16-224": "image",
    "bert-base-uncased": "text",
}


@dataclass(frozen=True)
class Block:
    name: str
    language: str
    text: str


def blocks(page: str) -> list[Block]:
    found = FENCE.findall(PAGES[page].read_text(encoding="utf-8"))
    return [Block(f"{page}, block {n}", *match) for n, match in enumerate(found, start=1)]


def commands(text: str) -> list[str]:
    """The lines of a shell block, continued ones joined, without comments."""
    lines = (re.sub(r"(^|\s)#.*", "", line).strip() for line in text.replace("\\\n", " ").splitlines())
    return [line for line in lines if line]


def furnish(folder: Path) -> dict[str, str]:
    """Make the tables and pictures that the pages name; what stands for each hub id."""
    encoders = tiny_data.encoder_folders(folder)
    table = tiny_data.write_table(folder, 48)
    rows = list(csv.DictReader(table.read_text(encoding="utf-8").splitlines()))
    (folder / "photos").mkdir()
    for name in ("photos/1.jpg", "photos/2.jpg"):
        shutil.copy(folder / "0.png", folder / name)
    write(folder / "my.csv", rows)
    write(folder / "headlines.csv", [{"headline": row.pop("text"), **row} for row in map(dict, rows)])
    write(folder / "films.csv", [row | {"label": f"{row['label']}|square"} for row in rows])
    write(folder / "new.csv", [{"image": row["image"], "text": row["text"]} for row in rows[:6]])
    return {hub_id: encoders[modality] for hub_id, modality in STAND_INS.items()}


def write(path: Path, rows: list[dict]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def save_model(folder: Path, stand_ins: dict[str, str]) -> None:
    """A model as training leaves it, processors and all."""
    model = u2a_fast.U2A({STAND_INS[name]: path for name, path in list(stand_ins.items())[1:]}, num_labels=3)
    assert set(model.processors) == {"image", "text"}
    model.save_pretrained(folder)


def replaced(text: str, stand_ins: dict[str, str]) -> str:
    for hub_id, path in stand_ins.items():
        text = text.replace(hub_id, path)
    return text
