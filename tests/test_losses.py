"""A balanced loss takes the labels that the task's own loss takes."""

import pytest
import tiny_encoders
import torch
from torch.nn import functional as F

from u2a_fast.losses import balanced
from u2a_fast.methods import LateFusion


@pytest.mark.parametrize(
    "labels",
    [torch.tensor([0, 1, 1, -100]), torch.tensor([0, 1, 1, -100]).int(), torch.tensor([False, True, True])],
    ids=str,
)
def test_classes_of_every_dtype_and_samples_without_one_are_weighed(labels):
    model = LateFusion({"text": tiny_encoders.build("bert")}, num_labels=2)
    logits = torch.randn(len(labels), 2)
    expected = F.cross_entropy(logits[:3], torch.tensor([0, 1, 1]), weight=torch.tensor([3 / 2, 3 / 4]))
    torch.testing.assert_close(balanced(model, labels)(logits, labels), expected)
