"""The published layouts, built small: each benchmark has its own splits, task and classes."""

import json

import pytest
from PIL import Image

from u2a_fast.data.benchmarks import GENRES, load_food101, load_hateful_memes, load_mmimdb
from u2a_fast.data.labels import label_names, task_of


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)


def build_mmimdb(folder, labels="dataset", images="dataset"):
    films = {"train": ["0001", "0002"], "dev": ["0003"], "test": ["0004"]}
    for number, film in enumerate(film for ids in films.values() for film in ids):
        picture(folder / images / f"{film}.jpeg")
        said = {"plot": [f"plot {number}", "another"], "genres": ["Drama", "News"] if number else ["War", "Sci-Fi"]}
        (folder / labels).mkdir(exist_ok=True)
        (folder / labels / f"{film}.json").write_text(json.dumps(said))
    (folder / "split.json").write_text(json.dumps(films))


def build_food101(folder):
    (folder / "texts").mkdir()
    for split in ("train", "test"):
        for dish in ("apple_pie", "baklava"):
            for number in range(2):
                picture(folder / "images" / split / dish / f"{dish}_{number}.jpg")
        lines = 'apple_pie_0.jpg,"Pie, the best",apple_pie\nbaklava_0.jpg,Sweet, and sticky,baklava\n'
        (folder / "texts" / f"{split}_titles.csv").write_text(lines)


def build_hateful_memes(folder, test="test_seen"):
    for number, split in enumerate(("train", "dev_seen", test)):
        picture(folder / "img" / f"{number}.png")
        lines = [
            {"id": number, "img": f"img/{number}.png", "label": label, "text": f"meme {label}"} for label in (0, 1)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize("places", [("dataset", "dataset"), ("labels", "images")])
def test_mmimdb_has_several_genres_a_film(tmp_path, places):
    build_mmimdb(tmp_path, *places)
    splits = load_mmimdb(tmp_path)
    assert {name: len(part) for name, part in splits.items()} == {"train": 2, "validation": 1, "test": 1}
    feature, first = splits["train"].features["label"], splits["train"][0]
    assert task_of(feature) == "multi_label" and label_names(feature) == list(GENRES) and len(GENRES) == 23
    assert first["text"] == "plot 0" and first["image"]["path"].endswith("0001.jpeg")
    assert {GENRES[i] for i, mark in enumerate(first["label"]) if mark} == {"War", "Sci-Fi"}


@pytest.mark.parametrize("name", ["val", "Dev", "validation"])
def test_mmimdb_has_a_validation_split_however_it_is_called(tmp_path, name):
    build_mmimdb(tmp_path)
    films = {"train": ["0001"], name: ["0003"], "test": ["0004"]}
    (tmp_path / "split.json").write_text(json.dumps(films))
    assert [len(part) for part in load_mmimdb(tmp_path).values()] == [1, 1, 1]
    for other, message in (("extra", "has the split 'extra': write"), ("valid", "has the split 'valid' too: write")):
        (tmp_path / "split.json").write_text(json.dumps({**films, other: ["0002"]}))
        with pytest.raises(ValueError, match=rf"split\.json {message} train, dev and test"):
            load_mmimdb(tmp_path)


@pytest.mark.parametrize(
    ("file", "said", "message"),
    [
        ("dataset/0003.json", {"genres": "Musical"}, r"0003\.json has 'Musical' under 'genres', which must be a list"),
        ("dataset/0003.json", {"genres": None}, r"0003\.json has None under 'genres'"),
        ("dataset/0003.json", {"genre": ["Drama"]}, r"0003\.json has None under 'genres'"),
        ("dataset/0003.json", {"genres": [["Drama"]]}, r"0003\.json has .* under 'genres'"),
        ("dataset/0003.json", {"genres": [], "plot": {"a": 1}}, r"0003\.json has \{'a': 1\} under 'plot'"),
        ("dataset/0003.json", {"genres": [], "plot": [5]}, r"0003\.json has \[5\] under 'plot'"),
        ("split.json", {"train": {"0001": 1}, "test": ["0002"]}, r"split\.json has .* under 'train', which must be a"),
        ("split.json", {"train": "0001", "test": ["0002"]}, r"split\.json has '0001' under 'train'"),
    ],
)
def test_what_mmimdb_publishes_as_a_list_must_be_one(tmp_path, file, said, message):
    build_mmimdb(tmp_path)
    (tmp_path / file).write_text(json.dumps(said))
    with pytest.raises(ValueError, match=message):
        load_mmimdb(tmp_path)


@pytest.mark.parametrize("plot", [None, [], [None], ""])
def test_a_film_may_have_no_plot(tmp_path, plot):
    build_mmimdb(tmp_path)
    (tmp_path / "dataset" / "0003.json").write_text(json.dumps({"plot": plot, "genres": []}))
    assert not load_mmimdb(tmp_path)["validation"]["text"][0]


def test_food101_has_a_title_for_most_pictures(tmp_path):
    build_food101(tmp_path)
    splits = load_food101(tmp_path)
    assert {name: len(part) for name, part in splits.items()} == {"train": 4, "test": 4}
    assert splits["train"].features["label"].names == ["apple_pie", "baklava"]
    assert splits["test"]["text"][:] == ["Pie, the best", None, "Sweet, and sticky", None]


@pytest.mark.parametrize(
    ("line", "title"),
    [
        ("{file},{title},{dish}", '"Best pie'),
        ("{file},{title},{dish}", '12" wide, "best" of all'),
        ('{file},"{title}",{dish}', "Pie, the best"),
        ("0,{file},{title},{dish}", "with an index"),
        ("{file}\t{title}\t{dish}", "tabs, not commas"),
        ("{file},{title}", "no class"),
        ("{dish}/{file},{title},{dish}", "a path"),
        ("C:\\food\\{dish}\\{file},{title},{dish}", "a path of Windows"),
        ("{upper},{title},{dish}", "capitals"),
        ("{file},{title},{dish}", "long" * 50_000),
    ],
    ids=lambda value: value[:30],
)
def test_a_title_is_that_of_the_line_that_names_the_picture(tmp_path, line, title):
    build_food101(tmp_path)
    said = {"file": "apple_pie_0.jpg", "upper": "APPLE_PIE_0.JPG", "dish": "apple_pie"}
    lines = [line.format(title=title, **said), "baklava_1.jpg,the next,baklava", ",file,title,class", ""]
    (tmp_path / "texts" / "train_titles.csv").write_text("\n".join(lines))
    assert load_food101(tmp_path)["train"]["text"][:] == [title, None, None, "the next"]


def test_a_title_of_another_class_is_not_taken(tmp_path):
    build_food101(tmp_path)
    for dish in ("apple_pie", "baklava"):
        picture(tmp_path / "images" / "train" / dish / "0.jpg")
    (tmp_path / "texts" / "train_titles.csv").write_text("apple_pie/0.jpg,a pie,apple_pie\n")
    assert load_food101(tmp_path)["train"]["text"][:] == ["a pie", None, None, None, None, None]


def test_pictures_without_titles_are_told(tmp_path, caplog):
    build_food101(tmp_path)
    load_food101(tmp_path)
    assert "train_titles.csv: 2 of 4 pictures have no title" in caplog.text
    (tmp_path / "texts" / "test_titles.csv").write_text("name,title\nother.jpg,a,b\napple_pie_0.jpg,apple_pie\n")
    with pytest.raises(
        ValueError, match=r"test_titles\.csv names none of the 4 pictures of .*: write file name, title"
    ):
        load_food101(tmp_path)


def test_what_programs_leave_behind_is_no_picture_and_no_class(tmp_path):
    build_food101(tmp_path)
    (tmp_path / "images" / "train" / "apple_pie" / "._apple_pie_0.jpg").touch()
    picture(tmp_path / "images" / "train" / ".ipynb_checkpoints" / "a.jpg")
    (tmp_path / "images" / "test" / "empty").mkdir()
    train = load_food101(tmp_path)["train"]
    assert len(train) == 4 and train.features["label"].names == ["apple_pie", "baklava"]


@pytest.mark.parametrize("test", ["test_seen", "test"])
def test_hateful_memes_have_two_classes(tmp_path, test):
    build_hateful_memes(tmp_path, test)
    splits = load_hateful_memes(tmp_path)
    assert {name: len(part) for name, part in splits.items()} == {"train": 2, "validation": 2, "test": 2}
    assert splits["test"].features["label"].names == ["not hateful", "hateful"] and splits["test"]["label"][:] == [0, 1]


@pytest.mark.parametrize("label", [1, 1.0, True])
def test_a_label_of_a_meme_is_a_number(tmp_path, label):
    build_hateful_memes(tmp_path)
    (tmp_path / "train.jsonl").write_text(json.dumps({"img": "img/0.png", "text": None, "label": label}))
    assert load_hateful_memes(tmp_path)["train"]["label"][:] == [1]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"text": ["a"]}, r"train\.jsonl, row 1 has the text \['a'\]: write a string"),
        ({"img": ""}, r"train\.jsonl, row 1 has the img '': write the path of its picture"),
        ({"img": "img"}, r"row 1 has the img 'img'"),
        ({"img": None}, r"row 1 has the img None"),
        ({"label": "1"}, r"row 1 has no label 0 or 1"),
        ({"label": [1]}, r"row 1 has no label 0 or 1"),
    ],
)
def test_a_meme_that_cannot_be_used_is_named(tmp_path, said, message):
    build_hateful_memes(tmp_path)
    line = {"img": "img/0.png", "text": "a", "label": 1} | said
    (tmp_path / "train.jsonl").write_text(json.dumps(line))
    with pytest.raises(ValueError, match=message):
        load_hateful_memes(tmp_path)


@pytest.mark.parametrize(
    ("build", "load", "file"),
    [
        (build_mmimdb, load_mmimdb, "split.json"),
        (build_mmimdb, load_mmimdb, "dataset/0003.json"),
        (build_mmimdb, load_mmimdb, "dataset/0004.jpeg"),
        (build_food101, load_food101, "texts/test_titles.csv"),
        (build_hateful_memes, load_hateful_memes, "dev_seen.jsonl"),
        (build_hateful_memes, load_hateful_memes, "img/2.png"),
    ],
)
def test_a_missing_file_is_named(tmp_path, build, load, file):
    build(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{file} is missing: the layout is described in docs/reproduce.md"):
        load(tmp_path)


def test_files_that_hold_something_else_are_named(tmp_path):
    build_mmimdb(tmp_path)
    (tmp_path / "split.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"split.json holds a list, not the dict"):
        load_mmimdb(tmp_path)
    (tmp_path / "split.json").write_text("{")
    with pytest.raises(ValueError, match=r"split.json is not JSON"):
        load_mmimdb(tmp_path)
    (tmp_path / "split.json").write_text('{"train": ["0001"]}')
    with pytest.raises(ValueError, match=r"split.json has no test samples"):
        load_mmimdb(tmp_path)
    build_hateful_memes(tmp_path)
    (tmp_path / "test_seen.jsonl").write_text('{"img": "img/0.png", "text": "a"}\n')
    with pytest.raises(ValueError, match=r"test_seen.jsonl, row 1 has no label 0 or 1: get the release"):
        load_hateful_memes(tmp_path)
