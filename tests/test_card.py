"""The card of a model, whatever its folder is called."""

import ast
from types import SimpleNamespace

import datasets
import pytest
import torch

from u2a_fast.card import write_card
from u2a_fast.options import TrainOptions


@pytest.mark.parametrize("name", ["plain", 'q "x"', "it's", "back\\slash", "Äpfel \N{RED APPLE}", "{title}"])
def test_the_snippet_is_python_whatever_the_folder_is_called(name, tmp_path):
    (tmp_path / name).mkdir()
    config = SimpleNamespace(
        modalities=("text",), num_labels=2, problem_type=None, encoders={"text": "a"},
        encoder_dtypes={"text": torch.float32},
    )  # fmt: skip
    model = SimpleNamespace(
        config=config, get_nb_trainable_parameters=lambda: (1, 2), problem_type=lambda _: "regression"
    )
    rows = datasets.Dataset.from_list([{"text": "a", "label": 0.5}])
    holed = SimpleNamespace(pattern=None, summary=lambda: "none.")
    options = TrainOptions(output_dir=str(tmp_path / name), data="t.csv", method="u2a")
    write_card(model, options, [{"scenario": "full", "mae": 0.5, "n": 1}], holed, rows)
    snippet = (tmp_path / name / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    (call,) = [node for node in ast.walk(ast.parse(snippet)) if isinstance(node, ast.Call) and len(node.args) == 1
               and isinstance(node.args[0], ast.Constant)]  # fmt: skip
    assert call.args[0].value == name
