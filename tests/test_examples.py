"""The notebooks in examples/ run from top to bottom, offline."""

import json
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run_notebook(name):
    """Execute the cells in this process and give back the names they made."""
    notebook = json.loads((EXAMPLES / f"{name}.ipynb").read_text(encoding="utf-8"))
    names = {"__name__": "__main__"}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None  # what is committed is the source alone
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    return names


@pytest.mark.slow
@pytest.mark.real
def test_missing_modalities_in_five_minutes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run_notebook("missing_modalities")
    for row in names["rows"]:
        assert row["accuracy"] > row["majority"], row


@pytest.mark.slow
def test_a_large_text_encoder_in_4_bits(tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    monkeypatch.chdir(tmp_path)
    names = run_notebook("qlora_text")
    assert sum(names["losses"][-5:]) < sum(names["losses"][:5]) / 1.5
    assert names["rows"][0].total < 6 * 2**30
    for model in (names["model"], names["again"]):
        assert {str(linear.weight.dtype) for linear in model.encoders["text"].blocks[0].linears} == {"torch.uint8"}
