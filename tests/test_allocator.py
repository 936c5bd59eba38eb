"""Freed memory stays while it is wanted, and goes back to the system behind."""

import ctypes
import sys

import psutil
import pytest
import torch

from u2a_fast.allocator import CHOSEN, keep_freed_memory

MIB = 2**20
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="there is no glibc"
)


@pytest.fixture(autouse=True)
def _nothing_chosen(monkeypatch):
    for name in CHOSEN:
        monkeypatch.delenv(name, raising=False)


def resident():
    return psutil.Process().memory_info().rss


def left_by_a_tensor():
    """Bytes that stay with the process when 64 MiB have been written and freed."""
    before = resident()
    tensor = torch.ones(16 * MIB)
    assert resident() - before > 48 * MIB
    del tensor
    return resident() - before


def test_freed_memory_is_kept_within_and_given_back_behind():
    before = resident()
    with keep_freed_memory():
        assert left_by_a_tensor() > 48 * MIB
    assert resident() - before < 16 * MIB
    assert left_by_a_tensor() < 16 * MIB


def test_an_error_gives_it_back_too():
    before = resident()
    with pytest.raises(KeyError), keep_freed_memory():
        left_by_a_tensor()
        raise KeyError
    assert resident() - before < 16 * MIB


def test_one_within_another_leaves_the_end_to_the_outer():
    before = resident()
    with keep_freed_memory():
        with keep_freed_memory():
            pass
        assert left_by_a_tensor() > 48 * MIB
    assert resident() - before < 16 * MIB


@pytest.mark.parametrize("name", sorted(CHOSEN))
def test_what_the_environment_chose_stands(name, monkeypatch):
    monkeypatch.setenv(name, "1")
    with keep_freed_memory():
        assert left_by_a_tensor() < 16 * MIB


def test_a_decorated_function_keeps_its_name_and_result():
    @keep_freed_memory()
    def held():
        return left_by_a_tensor() > 48 * MIB

    assert held.__name__ == "held"
    assert held()
