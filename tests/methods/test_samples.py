"""What people hand to a model: samples in any form, tokenizers with any limit, a loss, folders that moved."""

import datasets
import pytest
import tiny_configs
import tiny_data
import tiny_encoders
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from u2a_fast import PMF, U2A, JointEmbedding, LateFusion, MultimodalCollator, load_model
from u2a_fast.encoders import from_pretrained_model
from u2a_fast.prediction import predict_answers

ROWS = [{"text": "red square"}, {"text": "blue thing"}, {"text": "green"}]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tiny_data.encoder_folders(tmp_path_factory.mktemp("encoders"))


@pytest.fixture(scope="module")
def model(folders):
    return U2A(folders, num_labels=3, processors=tiny_data.processors()).eval()


@pytest.mark.slow
def test_predict_takes_every_form_of_samples(model):
    pandas = pytest.importorskip("pandas")
    expected = model.predict(ROWS, batch_size=2)
    forms = {
        "data set": datasets.Dataset.from_list(ROWS),
        "stream": datasets.IterableDataset.from_generator(lambda: iter(ROWS)),
        "frame": pandas.DataFrame(ROWS),
        "frame with holes": pandas.DataFrame([{**row, "image": None} for row in ROWS]),
        "generator": (row for row in ROWS),
        "strings": [row["text"] for row in ROWS],
        "strings of a generator": (row["text"] for row in ROWS),
        "tuple": tuple(ROWS),
    }
    for name, form in forms.items():
        assert torch.equal(model.predict(form, batch_size=2), expected), name


def test_strings_are_the_cells_of_an_only_modality(folders, tmp_path):
    tiny_data.samples(1)[0]["image"].save(tmp_path / "a.png")
    model = LateFusion({"image": folders["image"]}, num_labels=2, processors={"image": tiny_data.image_processor()})
    path = str(tmp_path / "a.png")
    assert torch.equal(model.predict([path]), model.predict([{"image": path}]))


@pytest.mark.parametrize("samples", ["red", {"text": "red"}])
def test_a_single_sample_is_refused_with_the_cure(model, samples):
    with pytest.raises(TypeError, match=r"write predict\(\[sample\]\) for a single one"):
        model.predict(samples)


@pytest.mark.parametrize("sample", [3, None, ["red"]])
def test_what_is_no_sample_is_named_by_its_number(model, sample):
    with pytest.raises(TypeError, match=r"sample 2 is a .*: write a dictionary with any of text, image"):
        model.predict([ROWS[0], sample])


@pytest.mark.parametrize("name", ["Image", " image", "IMAGE"])
def test_a_modality_in_other_letters_is_not_ignored(model, name):
    samples = [ROWS[0], {"text": "red", name: None}]
    for answer in (model.predict, lambda rows: predict_answers(model, rows)):
        with pytest.raises(ValueError, match=f"sample 2 has '{name}', which is not read: call it 'image'"):
            answer(samples)
        assert len(answer([ROWS[0], {"text": "red", name: 1, "image": None, "Id": 3}])) == 2


@pytest.mark.parametrize(("family", "usable"), [("bert", 20), ("roberta", 18), ("electra", 20), ("clip_text", 20)])
def test_texts_are_cut_where_the_positions_of_the_encoder_end(family, usable):
    tokenizer = tiny_data.tokenizer()
    tokenizer.model_max_length = 10**30
    encoders = {"text": tiny_encoders.build(family), "image": tiny_encoders.build("vit")}
    model = U2A(encoders, num_labels=3, processors={"text": tokenizer, "image": tiny_data.image_processor()})
    assert model.processors["text"].model_max_length == usable
    assert tokenizer.model_max_length == 10**30  # it may serve another model
    assert model.predict([{"text": "red " * 700}]).isfinite().all()
    assert MultimodalCollator(model.processors)([{"text": "red " * 700}])["text"]["input_ids"].shape == (1, usable)


@pytest.mark.parametrize("name", ["XLMRoberta", "Camembert"])
def test_relatives_of_roberta_are_read_by_its_spec(name):
    import transformers

    config = getattr(transformers, f"{name}Config")(**tiny_configs.TEXT)
    theirs = getattr(transformers, f"{name}Model")(config, add_pooling_layer=False).eval()
    inputs = tiny_encoders.inputs("roberta", 3, padded=True)
    real = inputs["attention_mask"].bool()
    ours = from_pretrained_model(theirs)(**inputs)
    torch.testing.assert_close(ours[real], theirs(**inputs).last_hidden_state[real], atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", [U2A, PMF, JointEmbedding, LateFusion])
def test_a_loss_of_ones_own_keeps_the_alignment_loss(method, folders, tmp_path):
    model = method(folders, num_labels=3, processors=tiny_data.processors()).eval()
    batch = MultimodalCollator(model.processors)(tiny_data.samples(6))
    plain = model(**batch)
    model.loss = torch.nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]))
    out = model(**batch)
    expected = F.cross_entropy(out.logits, batch["labels"], weight=torch.tensor([1.0, 2.0, 3.0]))
    torch.testing.assert_close(out.task_loss, expected)
    torch.testing.assert_close(out.loss - out.task_loss, plain.loss - plain.task_loss)
    model.save_pretrained(tmp_path)
    assert load_model(tmp_path).loss is None
    assert not [key for key in load_file(tmp_path / "model.safetensors") if key.startswith("loss")]
    other = method(folders, num_labels=3, processors=tiny_data.processors())
    other.loss = lambda logits, labels: logits.sum() * 0
    assert other(**batch).task_loss == 0


@pytest.mark.slow
def test_a_moved_encoder_is_named_with_the_cure(folders, tmp_path):
    model = U2A(folders, num_labels=3, processors=tiny_data.processors())
    model.config.encoders = {**folders, "image": "/gone/vit"}
    model.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"the image encoder cannot be loaded from '/gone/vit': .*--encoders"
    ) as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)
    assert load_model(tmp_path, encoders={"image": folders["image"]}).config.encoders["image"] == folders["image"]
