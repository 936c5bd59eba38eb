"""The table of what was measured on a device: read where it is, ignored where it is not or is damaged."""

import json

import pytest
import torch

from u2a_fast import device_table

ENTRIES = {
    device_table.entry_of(2304, 768, 2048): {"wins": "own"},
    device_table.entry_of(2304, 768, 6304): {"wins": "own"},
    device_table.entry_of(2304, 768, 12608): {"wins": "library"},
    device_table.entry_of(768, 768, 2048): {"wins": "library"},
}


def test_most_of_the_measured_row_counts_decide():
    assert len(ENTRIES) == 4
    assert device_table.own_wins(ENTRIES, 2304, 768)
    assert not device_table.own_wins(ENTRIES, 768, 768)
    assert not device_table.own_wins(ENTRIES, 3072, 768)  # never measured


@pytest.mark.parametrize("content", [None, "{", "[]", json.dumps({"another device": ENTRIES})])
def test_without_a_table_of_this_device_there_are_no_entries(content, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "this device")
    if content is not None:
        device_table.path().parent.mkdir()
        device_table.path().write_text(content)
    assert device_table.of_device(torch.device("cuda")) == {}


def test_the_entries_of_this_device_are_found(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "this device")
    device_table.path().parent.mkdir()
    device_table.path().write_text(json.dumps({device_table.key_of("this device"): ENTRIES}))
    assert device_table.of_device(torch.device("cuda")) == ENTRIES
