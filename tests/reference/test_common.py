"""The task loss is that of Hugging Face's classifiers."""

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from u2a_fast.reference.common import task_loss

CONFIG = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 20}


@pytest.mark.parametrize(
    ("num_labels", "labels"),
    [
        (1, torch.randn(4)),
        (3, torch.tensor([0, 2, 1, 1])),
        (3, torch.tensor([[0.0, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 1]])),
    ],
)
def test_problem_types(num_labels, labels):
    classifier = BertForSequenceClassification(BertConfig(num_labels=num_labels, **CONFIG)).eval()
    out = classifier(input_ids=torch.randint(0, 20, (4, 5)), labels=labels)
    torch.testing.assert_close(task_loss(out.logits, labels, None), out.loss)
    torch.testing.assert_close(task_loss(out.logits, labels, classifier.config.problem_type), out.loss)
