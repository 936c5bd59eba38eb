"""A few hundred of the malformed files, tables, labels and lines of `make fuzz`."""

import fuzz
import pytest


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return fuzz.tiny_model(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("case", range(len(fuzz.CASES)), ids=[case.__name__ for case in fuzz.CASES])
def test_malformed_input_is_used_or_refused_in_a_sentence(case, model):
    outcomes = [fuzz.attempt(number, model) for number in range(case, 300, len(fuzz.CASES))]
    assert {"fine", "refused"} == set(outcomes)
