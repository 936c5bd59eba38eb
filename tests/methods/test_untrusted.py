"""Folders of strangers: neither their code nor a pickle is run, no file beside them is read, nobody is asked."""

import builtins
import json

import pytest
import tiny_data
import torch
from safetensors.torch import save_file

from u2a_fast import U2A, load_model
from u2a_fast.encoders.streaming import INDEX, WEIGHTS
from u2a_fast.methods.saved import CONFIG


@pytest.fixture
def saved(tmp_path, monkeypatch):
    def ask(*args):
        raise AssertionError("somebody was asked whether to run code")

    monkeypatch.setattr(builtins, "input", ask)
    model = U2A(tiny_data.encoder_folders(tmp_path), num_labels=3, processors=tiny_data.processors())
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refused(saved, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_model(saved)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["saved/processors/text", "encoders/text"])
def test_code_in_a_folder_is_never_run(saved, place):
    folder = saved.parent / place
    (folder / "evil.py").write_text(f"open({str(saved.parent / 'ran')!r}, 'w').write('x')\nclass Evil: pass\n")
    if place == "encoders/text":
        change(folder / CONFIG, model_type="evil", auto_map={"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"})
    else:
        change(
            folder / "tokenizer_config.json", tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.Evil", None]}
        )
    refused(saved, "cannot be loaded")
    assert not (saved.parent / "ran").exists()


def test_a_pickle_of_an_encoder_is_refused_by_name(saved):
    folder = saved.parent / "encoders" / "text"
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    refused(saved, r"pytorch_model\.bin is not read, since a pickle can run code")


@pytest.mark.slow
def test_a_pickle_of_a_model_is_not_looked_for(saved):
    (saved / WEIGHTS).rename(saved / "pytorch_model.bin")
    with pytest.raises(OSError, match=INDEX):
        load_model(saved)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["../outside.safetensors", "/tmp/x.safetensors", "a/b.safetensors", "x.bin", "..", 3])
def test_an_index_names_files_beside_it_alone(saved, name):
    save_file({"head.weight": torch.zeros(3, 32)}, saved.parent / "outside.safetensors")
    (saved / WEIGHTS).unlink()
    (saved / INDEX).write_text(json.dumps({"weight_map": {"head.weight": name}}))
    refused(saved, f"{INDEX} in .* cannot be read")


@pytest.mark.parametrize(
    "values, message",
    [
        ({"modalities": "text"}, "its modalities are 'text', no list"),
        ({"modalities": []}, "its modalities are"),
        ({"modalities": ["text", "text"]}, "a modality is there twice"),
        ({"modalities": ["text", "../image"]}, "its encoders do not name one of each modality"),
        ({"encoders": {"text": 3, "image": "x"}}, "its encoders do not name"),
        ({"encoder_dtypes": {"text": "nn", "image": "float32"}}, "its encoder_dtypes are not out of float32, float64"),
        ({"quantized_from": {"text": "nn"}}, "its quantized_from is not out of float32, float64"),
        ({"quantized_from": 3}, "its quantized_from is not out of float32, float64"),
        ({"encoders_in_8bit": 3}, "its encoders_in_8bit are no list of modalities"),
        ({"arguments": [1]}, "its arguments are"),
        ({"arguments": {"__class__": 1}}, r"U2A has no argument \['__class__'\]"),
        ({"arguments": {"lora": {"r": 10**12}}}, "r must be a whole number from 1 to 65536"),
        ({"arguments": {"align_weight": "0.2"}}, "align_weight must be at least 0, not '0.2'"),
        ({"id2label": {"0": 1}}, "its id2label is no dictionary of names"),
        ({"id2label": {str(i): "a" for i in range(100_001)}}, "its id2label"),
        ({"label2id": "abc"}, "its label2id"),
        ({"num_labels": 10**12}, "its num_labels is 1000000000000"),
        ({"model_type": ["u2a"]}, r"holds a \['u2a'\] model"),
    ],
)
def test_a_damaged_config_is_refused_before_anything_is_built(saved, values, message):
    change(saved / CONFIG, **values)
    refused(saved, message)


@pytest.mark.parametrize("text", ["", "[]", "3", '{"model_type"', "[" * 100_000, '{"model_type": NaN}'])
def test_a_config_that_is_no_dictionary_is_refused(saved, text):
    (saved / CONFIG).write_text(text)
    refused(saved, "is no folder of a trained model|holds a nan model")


@pytest.mark.slow
def test_torn_weights_are_refused_by_name(saved):
    (saved / WEIGHTS).write_bytes((saved / WEIGHTS).read_bytes()[:-5])
    refused(saved, rf"{WEIGHTS} in .* cannot be read: ")


@pytest.mark.slow
def test_what_an_older_config_does_not_say_has_its_default(saved):
    config = json.loads((saved / CONFIG).read_text())
    del config["encoders_in_8bit"]
    (saved / CONFIG).write_text(json.dumps(config))
    assert load_model(saved).config.encoders_in_8bit == []
