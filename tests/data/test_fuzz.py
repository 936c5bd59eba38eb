"""A few hundred of the malformed files, tables, labels, lines and models of `make fuzz`."""

import fuzz
import fuzz_models
import pytest


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    return fuzz_models.world(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("case", range(len(fuzz.CASES)), ids=[case.__name__ for case in fuzz.CASES])
def test_malformed_input_is_used_or_refused_in_a_sentence(case, given):
    outcomes = [fuzz.attempt(number, given) for number in range(case, 600, len(fuzz.CASES))]
    assert {"fine", "refused"} == set(outcomes)
