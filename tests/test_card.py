"""The card of a model, whatever its folder is called."""

import ast
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import tiny_data
import torch

from u2a_fast.card import data_hash, write_card
from u2a_fast.data import load_table
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


def test_the_data_hash_follows_content_and_not_place(tmp_path):
    tables = {name: load_table(tiny_data.write_table(tmp_path / name, 12))["train"] for name in ("a", "b")}
    hashed = {name: data_hash(table, ("image", "text")) for name, table in tables.items()}
    assert hashed["a"] == hashed["b"]
    Path(tables["b"][0]["image"]["path"]).write_bytes(b"another picture")
    assert data_hash(tables["b"], ("image", "text")) != hashed["a"]
    assert data_hash(tables["a"].select(range(3)), ("image", "text")) != hashed["a"]
