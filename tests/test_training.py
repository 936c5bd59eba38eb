"""A data set that `--data` knows by name is one entry of one table."""

from u2a_fast import data, training


def test_a_data_set_is_one_entry(monkeypatch):
    monkeypatch.setitem(training.DATASETS, "toy", training.BuiltinData(lambda seed: {"train": seed}, image_size=8))
    monkeypatch.setattr(data, "dinov2_folder", lambda image_size: f"dinov2-{image_size}")
    assert training.load_splits("toy", 3) == {"train": 3}
    assert training.default_encoders("toy", ["image", "label"]) == {"image": "dinov2-8"}
    assert training.default_encoders("a/table.csv", ["image", "label"]) == {"image": "dinov2-224"}
