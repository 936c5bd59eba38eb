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


@pytest.mark.parametrize("dtype", [torch.float32, torch.long, torch.bool], ids=str)
def test_marks_of_every_dtype_are_weighed(dtype):
    model = LateFusion({"text": tiny_encoders.build("bert")}, num_labels=2, problem_type="multi_label_classification")
    marks, logits = torch.tensor([[1, 0], [1, 1], [0, 1], [1, 0]]).to(dtype), torch.randn(4, 2)
    expected = F.binary_cross_entropy_with_logits(logits, marks.float(), pos_weight=torch.tensor([1 / 3, 2 / 2]))
    torch.testing.assert_close(balanced(model, marks)(logits, marks), expected)


def test_a_class_that_the_model_does_not_have_is_named():
    model = LateFusion({"text": tiny_encoders.build("bert")}, num_labels=2)
    with pytest.raises(ValueError, match="label 2 is out of range"):
        balanced(model, torch.tensor([0, 2]))
