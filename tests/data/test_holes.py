import io

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from u2a_fast.data import MissingPattern, with_missing

PAIR = ("image", "text")


PICTURE = io.BytesIO()
Image.new("RGB", (2, 2)).save(PICTURE, "png")
PICTURE = PICTURE.getvalue()


def samples(n=100):
    return [{"image": PICTURE, "text": f"text {index}", "label": index} for index in range(n)]


def presence(dataset):
    rows = [dataset[index] for index in range(len(dataset))]
    return torch.tensor([[row[modality] is not None for modality in PAIR] for row in rows])


def test_the_table_decides_what_is_left():
    table = MissingPattern(seed=2).table(100, PAIR)
    assert torch.equal(presence(with_missing(samples(), table, PAIR)), table)


def test_a_pattern_stands_for_its_table():
    pattern = MissingPattern(seed=2)
    assert torch.equal(presence(with_missing(samples(), pattern, PAIR)), pattern.table(100, PAIR))


def test_the_data_underneath_and_other_columns_are_left_alone():
    data = samples()
    holed = with_missing(data, MissingPattern(rate=1), PAIR)
    assert [holed[index]["label"] for index in range(100)] == list(range(100))
    assert data == samples()


@pytest.mark.parametrize("hole", [None, float("nan"), "", {"path": None, "bytes": None}, "no key"])
def test_natural_holes_stay_and_no_sample_loses_everything(hole):
    data = samples(3)
    for row in data[:2]:
        row["image"] = hole
        if hole == "no key":
            del row["image"]
    table = torch.tensor([[True, False], [False, True], [True, True]])
    holed = with_missing(data, table, PAIR)
    for index in range(2):
        assert holed[index]["image"] is None
        assert holed[index]["text"] == f"text {index}"


def test_a_fixed_table_is_the_same_in_every_epoch():
    holed = with_missing(samples(), MissingPattern(), PAIR)
    before = presence(holed)
    holed.set_epoch(1)
    assert torch.equal(presence(holed), before)


def test_a_simulated_table_is_another_one_in_every_epoch_and_repeatable():
    holed = with_missing(samples(), MissingPattern(), PAIR, simulate=True)
    seen = []
    for epoch in (0, 1, 2, 0):
        holed.set_epoch(epoch)
        seen.append(presence(holed))
        assert (~seen[-1]).any(dim=1).sum() == 70
    assert torch.equal(seen[0], seen[3])
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


def test_accelerate_passes_the_epoch_on():
    from accelerate.data_loader import prepare_data_loader

    holed = with_missing(samples(), MissingPattern(), PAIR, simulate=True)
    loader = prepare_data_loader(DataLoader(holed, collate_fn=list, batch_size=50), put_on_device=False)
    epochs = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        epochs.append([row["text"] is None for batch in loader for row in batch])
    assert epochs[0] != epochs[1]


def test_simulation_needs_a_pattern():
    with pytest.raises(ValueError, match="MissingPattern"):
        with_missing(samples(), torch.ones(100, 2, dtype=torch.bool), PAIR, simulate=True)


@pytest.mark.parametrize("simulate", [False, True])
def test_a_modality_that_is_no_column_is_refused(simulate):
    with pytest.raises(ValueError, match="no sample has a column 'txt'; there are image, text, label"):
        with_missing(samples(), MissingPattern(), ("image", "txt"), simulate)


def test_no_samples_need_no_columns():
    assert len(with_missing([], MissingPattern(), PAIR)) == 0


@pytest.mark.parametrize("shape", [(99, 2), (100, 3)])
def test_a_table_of_another_size_is_refused(shape):
    with pytest.raises(ValueError, match=r"the missing table is"):
        with_missing(samples(), torch.ones(shape, dtype=torch.bool), PAIR)


@pytest.mark.slow
def test_it_works_on_a_hugging_face_dataset():
    import datasets

    data = datasets.Dataset.from_list(samples())
    pattern = MissingPattern()
    assert torch.equal(presence(with_missing(data, pattern, PAIR)), pattern.table(100, PAIR))
