"""A key's tensors come back as they were written, or not at all."""

import pytest
import torch

from u2a_fast.tensor_files import TensorFiles, digest

TENSORS = {
    "floats": {"x": torch.randn(2, 3)},
    "two, one not contiguous": {"x": torch.arange(6).reshape(2, 3).T, "y": torch.tensor([True])},
    "bfloat16": {"x": torch.randn(4).bfloat16()},
    "nothing in it": {"x": torch.empty(0, 5)},
}


@pytest.mark.parametrize("tensors", TENSORS.values(), ids=TENSORS)
def test_what_was_written_is_read_again(tensors, tmp_path):
    TensorFiles(tmp_path / "new" / "folder").write(digest("a"), tensors)
    found = TensorFiles(tmp_path / "new" / "folder").read(digest("a"))
    assert found.keys() == tensors.keys()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )


def test_another_key_and_an_absent_folder_hold_nothing(tmp_path):
    files = TensorFiles(tmp_path / "folder")
    assert files.read(digest("a")) is None and not files.folder.exists()
    files.write(digest("a"), {"x": torch.ones(1)})
    assert files.read(digest("b")) is None


def test_the_last_writer_wins(tmp_path):
    files = TensorFiles(tmp_path)
    for number in (1, 2):
        files.write(digest("a"), {"x": torch.tensor(number)})
    assert files.read(digest("a"))["x"] == 2
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 1


@pytest.mark.parametrize("folder", ["file", "file/of/mine"])
def test_a_file_in_place_of_the_folder_is_refused(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is a file: a cache needs a folder"):
        TensorFiles(tmp_path / folder)


def test_a_folder_that_cannot_be_made_is_refused_and_one_that_may_be_read_is_not(tmp_path, monkeypatch):
    TensorFiles(tmp_path).write(digest("a"), {"x": torch.ones(1)})
    monkeypatch.setattr("os.access", lambda path, mode: False)  # the superuser may write everywhere
    with pytest.raises(ValueError, match="cannot be made"):
        TensorFiles(tmp_path / "new" / "folder")
    assert TensorFiles(tmp_path).read(digest("a")) is not None


def test_a_name_that_no_tensor_file_can_have_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is no name in UTF-8, which files of tensors need: choose another folder"):
        TensorFiles(tmp_path / "d\udcff" / "cache")


@pytest.mark.parametrize("other", [("y", torch.ones(2)), ("x", torch.ones(2, 1)), ("x", torch.ones(2).double())])
def test_names_shapes_and_dtypes_are_part_of_a_digest(other):
    assert digest("", ("x", torch.ones(2))) == digest("", ("x", torch.ones(2)))
    assert digest("", ("x", torch.ones(2))) != digest("", other)
