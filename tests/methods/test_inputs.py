"""Bad input gets one sentence that names the cause and the cure, before anything is computed."""

import importlib

import numpy as np
import parity
import pytest
import tiny_encoders
import torch

from u2a_fast import PMF, U2A, JointEmbedding, LateFusion, LoraConfig

FAMILIES = {"image": "vit", "text": "bert"}
ALL = torch.ones(3, 2, dtype=torch.bool)


@pytest.fixture
def model():
    return U2A({name: tiny_encoders.build(family) for name, family in FAMILIES.items()}, num_labels=4)


@pytest.fixture
def inputs():
    return parity.batch(FAMILIES, 3, dtype=torch.float32)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"video": {"pixel_values": torch.zeros(3, 1)}}, ValueError, "unknown modality 'video'.*image, text"),
        ({"modality_mask": ALL[:, :1]}, ValueError, r"modality_mask must be \[3, 2\]"),
        ({"modality_mask": ALL[:2]}, ValueError, r"modality_mask must be \[3, 2\]"),
        ({"modality_mask": ALL.long()}, TypeError, "must be a bool tensor .*not torch.int64"),
        ({"modality_mask": ALL.tolist()}, TypeError, "must be a bool tensor .*not list"),
        ({"modality_mask": ALL & torch.tensor([[1], [0], [1]]).bool()}, ValueError, r"samples \[1\].*all_absent"),
        ({"labels": torch.tensor([0, 4, 1])}, ValueError, "label 4 is out of range: num_labels=4"),
        ({"labels": torch.tensor([0, -1, 1])}, ValueError, "label -1 is out of range"),
        ({"labels": torch.tensor([0, 1])}, ValueError, "2 labels were given for 3 samples"),
        ({"labels": [0, 1, 2]}, TypeError, "labels must be a tensor of 3 rows"),
        ({"labels": torch.rand(3, 3)}, ValueError, r"labels must be \[3, 4\]"),
        ({"text": {"input_ids": torch.ones(2, 4).long()}}, ValueError, "3 samples but 2 rows of text"),
        ({"text": torch.ones(3, 4)}, TypeError, "dictionary of tensors"),
        (
            {"text": {"input_ids": [[1, 2]] * 3}},
            TypeError,
            "input_ids of text must be a tensor, not a list: pass return_",
        ),
        (
            {"image": {"pixel_values": np.zeros((3, 3, 8, 8))}},
            TypeError,
            "pixel_values of image must be a tensor, not a nd",
        ),
        (
            {"text": {"input_ids": torch.ones(3, 4).long(), "attention_mask": torch.ones(2, 4)}},
            ValueError,
            "the inputs of text are 3 rows of input_ids but 2 rows of attention_mask: give each sample a row",
        ),
    ],
)
def test_a_bad_batch_is_refused(model, inputs, change, error, message):
    with pytest.raises(error, match=message):
        model(**{**inputs, **change})


@pytest.mark.parametrize("method", [U2A, PMF, JointEmbedding, LateFusion])
@pytest.mark.parametrize(
    "text, message",
    [
        ({"input_ids": torch.ones(3, 0).long()}, "text is marked present and its inputs are empty: mark it absent"),
        ({"input_ids": torch.ones(3, 4).long(), "attention_mask": torch.ones(3, 4, 4)}, r"attention_mask must be \[sa"),
        ({"input_ids": torch.ones(3, 4).long(), "attention_mask": torch.ones(3, 1, 4, 4)}, r"not \[3, 1, 4, 4\]"),
    ],
)
@pytest.mark.parametrize("family", ["bert", "clip_text"])
def test_texts_without_tokens_and_masks_of_pairs_are_refused(family, text, message, method, inputs):
    families = FAMILIES | {"text": family}
    model = method({name: tiny_encoders.build(family) for name, family in families.items()}, num_labels=4)
    with pytest.raises(ValueError, match=message):
        model(**inputs | {"text": text})
    if "empty" in message:
        nobody = ALL & torch.tensor([True, False])
        assert model(**inputs | {"text": text}, modality_mask=nobody).logits.isfinite().all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"absent": "skip"}, 'absent must be one of .*"pack"'),
        ({"all_absent": "zero"}, 'all_absent must be one of .*"prior"'),
        ({"problem_type": "ranking"}, "problem_type must be one of"),
        ({"modality_dropout": 1.5}, "modality_dropout must be in"),
        ({"label_smoothing": 1.0}, "label_smoothing must be at least 0 and below 1"),
    ],
)
def test_a_bad_option_is_refused(options, message):
    encoders = {name: tiny_encoders.build(family) for name, family in FAMILIES.items()}
    with pytest.raises(ValueError, match=message):
        U2A(encoders, num_labels=4, **options)


@pytest.mark.parametrize("name", ["labels", "modality_mask", "keys", "return_dict"])
def test_a_modality_is_not_called_what_forward_or_torch_call_something_else(name):
    with pytest.raises(ValueError, match=f"modality name '{name}' has another meaning"):
        U2A({name: tiny_encoders.build("vit"), "text": tiny_encoders.build("bert")}, num_labels=4)


def test_class_labels_of_any_whole_dtype_are_taken(model, inputs):
    labels = torch.tensor([0, 3, 1])
    model.eval()
    assert len({model(**inputs, labels=labels.to(dtype)).loss.item() for dtype in (torch.int64, torch.int32)}) == 1


def test_no_classes_are_refused():
    with pytest.raises(ValueError, match="num_labels must be at least 1, not 0"):
        U2A({name: tiny_encoders.build(family) for name, family in FAMILIES.items()}, num_labels=0)


def test_predict_wants_a_list(model):
    with pytest.raises(TypeError, match=r"write predict\(\[sample\]\)"):
        model.predict({"text": "a single sample"})


def test_one_encoder_is_not_enough():
    with pytest.raises(ValueError, match="needs 2 encoders"):
        U2A({"text": tiny_encoders.build("bert")}, num_labels=2)


@pytest.mark.parametrize("options", [{"target_modules": ("query",)}, {"r": 0}, {"r": 2.5}, {"lora_dropout": 1.0}])
def test_a_bad_lora_config_is_refused(options):
    with pytest.raises(ValueError):
        LoraConfig(**options)


def test_a_role_that_no_encoder_has_is_refused():
    encoders = {"text": tiny_encoders.build("bert"), "image": tiny_encoders.build("vit")}
    with pytest.raises(ValueError, match="roles of the encoders, q, k, v, o, fc1, fc2, not gate"):
        U2A(encoders, num_labels=2, lora=LoraConfig(target_modules=("q", "gate")))


def test_down_is_another_name_of_fc2():
    assert LoraConfig(target_modules=("down", "q", "fc2")).target_modules == ("fc2", "q")


@pytest.mark.slow
def test_pefts_lora_config_is_read():
    peft = pytest.importorskip("peft")
    config = LoraConfig.read(peft.LoraConfig(r=6, lora_alpha=12, target_modules=["query", "value"], use_rslora=True))
    assert config == LoraConfig(r=6, lora_alpha=12, target_modules=("q", "v"), use_rslora=True)
    gated = LoraConfig.read(peft.LoraConfig(target_modules=["gate_proj", "up_proj", "down_proj"]))
    assert gated.target_modules == ("fc2", "gate", "up")
    everything = LoraConfig.read(peft.LoraConfig(target_modules="all-linear"))
    assert everything.target_modules == ("q", "k", "v", "o", "fc1", "fc2") and everything.adapts("up")


@pytest.mark.parametrize(
    "option",
    [
        {"use_dora": True},
        {"bias": "all"},
        {"modules_to_save": ["pooler"]},
        {"alpha_pattern": {"query": 4}},
        {"layers_to_transform": 0},
        {"exclude_modules": ["layer.0"]},
        {"init_lora_weights": "pissa"},
        {"fan_in_fan_out": True},
    ],
    ids=lambda option: next(iter(option)),
)
def test_what_pefts_lora_config_asks_beyond_ours_is_refused(option):
    peft = pytest.importorskip("peft")
    with pytest.raises(ValueError, match=f"asks for {next(iter(option))}, which"):
        LoraConfig.read(peft.LoraConfig(target_modules=["query"], **option))


def test_rank_stabilised_scaling_divides_by_the_root_of_the_rank():
    plain, stable = (LoraConfig(r=16, lora_alpha=8, use_rslora=on) for on in (False, True))
    assert (plain.scaling, stable.scaling) == (0.5, 2.0)


@pytest.mark.parametrize(
    "labels, kind",
    [
        (torch.tensor([0, 1, 2]), "single_label_classification"),
        (torch.tensor([[0.0, 1, 0, 1]] * 3), "multi_label_classification"),
    ],
)
def test_the_problem_type_follows_the_labels(model, inputs, labels, kind):
    assert model.problem_type(labels) == kind
    assert torch.isfinite(model(**inputs, labels=labels).loss)


@pytest.mark.parametrize("method", [U2A, PMF, JointEmbedding, LateFusion])
def test_labels_are_smoothed_in_training_alone(method, inputs):
    encoders = {name: tiny_encoders.build(family) for name, family in FAMILIES.items()}
    model, labels = method(encoders, num_labels=4, label_smoothing=0.3), torch.tensor([0, 3, 1])
    for training, smoothing in ((True, 0.3), (False, 0.0)):
        out = model.train(training)(**inputs, labels=labels)
        expected = torch.nn.functional.cross_entropy(out.logits, labels, label_smoothing=smoothing)
        torch.testing.assert_close(out.task_loss, expected)
    assert model.config.arguments["label_smoothing"] == 0.3


def test_regression_with_one_label(inputs):
    encoders = {name: tiny_encoders.build(family) for name, family in FAMILIES.items()}
    model = U2A(encoders, num_labels=1).eval()
    out = model(**inputs, labels=torch.tensor([0.5, 1.0, -1.0]))
    expected = (out.logits.squeeze(1) - torch.tensor([0.5, 1.0, -1.0])).square().mean()
    torch.testing.assert_close(out.task_loss, expected)


@pytest.mark.parametrize("loss", [None, torch.nn.functional.huber_loss, torch.nn.MSELoss()])
def test_a_loss_gets_numbers_in_the_shape_of_the_logits(loss, inputs):
    """[B] and [B, 1] would be compared each with each."""
    encoders = {name: tiny_encoders.build(family) for name, family in FAMILIES.items()}
    model, labels = U2A(encoders, num_labels=1).eval(), torch.tensor([0.5, 1.0, -1.0])
    model.loss = loss
    out = model(**inputs, labels=labels)
    expected = (loss or torch.nn.functional.mse_loss)(out.logits, labels[:, None])
    torch.testing.assert_close(out.task_loss, expected)


def test_a_function_takes_the_place_of_a_loss_that_is_a_module(model, inputs):
    model, labels = model.eval(), torch.tensor([0, 3, 1])
    expected = model(**inputs, labels=labels).task_loss
    model.loss = torch.nn.CrossEntropyLoss(weight=torch.arange(4.0))
    assert model(**inputs, labels=labels).task_loss != expected
    for loss in (torch.nn.functional.cross_entropy, None):
        model.loss = loss
        assert model.loss is loss and torch.equal(model(**inputs, labels=labels).task_loss, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_are_not_rounded_to_what_logits_are(dtype, inputs):
    encoders = {name: tiny_encoders.build(family) for name, family in FAMILIES.items()}
    model, labels = U2A(encoders, num_labels=1).eval(), torch.tensor([250_001.0, 250_002.0, 250_003.0])
    with torch.autocast("cpu", dtype=dtype):
        out = model(**inputs, labels=labels)
    assert out.logits.dtype == dtype
    torch.testing.assert_close(out.task_loss, (out.logits.float()[:, 0] - labels).square().mean())


@pytest.mark.parametrize("labels", [torch.tensor([0.0, 1.0, 1.0]), torch.tensor([[0.0], [1.0], [1.0]])])
def test_one_mark_a_sample_needs_no_brackets(labels, inputs):
    encoders = {name: tiny_encoders.build(family) for name, family in FAMILIES.items()}
    model = U2A(encoders, num_labels=1, problem_type="multi_label_classification").eval()
    out = model(**inputs, labels=labels)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(out.logits[:, 0], torch.tensor([0.0, 1.0, 1.0]))
    torch.testing.assert_close(out.task_loss, expected)


@pytest.mark.parametrize("strange", [-100.0, 3.5, float("nan")])
def test_marks_that_are_none_are_refused(strange, model, inputs):
    labels = torch.tensor([[0.0, 1.0, 0.3, 0.0]] * 3)
    model(**inputs, labels=labels)
    labels[1, 2] = strange
    with pytest.raises(ValueError, match=f'marks from 0 to 1, not {strange}: .*problem_type="regression"'):
        model(**inputs, labels=labels)


def test_what_the_labels_told_in_training_is_remembered(model, inputs):
    marks = torch.tensor([[0.0, 1, 0, 1]] * 3)
    model.eval()(**inputs, labels=marks)
    assert model.config.problem_type is None
    model.train()(**inputs, labels=marks)
    assert model.config.problem_type == "multi_label_classification" == model.problem_type(None)


@pytest.mark.parametrize("empty", [{}, {"input_ids": None, "attention_mask": None}])
@pytest.mark.parametrize("options", [{}, {"absent": "where"}])
def test_inputs_without_a_tensor_are_an_absent_modality(options, empty, inputs):
    encoders = {name: tiny_encoders.build(family) for name, family in FAMILIES.items()}
    model = U2A(encoders, num_labels=4, **options).eval()
    expected = model(image=inputs["image"]).logits
    assert torch.equal(model(image=inputs["image"], text=empty).logits, expected)


@pytest.mark.parametrize("method", [U2A, PMF, JointEmbedding, LateFusion])
def test_a_row_may_stand_for_all_samples(method, inputs):
    model = method(tiny_encoders.build_many(FAMILIES), num_labels=4).eval()
    given = {"modality_mask": torch.tensor([[True, True], [True, False], [False, True]])}
    expected = model(**inputs, **given).logits
    position = torch.arange(inputs["text"]["input_ids"].shape[1])[None]
    text = {"position_ids": position, "token_type_ids": torch.zeros_like(position), **inputs["text"]}
    assert torch.equal(model(**{**inputs, "text": text}, **given).logits, expected)


def test_pixels_may_be_whole_numbers(model, inputs):
    pixels = torch.randint(0, 255, inputs["image"]["pixel_values"].shape, dtype=torch.uint8)
    found, expected = (
        model.eval()(image={"pixel_values": p}, text=inputs["text"]).logits for p in (pixels, pixels.float())
    )
    assert torch.equal(found, expected)


def test_what_lies_on_the_host_does_not_follow_the_default_device(model, inputs):
    mask = ALL & torch.tensor([[True, True], [True, False], [False, True]])
    inputs["text"]["attention_mask"] = torch.ones_like(inputs["text"]["input_ids"]).tril(3)
    expected = model.eval()(**inputs, modality_mask=mask).logits
    torch.set_default_device("meta")
    try:
        found = model(**inputs, modality_mask=mask).logits
    finally:
        torch.set_default_device(None)
    assert torch.equal(found, expected)


def test_what_a_model_of_several_encoders_cannot_do_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match="has no vocabulary: resize that of an encoder"):
        model.resize_token_embeddings(50)
    with pytest.raises(ValueError, match="variant='fp16' is not read again"):
        model.save_pretrained(tmp_path, variant="fp16")


def test_data_parallel_is_refused(model, monkeypatch):
    """As `nn.DataParallel` copies it to two GPUs, here without the copying."""
    replicate = importlib.import_module("torch.nn.parallel.replicate")
    monkeypatch.setattr(replicate, "_broadcast_coalesced_reshape", lambda tensors, *_, **__: [tensors, tensors])
    with pytest.raises(ValueError, match=r"nn\.DataParallel is not supported: start one process a GPU"):
        replicate.replicate(model, [0, 1])


def test_tuple_output(model, inputs):
    out = model(**inputs, return_dict=False)
    assert isinstance(out, tuple) and out[0].shape == (3, 4)
