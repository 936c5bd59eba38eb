"""Named tensors on disk by key: a safetensors file each, written whole or not at all, and read back as written or not.

A file is written to a temporary name and moved into place, so that a reader never sees half of it and concurrent
writers of one key leave the file of one of them. What is torn, truncated or altered afterwards fails its checksum.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def check_folder(folder: str | os.PathLike, what: str) -> None:
    """ValueError where `folder`, which `what` needs, is a file or lies in one, or is not there and cannot be made."""
    place = Path(folder)
    if (name := os.fspath(folder)) != name.encode(errors="replace").decode():
        raise ValueError(f"{name!r} is no name in UTF-8, which files of tensors need: choose another folder")
    there = next(place for place in (place, *place.absolute().parents) if place.exists())
    if not there.is_dir():
        raise ValueError(f"{folder} cannot be used, since {there} is a file: {what} needs a folder")
    if there != place and not os.access(there, os.W_OK):  # a folder that is there may hold all that is asked
        raise ValueError(f"{folder} cannot be made: {there} may not be written to")


class TensorFiles:
    """`{name: tensor}` by key under `folder`, which need not exist yet. A key is a hash of what its tensors depend on.

    Raises:
        ValueError: `folder` is a file or lies in one, or it is not there and cannot be made.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     files = TensorFiles(folder)
    ...     files.write(digest("a key"), {"x": torch.tensor([1, 2])})
    ...     files.read(digest("a key")), files.read(digest("another"))
    ({'x': tensor([1, 2])}, None)
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        check_folder(folder, "a cache")

    def read(self, key: str) -> dict[str, Tensor] | None:
        """The tensors of `key`; None where there are none, or their file is not what was written."""
        try:
            with safe_open(self._path(key), "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
                expected = (file.metadata() or {}).get("checksum")
        except (OSError, SafetensorError, ValueError):
            return None
        return tensors if expected == _checksum(tensors) else None

    def write(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep the tensors under `key`, in place of any that are there. Raises OSError where the disk does."""
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
        os.close(handle)
        try:
            contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
            save_file(contiguous, temporary, metadata={"checksum": _checksum(contiguous)})
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"


def digest(prefix: str, *named: tuple[str, Tensor]) -> str:
    """sha256 of a text and of tensors: their names, dtypes, shapes and bytes."""
    found = hashlib.sha256(prefix.encode())
    for name, tensor in named:
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(_bytes(tensor))
    return found.hexdigest()


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    return digest("", *sorted(tensors.items()))


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().flatten()
    return memoryview(flat.view(torch.uint8).numpy())
