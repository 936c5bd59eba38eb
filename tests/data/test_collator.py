import copy
import io
import itertools
import logging
import pickle
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from u2a_fast.data import MultimodalCollator

NOTHING = {
    "None": None,
    "NaN": float("nan"),
    "blank": " ",
    "empty record": {"path": None, "bytes": None},
    "no key": ...,
}


@pytest.fixture
def collate(image_processor, tokenizer, feature_extractor):
    return MultimodalCollator({"image": image_processor, "text": tokenizer, "audio": feature_extractor})


@pytest.fixture
def sample(picture, clip):
    return {"image": picture, "text": "a red dog", "audio": clip, "label": 2}


def without(sample, modality, nothing=None):
    changed = sample | {modality: nothing}
    if nothing is ...:
        del changed[modality]
    return changed


@pytest.mark.slow
def test_a_complete_batch_is_what_the_processors_give(collate, sample, picture, image_processor, tokenizer):
    batch = collate([sample, sample | {"text": "a cat"}])
    assert list(batch) == ["image", "text", "audio", "modality_mask", "labels"]
    assert batch["modality_mask"].tolist() == [[True] * 3] * 2
    assert batch["image"]["pixel_values"].shape == (2, 3, 8, 8)
    assert batch["audio"]["input_features"].shape == (2, 8, 100)
    expected = tokenizer(["a red dog", "a cat"], padding=True, return_tensors="pt")
    for name, tensor in expected.items():
        assert torch.equal(batch["text"][name], tensor)
    square = Image.new("RGB", (12, 12), "white")
    square.paste(picture, (0, 3))
    assert torch.equal(batch["image"]["pixel_values"][:1], image_processor(square, return_tensors="pt")["pixel_values"])


@pytest.mark.parametrize("nothing", NOTHING.values(), ids=NOTHING)
@pytest.mark.parametrize("modality", ["image", "text", "audio"])
def test_nothing_in_a_cell_makes_the_modality_absent_and_leaves_the_others(collate, sample, modality, nothing):
    full = collate([sample, sample, sample])
    batch = collate([sample, without(sample, modality, nothing), sample])
    column = collate.modalities.index(modality)
    expected = torch.ones(3, 3, dtype=torch.bool)
    expected[1, column] = False
    assert torch.equal(batch["modality_mask"], expected)
    for name in collate.modalities:
        for key, tensor in batch[name].items():
            rows = [0, 2] if name == modality else [0, 1, 2]
            assert torch.equal(tensor[rows], full[name][key][rows])
            assert tensor.dtype == full[name][key].dtype
    assert not collate.undecodable


def test_absent_images_and_clips_are_zeros(collate, sample):
    batch = collate([sample, without(without(sample, "image"), "audio")])
    assert not batch["image"]["pixel_values"][1].any()
    assert not batch["audio"]["input_features"][1].any()


def test_an_absent_text_keeps_one_visible_token(collate, sample, tokenizer):
    text = collate([sample, without(sample, "text")])["text"]
    assert text["attention_mask"][1].tolist() == [1, 0, 0, 0, 0]
    assert text["input_ids"][1].tolist() == [tokenizer.cls_token_id, 0, 0, 0, 0]


@pytest.mark.parametrize("modality", ["image", "text", "audio"])
def test_a_batch_in_which_nobody_has_a_modality_keeps_its_shape(collate, sample, modality):
    full, empty = collate([sample] * 2), collate([without(sample, modality)] * 2)
    assert not empty["modality_mask"][:, collate.modalities.index(modality)].any()
    assert empty[modality].keys() == full[modality].keys()
    for name, tensor in empty[modality].items():
        assert tensor.dtype == full[modality][name].dtype
        assert len(tensor) == 2
        if modality != "text":
            assert tensor.shape == full[modality][name].shape
    if modality == "text":
        assert (empty["text"]["attention_mask"].sum(dim=1) == 1).all()


def test_a_sample_with_nothing_is_passed_on(collate):
    batch = collate([{"text": None, "label": 1}])
    assert batch["modality_mask"].tolist() == [[False, False, False]]
    assert batch["labels"].tolist() == [1]


def test_the_rows_of_a_batch_do_not_depend_on_each_other(collate, sample):
    alone, together = collate([sample]), collate([without(sample, "image"), sample])
    for modality in ("image", "audio"):
        for name, tensor in alone[modality].items():
            assert torch.equal(together[modality][name][1], tensor[0])


def test_pictures_that_stay_of_unlike_sizes_are_refused_with_the_cure(picture):
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    collate = MultimodalCollator({"image": ViTImageProcessorPil(do_resize=False)})
    assert collate([{"image": picture}] * 2)["image"]["pixel_values"].shape == (2, 3, 12, 12)
    with pytest.raises(ValueError, match=r"pixel_values of unlike shapes, such as \(3, 6, 6\) and \(3, 12, 12\)"):
        collate([{"image": picture}, {"image": picture.resize((6, 6))}])


def test_an_undecodable_file_is_absent_counted_and_logged_once(collate, sample, tmp_path, caplog):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG nonsense")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            batch = collate([sample, sample | {"image": {"path": str(broken), "bytes": None}}])
    assert batch["modality_mask"][:, 0].tolist() == [True, False]
    assert collate.undecodable == {"image": 3}
    assert len(caplog.messages) == 1
    assert str(broken) in caplog.text


def test_of_many_broken_files_a_few_are_named(collate, caplog):
    with caplog.at_level(logging.WARNING):
        collate([{"text": "a", "image": f"/nowhere/{number}.png"} for number in range(100)])
    assert collate.undecodable == {"image": 100}
    assert len(caplog.messages) == 6 and "counted, not named" in caplog.messages[-1]


def test_an_undecodable_clip_is_absent(collate, sample):
    pytest.importorskip("soundfile")
    batch = collate([sample | {"audio": b"nonsense"}])
    assert batch["modality_mask"].tolist() == [[True, True, False]]
    assert collate.undecodable == {"audio": 1}


def test_columns_that_trainer_dropped_are_explained(collate):
    with pytest.raises(ValueError, match=r"TrainingArguments\(remove_unused_columns=False\)"):
        collate([{"label": 1}, {"label": 0}])


def test_the_order_of_the_processors_is_the_order_of_the_modalities(image_processor, tokenizer, sample):
    collate = MultimodalCollator({"text": tokenizer, "image": image_processor})
    assert collate.modalities == ("text", "image")
    assert collate([without(sample, "image")])["modality_mask"].tolist() == [[True, False]]


@pytest.mark.parametrize(
    ("labels", "dtype", "expected"),
    [
        ([0, 2], torch.int64, [0, 2]),
        ([np.int32(0), torch.tensor(2)], torch.int64, [0, 2]),
        ([True, False], torch.int64, [1, 0]),
        ([0.5, 2.0], torch.float32, [0.5, 2.0]),
        ([[0, 1], [1, 1]], torch.float32, [[0, 1], [1, 1]]),
        ([np.array([0, 1]), np.array([1, 1])], torch.float32, [[0, 1], [1, 1]]),
    ],
)
@pytest.mark.parametrize("name", ["label", "labels"])
def test_labels_keep_their_meaning(collate, name, labels, dtype, expected):
    result = collate([{"text": "a", name: label} for label in labels])["labels"]
    assert result.dtype == dtype
    assert result.tolist() == expected


@pytest.mark.parametrize("samples", [[{"text": "a"}], [{"text": "a", "label": None}]])
def test_without_labels_there_are_none(collate, samples):
    assert "labels" not in collate(samples)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([1, None], "1 of 2 samples have no label"),
        ([1.0, float("nan")], "1 of 2 samples have no label"),
        (["dog", "cat"], "ClassLabel"),
        ([[1], [1, 2]], "same length"),
        ([0.5, float("inf")], "a label holds inf"),
        ([[1, float("nan")], [0, 1]], "a label holds nan"),
        ([torch.tensor(float("nan"))], "a label holds nan"),
    ],
)
def test_labels_that_make_no_sense_are_refused(collate, labels, message):
    with pytest.raises(ValueError, match=message):
        collate([{"text": "a", "label": label} for label in labels])


def test_other_columns_are_ignored(collate, sample):
    batch = collate([sample | {"group": "g", "idx": 3, "note": object()}])
    assert list(batch) == ["image", "text", "audio", "modality_mask", "labels"]


def test_a_text_that_is_no_string_is_a_mistake(collate):
    with pytest.raises(TypeError, match="column text holds the int"):
        collate([{"text": 3}])


def test_a_tokenizer_that_leaves_the_mask_out_is_asked_for_it(tokenizer, collate, monkeypatch):
    monkeypatch.setattr(tokenizer, "model_input_names", ["input_ids"])
    assert collate([{"text": "a"}, {"text": None}])["text"]["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_long_texts_are_cut(collate):
    assert collate([{"text": "dog " * 2000}])["text"]["input_ids"].shape == (1, 512)


def test_texts_are_padded_on_the_right_whatever_the_tokenizer_prefers(tokenizer, collate, monkeypatch):
    monkeypatch.setattr(tokenizer, "padding_side", "left")
    text = collate([{"text": "a"}, {"text": "a red dog"}])["text"]
    assert text["attention_mask"][0].tolist() == [1, 1, 1, 0, 0]


@pytest.mark.parametrize("side", ["right", "left"])
def test_clips_are_padded_on_the_right_whatever_the_extractor_prefers(side):
    from transformers import Wav2Vec2FeatureExtractor

    extractor = Wav2Vec2FeatureExtractor(padding_side=side)
    audio = MultimodalCollator({"audio": extractor})([{"audio": np.ones(400)}, {"audio": np.ones(300)}])["audio"]
    assert audio["attention_mask"][1].tolist() == [1] * 300 + [0] * 100
    assert extractor.padding_side == side


@pytest.mark.parametrize("preferred", [False, True])
def test_clips_of_different_length_are_padded_together_behind_a_mask(preferred):
    from transformers import Wav2Vec2FeatureExtractor

    collate = MultimodalCollator({"audio": Wav2Vec2FeatureExtractor(return_attention_mask=preferred)})
    audio = collate([{"audio": np.ones(400)}, {"audio": np.ones(300)}, {"audio": None}])["audio"]
    assert audio["input_values"].shape == (3, 400)
    assert audio["attention_mask"].sum(dim=1).tolist() == [400, 300, 400]


@pytest.mark.parametrize("name", ["wav2vec2_stable", "hubert"])
def test_the_logits_of_a_clip_do_not_change_beside_a_longer_one(name, tokenizer):
    import tiny_encoders
    from transformers import Wav2Vec2FeatureExtractor

    from u2a_fast import U2A

    # With group norm, the default, a convolution already sees the padding.
    encoders = {
        "audio": tiny_encoders.build(name, feat_extract_norm="layer", conv_bias=True),
        "text": tiny_encoders.build("bert"),
    }
    processors = {"audio": Wav2Vec2FeatureExtractor(), "text": tokenizer}
    model = U2A(encoders, num_labels=3, processors=processors)
    noise = np.random.default_rng(0).standard_normal(3000)
    alone = model.predict([{"audio": noise[:400]}])
    beside = model.predict([{"audio": noise[:400]}, {"audio": noise}])
    torch.testing.assert_close(beside[:1], alone, atol=1e-5, rtol=1e-5)


def test_spectrograms_keep_their_window_and_get_no_mask(collate, clip):
    from transformers import ASTFeatureExtractor

    pytest.importorskip("scipy")
    assert list(collate([{"audio": clip}])["audio"]) == ["input_features"]
    collate = MultimodalCollator({"audio": ASTFeatureExtractor(num_mel_bins=16, max_length=32)})
    audio = collate([{"audio": clip}, {"audio": None}])["audio"]
    assert list(audio) == ["input_values"]
    assert audio["input_values"].shape == (2, 32, 16)


def test_of_a_combined_processor_the_fitting_part_is_used(image_processor, tokenizer):
    from transformers import CLIPProcessor

    combined = CLIPProcessor(image_processor, tokenizer)
    collate = MultimodalCollator({"image": combined, "text": combined})
    assert collate.processors["image"] is image_processor
    assert collate.processors["text"] is tokenizer
    with pytest.raises(ValueError, match="pass the one that reads it"):
        MultimodalCollator({"caption": combined})


@pytest.mark.parametrize("processors", [{}, {"text": "bert-base-uncased"}, {"image": None}])
def test_what_is_no_processor_is_refused(processors):
    with pytest.raises(ValueError, match=r"processor"):
        MultimodalCollator(processors)


def test_modalities_may_have_any_name(image_processor, tokenizer, picture):
    collate = MultimodalCollator({"photo": image_processor, "caption": tokenizer})
    batch = collate([{"photo": picture, "caption": "a dog"}, {"photo": None, "caption": "a cat"}])
    assert batch["modality_mask"].tolist() == [[True, True], [False, True]]


def test_workers_can_take_it_along(collate, sample):
    copy = pickle.loads(pickle.dumps(collate))
    assert torch.equal(copy([sample])["image"]["pixel_values"], collate([sample])["image"]["pixel_values"])


def test_a_stored_dataset_goes_through_a_data_loader(collate, picture, tmp_path):
    import datasets
    from torch.utils.data import DataLoader

    file = io.BytesIO()
    picture.save(file, "png")
    data = datasets.Dataset.from_dict(
        {"image": [{"path": None, "bytes": file.getvalue()}, None], "text": [None, "a dog"], "label": [0, 1]},
        features=datasets.Features(
            {"image": datasets.Image(decode=False), "text": datasets.Value("string"), "label": datasets.Value("int64")}
        ),
    )
    (batch,) = DataLoader(data, batch_size=2, collate_fn=collate)
    assert batch["modality_mask"].tolist() == [[True, False, False], [False, True, False]]


@pytest.mark.real
def test_real_emoji_give_the_batches_the_real_encoders_take():
    from transformers import AutoModel, AutoTokenizer
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    from u2a_fast.data import (
        MissingPackageError,
        MissingPattern,
        dinov2_folder,
        load_emoji,
        minilm_folder,
        with_missing,
    )

    try:
        image, text, data = dinov2_folder(112), minilm_folder(), load_emoji()["test"]
    except MissingPackageError as error:
        pytest.skip(str(error))
    processors = {"image": AutoImageProcessor.from_pretrained(image), "text": AutoTokenizer.from_pretrained(text)}
    holed = with_missing(data, MissingPattern(split="test"), tuple(processors))
    batch = MultimodalCollator(processors)([holed[index] for index in range(8)])
    assert torch.equal(batch["modality_mask"], holed.table[:8])
    assert batch["image"]["pixel_values"].shape == (8, 3, 112, 112)
    with torch.inference_mode():
        for modality, folder in (("image", image), ("text", text)):
            assert AutoModel.from_pretrained(folder)(**batch[modality]).last_hidden_state.isfinite().all()


def test_texts_are_as_long_as_the_tokenizer_says_and_what_is_cut_is_counted(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "model_max_length", 6)
    collate = MultimodalCollator({"text": tokenizer})
    text = collate([{"text": "dog " * 9}, {"text": "a dog"}, {"text": "dog " * 4}, {"text": None}])["text"]
    assert text["attention_mask"].sum(dim=1).tolist() == [6, 4, 6, 1]
    assert text["input_ids"][0, -1] == tokenizer.sep_token_id
    sentence = "1 of 3 text cells are cut to 6 tokens (the longest has 11 tokens)"
    assert collate.cut["text"].sentence("text", 3) == sentence


def test_clips_longer_than_the_window_are_counted(feature_extractor):
    from transformers import ASTFeatureExtractor, Wav2Vec2FeatureExtractor

    extractors = {feature_extractor: 1.0, ASTFeatureExtractor(num_mel_bins=16, max_length=50): 0.5}
    for extractor, seconds in extractors.items():
        collate = MultimodalCollator({"audio": extractor})
        collate([{"audio": np.ones(4000)}, {"audio": np.ones(32_000)}])
        sentence = f"1 of 2 audio cells are cut to {seconds} s (the longest has 2.0 s)"
        assert collate.cut["audio"].sentence("audio", 2, rate=16_000) == sentence
    collate = MultimodalCollator({"audio": Wav2Vec2FeatureExtractor()})
    collate([{"audio": np.ones(32_000)}])
    assert not collate.cut  # it hears everything


def test_half_a_surrogate_pair_is_read_as_an_unknown_character(collate):
    assert collate([{"text": "a \ud800 dog"}])["text"]["input_ids"].shape == (1, 5)


@pytest.mark.parametrize("labels", [["dog", "cat"], [["dog"], ["cat", "dog"]], [["dog"], [1]]])
def test_names_as_labels_are_refused_with_the_cure(collate, labels):
    with pytest.raises(ValueError, match=r"labels must be numbers, .*lists of names into vectors of 0 and 1"):
        collate([{"text": "a", "label": label} for label in labels])


def test_threads_take_turns_at_a_tokenizer(tokenizer, monkeypatch):
    """Each call sets padding and cutting on the tokenizer, for whoever calls it next."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length = 8
    delays = itertools.cycle((0.0, 0.003, 0.007, 0.001, 0.013))  # or all threads keep in step
    set_both = type(tokenizer).set_truncation_and_padding

    def slowly(self, *given, **named):
        set_both(self, *given, **named)
        time.sleep(next(delays))

    def collated(count):
        collate = MultimodalCollator({"text": tokenizer})
        batch = collate([{"text": "a dog " * count}, {"text": "a"}])
        return batch["text"]["input_ids"].tolist(), collate.cut["text"].longest

    expected = [collated(count) for count in range(1, 9)]
    monkeypatch.setattr(type(tokenizer), "set_truncation_and_padding", slowly)
    with ThreadPoolExecutor(8) as pool:
        assert [*pool.map(collated, range(1, 9))] == expected
