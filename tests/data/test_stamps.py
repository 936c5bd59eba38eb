import subprocess
from collections import Counter

import pytest

from u2a_fast.data import MissingPackageError, fetch_stamps, load_stamps
from u2a_fast.data.stamps import STAMPS


@pytest.fixture
def folder(tmp_path):
    """Fifteen animals, twelve plants and two hobbies; every third animal speaks French."""
    for label, count in {"animals": 15, "plants": 12, "hobbies": 2}.items():
        place = tmp_path / STAMPS / label / "deeper"
        place.mkdir(parents=True)
        for number in range(count):
            (place / f"{number}.png").touch()
            (place / f"{number}.txt").write_text(f"{label} {number}.\nfr.utf8=autre {number}\n")
            if number % 3 == 0:
                (place / f"{number}_desc_fr.ogg").touch()
    return tmp_path


def rows(splits):
    return [row for part in splits.values() for row in part]


@pytest.mark.slow
def test_small_classes_mirrors_alphabets_and_pictures_without_caption_are_left_out(folder):
    animals = folder / STAMPS / "animals"
    letters = animals / "alphabets"
    letters.mkdir()
    for path in (animals / "0_mirror", letters / "a"):
        path.with_suffix(".png").touch()
        path.with_suffix(".txt").write_text("x\n")
    (animals / "nameless.png").touch()
    splits = load_stamps(folder)
    assert splits["train"].features["label"].names == ["animals", "plants"]
    assert len(rows(splits)) == 27


def test_recordings_that_do_not_exist_are_holes(folder):
    for row in rows(load_stamps(folder)):
        number = int(row["text"].split()[1].rstrip("."))
        assert (row["audio"] is not None) == (number % 3 == 0)
        if row["audio"] is not None:
            assert row["audio"]["path"].endswith(f"/{number}_desc_fr.ogg")
    assert all(row["audio"] is None for row in rows(load_stamps(folder, language="es")))


def test_stamps_with_the_same_caption_stay_together(folder):
    for number in range(15):
        (folder / STAMPS / "animals" / "deeper" / f"{number}.txt").write_text(f"A frog{'.' * (number % 2)}\n")
    for part in ("a frog", "a frog."):
        homes = [name for name, split in load_stamps(folder).items() if part in split["group"]]
        assert len(homes) == 1


def test_the_inner_folder_is_found_too(folder):
    assert len(rows(load_stamps(folder / STAMPS))) == 27


@pytest.mark.parametrize("language", ["en", "nl", "da", "xx"])
def test_languages_whose_presence_tells_the_class_are_refused(folder, language):
    with pytest.raises(ValueError, match=f"fr, es, ro, ru, not '{language}'"):
        load_stamps(folder, language=language)


def test_another_folder_is_refused_with_the_commands(tmp_path):
    with pytest.raises(ValueError, match="apt-get download tuxpaint-stamps-default"):
        load_stamps(tmp_path)


def fail(command, **_):
    raise subprocess.CalledProcessError(100, command, stderr="W: something\nE: Unable to locate package")


def bring_another_file(command, cwd, **_):
    if command[0] == "apt-get":
        with open(f"{cwd}/tuxpaint-stamps-default_2022.06.04-1_all.deb", "wb") as file:
            file.write(b"other")


def no_program(command, **_):
    raise FileNotFoundError(2, "No such file", command[0])


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (fail, r"could not be fetched \(E: Unable to locate package\)"),
        (no_program, "apt-get could not be started"),
        (bring_another_file, "another file than the known"),
    ],
)
def test_a_fetch_that_fails_says_why_and_what_to_run(monkeypatch, tmp_path, capsys, run, reason):
    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(MissingPackageError, match=reason) as caught:
        fetch_stamps(tmp_path)
    assert "`apt-get download tuxpaint-stamps-default`" in str(caught.value)
    assert "`dpkg -x tuxpaint-stamps-default_2022.06.04-1_all.deb FOLDER`" in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    printed = capsys.readouterr().out
    assert "GNU General Public License, version 2" in printed
    assert "https://tuxpaint.org/stamps/" in printed


@pytest.fixture(scope="module")
def stamps():
    try:
        return load_stamps()
    except MissingPackageError as error:
        pytest.skip(str(error))


@pytest.mark.real
def test_the_real_split_is_the_known_one(stamps):
    assert {name: len(part) for name, part in stamps.items()} == {"train": 393, "validation": 61, "test": 151}
    assert len(set().union(*(part["group"] for part in stamps.values()))) == 557
    names = stamps["train"].features["label"].names
    sizes = Counter(names[row["label"]] for row in rows(stamps))
    assert (sizes["animals"], sizes["symbols"], sizes["sports"], len(sizes)) == (146, 89, 12, 12)


@pytest.mark.real
@pytest.mark.parametrize(("language", "recorded"), [("fr", 591), ("es", 567), ("ro", 584), ("ru", 584)])
def test_the_real_recordings_are_the_known_ones(stamps, language, recorded):
    assert sum(row["audio"] is not None for row in rows(load_stamps(language=language))) == recorded


@pytest.mark.real
def test_real_pictures_and_recordings_decode(stamps):
    from u2a_fast.data.inputs import to_audio, to_image

    for row in stamps["validation"].select(range(0, 61, 6)):
        image = to_image(row["image"])
        assert image.mode == "RGB"
        assert image.width == image.height
        if row["audio"] is not None:
            samples = to_audio(row["audio"], 16000)
            assert 0.2 < len(samples) / 16000 < 15
            assert abs(samples).max() == pytest.approx(1)
