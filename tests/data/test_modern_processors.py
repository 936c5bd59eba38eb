"""Tokenizers and image processors of the encoders of the 2020s, through the collator and `predict`."""

import json
import logging

import numpy as np
import pytest
import tiny_data
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import requires_backends

from u2a_fast import U2A, LateFusion
from u2a_fast.data import MultimodalCollator
from u2a_fast.encoders import from_pretrained_model
from u2a_fast.methods.loading import load_processor

WORDS = ["<pad>", "<unk>", "<s>", "</s>", "red", "green", "blue", "square", "thing"]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = SIZES | {"vocab_size": 20, "max_position_embeddings": 40, "pad_token_id": 0}
GROUPED = {"num_key_value_heads": 2, "head_dim": 16}
SPECIAL = {"bos_token_id": 2, "eos_token_id": 3}
ROWS = [{"text": "red square"}, {"text": "blue thing green green square"}, {"text": "green"}]

# Encoder, its sizes, what its tokenizer leaves out or does in another way, and what it puts around a text.
TOKENIZERS = {
    "XLMRoberta": (TEXT, {"cls_token": "<s>", "sep_token": "</s>"}, "<s> $A </s>"),
    "Camembert": (TEXT, {"cls_token": "<s>", "sep_token": "</s>"}, "<s> $A </s>"),
    "DistilBert": (
        {"vocab_size": 20, "max_position_embeddings": 40, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
        {
            "cls_token": "<s>",
            "sep_token": "</s>",
            "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
        },
        "<s> $A </s>",
    ),
    "ModernBert": (
        TEXT | SPECIAL | {"cls_token_id": 2, "sep_token_id": 3, "local_attention": 4},
        {"cls_token": "<s>", "sep_token": "</s>"},
        "<s> $A </s>",
    ),
    "NomicBert": (TEXT, {"cls_token": "<s>", "sep_token": "</s>"}, "<s> $A </s>"),
    "EuroBert": (TEXT | SPECIAL, {"bos_token": "<s>", "eos_token": "</s>"}, "<s> $A </s>"),
    "Qwen3": (TEXT | GROUPED, {"eos_token": "</s>", "padding_side": "left"}, "$A </s>"),
    "Llama": (TEXT | SPECIAL, {"bos_token": "<s>", "eos_token": "</s>", "pad_token": None}, "<s> $A"),
    "Mistral": (
        TEXT | SPECIAL | {"num_key_value_heads": 2, "sliding_window": 3},
        {"bos_token": "<s>", "eos_token": "</s>", "pad_token": None, "padding_side": "left"},
        "<s> $A",
    ),
    "Gemma3Text": (
        TEXT | GROUPED | SPECIAL,
        {"bos_token": "<s>", "eos_token": "</s>", "padding_side": "left"},
        "<s> $A",
    ),
}


def tokenizer_of(template="$A", **options):
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [("<s>", 2), ("</s>", 3)]
    words.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    options = {"pad_token": "<pad>", "unk_token": "<unk>"} | options
    return PreTrainedTokenizerFast(tokenizer_object=words, **options)


def encoder_of(name, sizes):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**sizes)
    return getattr(transformers, f"{name}Model")(config).eval()


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_text_alone_and_beside_longer_ones_says_the_same_as_hugging_faces_encoder(name):
    sizes, options, template = TOKENIZERS[name]
    theirs, tokenizer = encoder_of(name, sizes), tokenizer_of(template, **options)
    model = LateFusion({"text": theirs}, num_labels=3, lora=None, processors={"text": tokenizer}).eval()
    together = model.predict(ROWS)
    encoder = model.encoders["text"]
    for row, logits in zip(ROWS, together, strict=True):
        (alone,) = model.predict([row])
        torch.testing.assert_close(alone, logits, atol=1e-5, rtol=1e-5)
        hidden = theirs(**tokenizer(row["text"], return_tensors="pt")).last_hidden_state
        expected = model.head(encoder.class_token(hidden))[0]
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_an_absent_text_changes_nothing_for_the_others(name):
    sizes, options, template = TOKENIZERS[name]
    encoders = {
        "text": encoder_of(name, sizes),
        "image": encoder_of("ViT", SIZES | {"image_size": 24, "patch_size": 8}),
    }
    given = {"text": tokenizer_of(template, **options), "image": tiny_data.image_processor()}
    samples = [{**tiny_data.samples(2)[i], "text": text} for i, text in enumerate(("red square", None))]
    for absent in ("pack", "where"):
        model = U2A(encoders, num_labels=3, processors=given, absent=absent).eval()
        got = model.predict(samples)
        assert got.isfinite().all()
        torch.testing.assert_close(got[:1], model.predict(samples[:1]), atol=1e-5, rtol=1e-5)


def test_the_end_token_pads_where_there_is_no_padding_token(caplog):
    tokenizer = tokenizer_of("<s> $A", bos_token="<s>", eos_token="</s>", pad_token=None)
    with caplog.at_level(logging.WARNING):
        text = MultimodalCollator({"text": tokenizer})(ROWS)["text"]
        MultimodalCollator({"text": tokenizer})
    assert text["input_ids"][2].tolist() == [2, 5, 3, 3, 3, 3]
    assert text["attention_mask"].sum(dim=1).tolist() == [3, 6, 2]
    assert len(caplog.messages) == 1 and "the tokenizer for text has no padding token: its end token" in caplog.text


def test_a_tokenizer_with_nothing_to_pad_with_is_refused_with_the_cure():
    with pytest.raises(ValueError, match="'text' has neither a padding nor an end token: set its pad_token"):
        MultimodalCollator({"text": tokenizer_of(pad_token=None)})


# --------------------------------------------------------------------------------------------------------------- SigLIP
def siglip(name="Siglip"):
    sizes = SIZES | {"vocab_size": 20, "max_position_embeddings": 12, "projection_size": 32, "pad_token_id": 0}
    torch.manual_seed(0)
    return getattr(transformers, f"{name}TextModel")(getattr(transformers, f"{name}TextConfig")(**sizes)).eval()


@pytest.mark.parametrize("name", ["Siglip", "Siglip2"])
def test_texts_of_siglip_are_padded_to_its_length_and_the_padding_is_seen(name):
    theirs, tokenizer = siglip(name), tokenizer_of("$A </s>", eos_token="</s>")
    model = LateFusion({"text": theirs}, num_labels=3, lora=None, processors={"text": tokenizer}).eval()
    batch = MultimodalCollator(model.processors)([*ROWS, {"text": None}])
    assert list(batch["text"]) == ["input_ids"] and batch["text"]["input_ids"].shape == (4, 12)
    assert batch["text"]["input_ids"][3].tolist() == [3, *[0] * 11]
    texts = [row["text"] for row in ROWS]
    ids = tokenizer(texts, padding="max_length", max_length=12, truncation=True, return_tensors="pt")["input_ids"]
    expected = model.head(theirs(input_ids=ids).last_hidden_state[:, -1])  # the row that SigLIP pools
    torch.testing.assert_close(model.predict(ROWS), expected, atol=1e-5, rtol=1e-5)


def test_siglips_own_tokenizer_pads_to_its_length_without_a_model():
    tokenizer = transformers.Siglip2Tokenizer()
    assert MultimodalCollator({"text": tokenizer})(ROWS)["text"]["input_ids"].shape == (3, 64)


@pytest.mark.parametrize("absent", ["pack", "where"])
def test_pictures_of_any_shape_reach_siglip_2(absent):
    from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

    processor = Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16)
    torch.manual_seed(0)
    config = transformers.Siglip2VisionConfig(**SIZES, patch_size=8, num_patches=16)
    theirs = transformers.Siglip2VisionModel(config).eval()
    wide = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 60, 3), dtype=np.uint8))
    pictures = [wide, wide.transpose(Image.Transpose.ROTATE_90), wide.crop((0, 0, 20, 20))]
    image = MultimodalCollator({"image": processor})([{"image": each} for each in (*pictures, None)])["image"]
    assert image["spatial_shapes"].tolist() == [[2, 6], [6, 2], [4, 4], [0, 0]]
    assert image["pixel_attention_mask"].sum(dim=1).tolist() == [12, 12, 16, 16]
    encoders = {"image": theirs, "text": encoder_of("Bert", TEXT)}
    given = {"image": processor, "text": tiny_data.tokenizer()}
    model = U2A(encoders, num_labels=3, processors=given, absent=absent).eval()
    got = model.predict([*({"image": each, "text": "red"} for each in pictures), {"text": "red"}])
    assert got.isfinite().all()
    for logits, each in zip(got, pictures, strict=False):
        torch.testing.assert_close(model.predict([{"image": each, "text": "red"}])[0], logits, atol=1e-5, rtol=1e-5)
    ours = from_pretrained_model(theirs)(**{name: value[:3] for name, value in image.items()})
    inputs = {name: value[:3] for name, value in image.items()}
    expected = theirs(**inputs).last_hidden_state
    real = inputs["pixel_attention_mask"].bool()
    torch.testing.assert_close(ours[real], expected[real], atol=1e-5, rtol=1e-5)


# --------------------------------------------------------------------------------------------------------------- DINOv3
def test_dinov3s_pictures_are_processed_without_torchvision(tmp_path, caplog):
    settings = {
        "image_processor_type": "DINOv3ViTImageProcessorFast",
        "size": {"height": 24, "width": 24},
        "resample": 2,
    }
    settings |= {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "do_center_crop": None}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    with caplog.at_level(logging.WARNING):
        processor = load_processor("image", str(tmp_path))
    assert "needs torchvision" in caplog.text
    pixels = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    got = MultimodalCollator({"image": processor})([{"image": pixels}])["image"]["pixel_values"]
    mean, std = (torch.tensor(settings[name]).view(3, 1, 1) for name in ("image_mean", "image_std"))
    exact = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255  # scaled before it is resized, as theirs is
    exact = torch.nn.functional.interpolate(exact, size=(24, 24), mode="bilinear", antialias=True)
    levels = (got * std + mean - exact).abs() * 255
    assert levels.max() <= 1  # Pillow rounds to 8 bits after each of its two passes
    processor.save_pretrained(tmp_path / "again")
    again = load_processor("image", str(tmp_path / "again"))
    assert torch.equal(MultimodalCollator({"image": again})([{"image": pixels}])["image"]["pixel_values"], got)


def test_a_processor_whose_package_is_missing_says_so_in_a_sentence(monkeypatch):
    def needs_a_package(source, **options):
        requires_backends("It", ["torchvision"])

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", needs_a_package)
    message = r"the processor for 'text' in a folder needs a package: install it.*orchvision"
    with pytest.raises(ValueError, match=message) as caught:
        load_processor("text", "a folder")
    assert "\n" not in str(caught.value)
