"""A few hundred of the malformed files, tables, labels, lines and models of `make fuzz`."""

from pathlib import Path

import fuzz
import fuzz_models
import pytest


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    return fuzz_models.world(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.slow
@pytest.mark.parametrize("case", range(len(fuzz.CASES)), ids=[case.__name__ for case in fuzz.CASES])
def test_malformed_input_is_used_or_refused_in_a_sentence(case, given):
    outcomes = [fuzz.attempt(number, given) for number in range(case, 600, len(fuzz.CASES))]
    assert {"fine", "refused"} == set(outcomes)


def test_code_of_a_folder_that_runs_is_noticed(given, monkeypatch):
    def trusting(encoders, **_):
        for code in Path(encoders["text"]).glob("*.py"):
            exec(code.read_text())

    monkeypatch.setattr(fuzz_models, "U2A", trusting)
    first = fuzz.CASES.index(fuzz_models.try_encoder)
    with pytest.raises(fuzz.Broken, match="a file was written"):
        for number in range(first, 600, len(fuzz.CASES)):
            fuzz.attempt(number, given)
    (given.saved.parent / "ran").unlink()
