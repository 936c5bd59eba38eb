"""Training: a data set is one entry of one table."""

from u2a_fast import options


def test_a_data_set_is_one_entry(monkeypatch):
    entry = options.BuiltinData(lambda seed: {"train": seed}, options.Recipe(image_size=8))
    monkeypatch.setitem(options.DATASETS, "toy", entry)
    asked = options.TrainOptions(data="toy", seed=3)
    assert options.DATASETS["toy"].load(seed=3) == {"train": 3}
    assert options.settled(asked, {"train": None}).image_size == 8
