"""What was trained is saved, alone; a reloaded model is the same model; a resumed run is the same run."""

import copy
import json

import pytest
import tiny_data
import tiny_encoders
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from u2a_fast import PMF, U2A, JointEmbedding, LateFusion, LoraConfig, MultimodalCollator, load_model
from u2a_fast.encoders import from_pretrained_model


@pytest.fixture
def folders(tmp_path):
    return tiny_data.encoder_folders(tmp_path)


def make_model(folders, method=U2A, seed=0):
    torch.manual_seed(seed)
    model = method(folders, num_labels=3, lora=LoraConfig(r=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_b" in name:
                parameter.normal_(std=0.1)
    return model


def batch(count=4):
    return MultimodalCollator(tiny_data.processors())(tiny_data.samples(count))


@pytest.mark.slow
@pytest.mark.parametrize("method", [U2A, LateFusion])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reloaded_logits_are_bitwise_equal(folders, tmp_path, method, dtype):
    loaded = {name: tiny_encoders.build(f).to(dtype) for name, f in (("text", "bert"), ("image", "vit"))}
    for name, encoder in loaded.items():
        encoder.name_or_path = folders[name]
    model = make_model(loaded, method).eval()
    model.save_pretrained(tmp_path / "saved")
    again = load_model(tmp_path / "saved")
    assert list(again.encoders) == ["text", "image"]
    assert torch.equal(model(**batch()).logits, again(**batch()).logits)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["int8", "nf4"])
def test_what_was_cast_after_it_was_quantised_has_the_same_integers_once_reloaded(folders, tmp_path, mode):
    model = U2A(folders, num_labels=3, quantization=mode).eval()
    model.encoders.to(torch.bfloat16)
    model.save_pretrained(tmp_path / "saved")
    again = load_model(tmp_path / "saved")
    assert [encoder.dtype for encoder in again.encoders.values()] == [torch.bfloat16] * 2
    frozen, same = model.encoders.state_dict(), again.encoders.state_dict()
    assert all(torch.equal(value, same[name]) for name, value in frozen.items())
    again.save_pretrained(tmp_path / "twice")
    said = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("saved", "twice")]
    assert [config["quantized_from"] for config in said] == [dict.fromkeys(folders, "float32")] * 2


@pytest.mark.slow
def test_a_model_of_a_cast_encoder_computes_the_same_once_reloaded(folders, tmp_path):
    """At 512 tokens, where rounded frequencies would turn by other angles."""
    text = tiny_encoders.build("qwen3", max_position_embeddings=600)
    text.save_pretrained(tmp_path / "qwen3")
    text.name_or_path = str(tmp_path / "qwen3")
    model = make_model({"image": folders["image"], "text": from_pretrained_model(text).to(torch.bfloat16)}).eval()
    model.save_pretrained(tmp_path / "saved")
    given = {"text": {"input_ids": torch.randint(9, 90, (2, 512))}, "image": tiny_encoders.inputs("vit", 2)}
    assert torch.equal(model(**given).logits, load_model(tmp_path / "saved")(**given).logits)


def test_the_file_holds_what_was_trained_and_nothing_else(folders, tmp_path):
    model = make_model(folders)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    model.save_pretrained(tmp_path / "a")
    assert set(load_file(tmp_path / "a" / "model.safetensors")) == trained
    model.encoders["text"].blocks[0].norm1.weight.requires_grad_(True)
    model.save_pretrained(tmp_path / "b")
    extra = set(load_file(tmp_path / "b" / "model.safetensors")) - trained
    assert extra == {"encoders.text.blocks.0.norm1.weight"}
    assert not [path for path in (tmp_path / "b").rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]


@pytest.mark.slow
def test_encoders_come_back_in_the_dtype_they_were_given_last(folders, tmp_path):
    model = make_model(folders).eval().bfloat16()
    model.save_pretrained(tmp_path / "saved")
    loaded = load_model(tmp_path / "saved")
    assert {encoder.dtype for encoder in loaded.encoders.values()} == {torch.bfloat16}


@pytest.mark.slow
@pytest.mark.parametrize(
    "label_scale", [3, {"mean": [0.0]}, {"mean": [1.0], "deviation": [float("nan")]}, {"mean": "x"}]
)
def test_a_damaged_scale_of_labels_is_refused(folders, tmp_path, label_scale):
    model = U2A(folders, num_labels=1)
    model.config.label_scale = label_scale
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="the config's label_scale is no mean and deviation"):
        load_model(tmp_path / "saved")


@pytest.mark.slow
@pytest.mark.parametrize("separate_heads", [False, True])
@pytest.mark.parametrize("translate_all", [False, True])
def test_translators_and_heads_come_back_as_they_were_saved(folders, tmp_path, translate_all, separate_heads):
    model = U2A(folders, num_labels=3, translate_all=translate_all, separate_heads=separate_heads).eval()
    for translator in model.translators.values():
        torch.nn.init.normal_(translator.weight, std=0.2)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(model(**batch()).logits, load_model(tmp_path / "saved")(**batch()).logits)


@pytest.mark.slow
def test_a_model_saved_before_there_were_translators_and_heads_loads(folders, tmp_path):
    model = U2A(folders, num_labels=3).eval()
    model.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text(encoding="utf-8"))
    del config["arguments"]["translate_all"], config["arguments"]["separate_heads"]
    (tmp_path / "saved" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert torch.equal(model(**batch()).logits, load_model(tmp_path / "saved")(**batch()).logits)


@pytest.mark.slow
def test_a_model_saved_in_several_files_loads(folders, tmp_path):
    model = make_model(folders).eval()
    model.save_pretrained(tmp_path / "saved", max_shard_size="2KB")
    assert len([*(tmp_path / "saved").glob("*.safetensors")]) > 1
    assert torch.equal(model(**batch()).logits, load_model(tmp_path / "saved")(**batch()).logits)


def test_predict_takes_samples_with_anything_missing(folders, tmp_path):
    model = make_model(folders)
    model.processors = tiny_data.processors()
    rows = [{"text": "red thing"}, *tiny_data.samples(2), {"image": None, "text": "blue"}]
    logits = model.predict(rows)
    model.save_pretrained(tmp_path / "saved")
    again = U2A.from_pretrained(tmp_path / "saved")
    assert logits.shape == (4, 3) and torch.equal(again.predict(rows, batch_size=4), logits)
    assert model.training and not again.training
    model.head.eval()
    model.predict(rows)
    assert model.training and model.encoders.training and not model.head.training
    with pytest.raises(ValueError, match=r"rows 3 to 4: samples \[1\] of the batch have every modality absent"):
        model.predict([*rows[:3], {"text": None}], batch_size=2)


def test_an_encoder_without_a_name_is_asked_for(tmp_path):
    encoders = {"text": tiny_encoders.build("bert"), "image": tiny_encoders.build("vit")}
    model = make_model(encoders).eval()
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"encoders=\{'text': ...\}"):
        U2A.from_pretrained(tmp_path / "saved")
    again = U2A.from_pretrained(tmp_path / "saved", encoders=encoders)
    assert torch.equal(model(**batch()).logits, again(**batch()).logits)


@pytest.mark.slow
def test_merged_encoders_are_asked_for_and_not_read_as_they_were_before(folders, tmp_path):
    merged = make_model(folders).merge_and_unload()
    model = U2A(merged, num_labels=3).eval()
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"saved without a name: pass encoders=\{'text': ...\}"):
        load_model(tmp_path / "saved")
    again = U2A.from_pretrained(tmp_path / "saved", encoders=merged)
    assert torch.equal(model(**batch()).logits, again(**batch()).logits)


def test_a_folder_that_does_not_fit_is_refused(folders, tmp_path):
    make_model(folders).save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="holds a u2a model, not late_fusion"):
        LateFusion.from_pretrained(tmp_path / "saved")
    wider = {"text": tiny_encoders.build("bert", hidden_size=48), "image": tiny_encoders.build("vit")}
    with pytest.raises(ValueError, match="does not fit these encoders"):
        U2A.from_pretrained(tmp_path / "saved", encoders=wider)
    with pytest.raises(ValueError, match="'bert' model"):
        load_model(folders["text"])


def test_encoders_on_several_devices_are_refused_with_the_reason(folders, tmp_path):
    make_model(folders).save_pretrained(tmp_path / "saved")
    for load in (load_model, U2A.from_pretrained):
        with pytest.raises(ValueError, match=r"device_map is not supported: .*take turns; call model\.to\(device\)"):
            load(tmp_path / "saved", device_map={"text": 0, "image": 1})


@pytest.mark.parametrize(
    "option, why",
    [
        ({"attn_implementation": "sdpa"}, "set_backend"),
        ({"torch_dtype": "auto"}, "called dtype"),
        ({"local_files_only": True}, "HF_HUB_OFFLINE"),
        ({"lr": 1}, "pass any of encoders, dtype, num_labels, .*quantization"),
    ],
    ids=str,
)
def test_other_options_than_the_models_own_are_refused_before_anything_is_loaded(option, why, tmp_path):
    with pytest.raises(ValueError, match=f"{next(iter(option))} is not supported: .*{why}"):
        U2A.from_pretrained(tmp_path / "nowhere", **option)


def test_a_constructor_that_hands_its_arguments_on_takes_those_of_its_base(folders, tmp_path):
    class Mine(U2A):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)

    make_model(folders).save_pretrained(tmp_path / "saved")
    assert Mine.from_pretrained(tmp_path / "saved", align_weight=0.5).align_weight == 0.5
    with pytest.raises(ValueError, match=r"lr is not supported: pass any of .*quantization"):
        Mine.from_pretrained(tmp_path / "saved", lr=1)


@pytest.mark.slow
def test_what_the_constructor_takes_can_be_changed_while_loading(folders, tmp_path):
    make_model(folders).save_pretrained(tmp_path / "saved")
    own = tiny_data.tokenizer()
    model = U2A.from_pretrained(
        tmp_path / "saved", problem_type="multi_label_classification", num_labels=3, processors={"text": own}
    )
    assert model.config.problem_type == "multi_label_classification" and model.processors["text"] is own
    with pytest.raises(ValueError, match="does not fit"):
        U2A.from_pretrained(tmp_path / "saved", num_labels=4)


def make_trainer(model, folder, **options):
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=4,
        max_steps=6,
        save_steps=3,
        logging_steps=1,
        learning_rate=1e-2,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    rows = tiny_data.samples(12)
    without_images = [{**row, "image": None} for row in rows]
    return Trainer(
        model,
        arguments,
        train_dataset=rows,
        eval_dataset={"full": rows, "no_image": without_images},
        data_collator=MultimodalCollator(tiny_data.processors()),
    )


def losses(trainer):
    return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


@pytest.mark.slow
def test_a_resumed_run_repeats_the_losses_of_an_uninterrupted_one(folders, tmp_path, caplog):
    whole = make_trainer(make_model(folders), tmp_path / "whole")
    whole.train()
    resumed = make_trainer(make_model(folders, seed=1), tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    later = {step: loss for step, loss in losses(resumed).items() if step > 3}
    assert sorted(later) == [4, 5, 6]
    assert later == {step: losses(whole)[step] for step in later}
    trained = {name: p for name, p in whole.model.named_parameters() if p.requires_grad}
    for name, parameter in resumed.model.named_parameters():
        if name in trained:
            assert torch.equal(parameter, trained[name]), name
    assert "missing keys" not in caplog.text


@pytest.mark.slow
def test_trainer_loads_the_best_checkpoint_of_a_scenario(folders, tmp_path):
    options = dict(eval_strategy="steps", eval_steps=3, load_best_model_at_end=True)
    trainer = make_trainer(make_model(folders), tmp_path / "run", metric_for_best_model="eval_no_image_loss", **options)
    trainer.train()
    best = load_file(trainer.state.best_model_checkpoint + "/model.safetensors")
    assert all(torch.equal(trainer.model.get_parameter(name), tensor) for name, tensor in best.items())
    logged = {name for entry in trainer.state.log_history for name in entry}
    assert {"eval_full_loss", "eval_no_image_loss"} <= logged


def test_trainer_predictions_are_logits_only(folders, tmp_path):
    trainer = make_trainer(make_model(folders), tmp_path)
    assert trainer.predict(tiny_data.samples(5)).predictions.shape == (5, 3)


def test_dropped_columns_are_explained(folders, tmp_path):
    with pytest.raises(ValueError, match="remove_unused_columns=False"):
        MultimodalCollator(tiny_data.processors())([{"label": 0}])
    with pytest.raises(ValueError, match="remove_unused_columns=False"):
        make_model(folders)(labels=torch.tensor([0]))


@pytest.mark.slow
def test_processors_come_back_whatever_a_modality_is_called(folders, tmp_path):
    names = {"caption": "text", "photo": "image"}
    processors = {name: tiny_data.processors()[kind] for name, kind in names.items()}
    encoders = {name: folders[kind] for name, kind in names.items()}
    loaded = {name: tiny_encoders.build({"text": "bert", "image": "vit"}[kind]) for name, kind in names.items()}
    U2A(loaded, num_labels=3, processors=processors).save_pretrained(tmp_path / "saved")
    model = U2A.from_pretrained(tmp_path / "saved", encoders=encoders)
    assert model.predict([{"caption": "red"}, {"photo": tiny_data.samples(1)[0]["image"]}]).shape == (2, 3)


def test_only_what_the_samples_have_needs_a_processor():
    model = U2A({"text": tiny_encoders.build("bert"), "image": tiny_encoders.build("vit")}, num_labels=3)
    model.processors = {"text": tiny_data.tokenizer()}
    alone = model.predict([{"text": "red"}])
    with pytest.raises(ValueError, match="no processor for 'image' is known"):
        model.predict(tiny_data.samples(1))
    model.processors = {"image": tiny_data.image_processor()}  # and the tokenizer stays
    assert list(model.processors) == ["text", "image"]
    torch.testing.assert_close(model.predict([{"text": "red"}, *tiny_data.samples(1)])[:1], alone)


@pytest.mark.slow
def test_a_modality_nobody_knows_is_refused_by_name(folders, tmp_path):
    for wrong in ({"imgae": tiny_data.image_processor()}, {"phto": folders["image"]}):
        name = next(iter(wrong))
        with pytest.raises(ValueError, match=f"unknown modality '{name}': this model has text, image"):
            U2A(folders, num_labels=3, processors=wrong)
        model = make_model(folders)
        with pytest.raises(ValueError, match=f"unknown modality '{name}'"):
            model.processors = wrong
        model.save_pretrained(tmp_path / "saved")
        with pytest.raises(ValueError, match=f"unknown modality '{name}'"):
            U2A.from_pretrained(tmp_path / "saved", encoders=wrong)


@pytest.mark.slow
def test_an_encoder_object_serves_several_models(folders):
    """Each model has adapters, biases and storage of its own; the object stays as it was given."""
    given = {n: from_pretrained_model(tiny_encoders.build(f)) for n, f in (("text", "bert"), ("image", "vit"))}
    before = {name: copy.deepcopy(encoder.state_dict()) for name, encoder in given.items()}
    first = make_model(given).eval()
    expected = first(**batch()).logits
    second, bitfit = make_model(given, seed=1), JointEmbedding(given, num_labels=3)
    U2A(given, num_labels=3, quantization="int8"), PMF(given, num_labels=3)
    for model in (second, bitfit):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(1.0)
    assert torch.equal(first(**batch()).logits, expected)
    for name, encoder in given.items():
        assert encoder.state_dict().keys() == before[name].keys()
        assert all(torch.equal(value, before[name][key]) for key, value in encoder.state_dict().items())
        shared = first.encoders[name].blocks[0].qkv.weight
        assert shared.data_ptr() == encoder.blocks[0].qkv.weight.data_ptr()
    third = PMF(first.encoders, num_labels=3)
    assert not any("lora" in name for name, _ in third.named_parameters())
