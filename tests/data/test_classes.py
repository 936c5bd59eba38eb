import pytest

from u2a_fast.data.classes import Classes


def test_classes_of_an_earlier_version_are_found_however_blank():
    assert Classes(["hot  dog", "New\u00a0York"]).number("New York") == 1


def test_of_many_classes_some_are_named():
    with pytest.raises(ValueError, match=r"no class 'z': its classes are 0, 1, .*, 9 and 5 more; leave such rows out$"):
        Classes([str(i) for i in range(15)]).number("z")
    with pytest.raises(ValueError, match="its classes are a, b; leave"):
        Classes(["a", "b"]).number("z")
