"""Small processors of every kind, built without a download."""

import numpy as np
import pytest
from PIL import Image

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "dog", "cat", "red", "car", "."]


@pytest.fixture(scope="session")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


@pytest.fixture(scope="session")
def image_processor():
    from transformers import ViTImageProcessor

    return ViTImageProcessor(size={"height": 8, "width": 8})


@pytest.fixture(scope="session")
def feature_extractor():
    from transformers import WhisperFeatureExtractor

    return WhisperFeatureExtractor(feature_size=8, chunk_length=1)


@pytest.fixture
def picture():
    """A 12 x 6 RGB picture with structure."""
    return Image.fromarray(np.arange(12 * 6 * 3, dtype=np.uint8).reshape(6, 12, 3))


@pytest.fixture
def clip():
    """Half a second of a 440 Hz tone at 16 kHz."""
    return np.sin(np.arange(8000) * 2 * np.pi * 440 / 16000).astype(np.float32)
