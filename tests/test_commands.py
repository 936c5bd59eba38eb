"""What a command says when it fails."""

import pytest
import torch

from u2a_fast import training
from u2a_fast.cli import main


def test_a_full_disk_is_one_sentence(monkeypatch):
    monkeypatch.setattr(training, "train", lambda options: torch.save(torch.zeros(10**6), "/dev/full"))
    with pytest.raises(
        SystemExit, match="u2a-fast train: torch could not write a file: make sure that the disk is not"
    ):
        main(["train"])

    def broken(options):
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(training, "train", broken)
    with pytest.raises(RuntimeError, match="of ours"):
        main(["train"])
