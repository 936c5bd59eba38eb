"""Adapters of a whole model: in from PEFT, out to it, off for a while, merged; saved and resumed like any other."""

import copy
import json
import warnings

import peft
import pytest
import tiny_data
import tiny_encoders
import torch
from peft_adapters import adapted, targets
from transformers import Trainer, TrainingArguments

from u2a_fast import PMF, U2A, JointEmbedding, LateFusion, LoraConfig, MultimodalCollator, load_model
from u2a_fast.adapters import adapted_linears

NAMES = {"text": "bert", "image": "vit"}
METHODS = {
    "u2a": lambda encoders: U2A(encoders, num_labels=3, lora=LoraConfig(r=2)),
    "u2a without adapters": lambda encoders: U2A(encoders, num_labels=3, lora=None),
    "pmf": lambda encoders: PMF(encoders, num_labels=3, fusion_layers=1),
    "bitfit": lambda encoders: JointEmbedding(encoders, num_labels=3),
    "late fusion": lambda encoders: LateFusion(encoders, num_labels=3),
}


@pytest.fixture
def folders(tmp_path):
    return tiny_data.encoder_folders(tmp_path)


def make_model(encoders, method="u2a", seed=0):
    torch.manual_seed(seed)
    model = METHODS[method](encoders)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_b" in name:
                parameter.normal_(std=0.1)
    return model


def save_peft(folder, name, **options):
    """A tiny encoder under an adapter of PEFT, which is saved."""
    model = tiny_encoders.build(name)
    family = "encoder.layer.0.attention.self.query" if name == "bert" else "layers.0.attention.q_proj"
    uneven = {"r": 2, "rank_pattern": {family: 3}, "alpha_pattern": {family: 2}, "lora_dropout": 0.1}
    theirs = adapted(model, target_modules=targets(model, "q", "v", "fc1"), **uneven | options)
    theirs.save_pretrained(folder)
    return theirs


def batch(count=4):
    return MultimodalCollator(tiny_data.processors())(tiny_data.samples(count))


def states(model):
    with torch.no_grad():
        values = {"text": tiny_encoders.inputs("bert", 2), "image": tiny_encoders.inputs("vit", 2)}
        return {name: encoder(**values[name]) for name, encoder in model.encoders.items()}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_model_with_a_loaded_adapter_comes_back_bit_by_bit(folders, tmp_path, method):
    model = make_model(folders, method).eval()
    before = model(**batch()).logits
    theirs = save_peft(tmp_path / "peft", "bert")
    model.load_adapter(tmp_path / "peft", modality="text")
    inputs = tiny_encoders.inputs("bert", 2)
    with torch.no_grad():
        torch.testing.assert_close(states(model)["text"], theirs(**inputs).last_hidden_state, rtol=0, atol=1e-4)
    after = model(**batch()).logits
    assert not torch.equal(before, after)
    model.save_pretrained(tmp_path / "saved")
    again = load_model(tmp_path / "saved")
    assert torch.equal(again(**batch()).logits, after)
    assert {linear.dropout for linear in adapted_linears(again.encoders["text"]).values()} == {0.1}
    again.save_pretrained(tmp_path / "twice")
    assert torch.equal(load_model(tmp_path / "twice")(**batch()).logits, after)


@pytest.mark.slow
def test_every_modality_is_a_folder_of_its_own(folders, tmp_path):
    model = make_model(folders).eval()
    model.save_adapters(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["image", "text"]
    for name, family in NAMES.items():
        theirs = peft.PeftModel.from_pretrained(tiny_encoders.build(family), tmp_path / "out" / name).eval()
        assert peft.LoraConfig.from_pretrained(tmp_path / "out" / name).base_model_name_or_path == folders[name]
        with torch.no_grad():
            wanted = theirs(**tiny_encoders.inputs(family, 2)).last_hidden_state
        torch.testing.assert_close(states(model)[name], wanted, rtol=0, atol=1e-4)
    other = make_model(folders, seed=1).eval()
    for name in NAMES:  # the folder of the modality, or the one above it
        other.load_adapter(tmp_path / "out" / name if name == "text" else tmp_path / "out", modality=name)
    assert all(torch.equal(states(other)[name], states(model)[name]) for name in NAMES)


def test_only_modalities_with_adapters_are_written(folders, tmp_path):
    model = make_model(folders, "u2a without adapters")
    with pytest.raises(ValueError, match="no adapters to save"):
        model.save_adapters(tmp_path / "out")
    save_peft(tmp_path / "peft", "vit")
    model.load_adapter(tmp_path / "peft", modality="image")
    model.save_adapters(tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["image"]


@pytest.mark.parametrize("method", ["u2a", "u2a without adapters"])
def test_a_refusal_leaves_the_model_as_it_was(folders, tmp_path, method):
    model = make_model(folders, method)
    before, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    save_peft(tmp_path / "dora", "bert", use_dora=True)
    save_peft(tmp_path / "wide", "vit")
    for folder, modality, message in (
        ("dora", "text", "use_dora"),
        ("wide", "text", "u2a_fast adapts"),
        ("wide", "audio", "unknown modality 'audio': this model has text, image"),
        ("wide", "../image", "unknown modality '../image'"),
        ("nowhere", "text", "no folder of an adapter"),
    ):
        with pytest.raises(ValueError, match=message):
            model.load_adapter(tmp_path / folder, modality=modality)
    assert model.config.to_dict() == config and model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.slow
def test_a_damaged_description_in_the_config_is_refused(folders, tmp_path):
    model = make_model(folders)
    save_peft(tmp_path / "peft", "bert")
    model.load_adapter(tmp_path / "peft", modality="text")
    model.save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / "config.json"
    whole = json.loads(path.read_text())
    assert set(whole["adapters"]) == {"text"}
    for damaged, message in (
        ({"tExt": {}}, "unknown modality 'tExt'"),
        ({"text": {"blocks.0.nothing": {}}}, "does not have"),
        ({"text": {}}, "does not fit these encoders"),
        ({"text": 3}, "describes the adapters of text as 3"),
        (None, "describes adapters as None"),
    ):
        path.write_text(json.dumps(whole | {"adapters": damaged}))
        with pytest.raises(ValueError, match=message):
            U2A.from_pretrained(tmp_path / "saved")


@pytest.mark.slow
def test_a_run_with_loaded_adapters_resumes_where_it_was(folders, tmp_path):
    save_peft(tmp_path / "peft", "bert", lora_dropout=0.0)

    def trainer(seed, name):
        model = make_model(folders, seed=seed)
        model.load_adapter(tmp_path / "peft", modality="text")
        arguments = TrainingArguments(
            str(tmp_path / name),
            per_device_train_batch_size=4,
            max_steps=6,
            save_steps=3,
            logging_steps=1,
            learning_rate=1e-2,
            remove_unused_columns=False,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        collate = MultimodalCollator(tiny_data.processors())
        return Trainer(model, arguments, train_dataset=tiny_data.samples(12), data_collator=collate)

    whole, resumed = trainer(0, "whole"), trainer(1, "resumed")
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    trained = {name: p for name, p in whole.model.named_parameters() if p.requires_grad}
    assert sum("lora" in name for name in trained) > 8
    assert all(torch.equal(p, trained[n]) for n, p in resumed.model.named_parameters() if n in trained)
    again = U2A.from_pretrained(tmp_path / "whole" / "checkpoint-6")
    assert torch.equal(again(**batch()).logits, whole.model.eval()(**batch()).logits)


@pytest.mark.slow
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_adapters_are_off_within_the_context_and_on_after_it(folders, quantization):
    torch.manual_seed(0)
    model = U2A(folders, num_labels=3, lora=LoraConfig(r=2), quantization=quantization).eval()
    without = model(**batch()).logits  # B is zero
    for name, parameter in model.named_parameters():
        if "lora_b" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    with_adapters = model(**batch()).logits
    with model.disable_adapter():
        torch.testing.assert_close(model(**batch()).logits, without)
        with model.disable_adapter():
            pass
        torch.testing.assert_close(model(**batch()).logits, without)
    assert torch.equal(model(**batch()).logits, with_adapters) and not torch.allclose(without, with_adapters)
    with pytest.raises(KeyError), model.disable_adapter():
        raise KeyError
    assert torch.equal(model(**batch()).logits, with_adapters)


class Graphs:
    forgotten = 0

    def forget(self):
        self.forgotten += 1


def test_captured_steps_know_of_other_adapters_and_of_none(folders, tmp_path):
    model = make_model(folders)
    model._steps = graphs = Graphs()
    with model.disable_adapter():
        assert model._steps is None
    assert model._steps is graphs and not graphs.forgotten
    save_peft(tmp_path / "peft", "vit")
    model.load_adapter(tmp_path / "peft", modality="image")
    assert graphs.forgotten == 1


@pytest.mark.slow
def test_merged_encoders_are_plain_and_the_model_is_as_it_was(folders):
    model = make_model(folders).eval()
    before = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        merged = model.merge_and_unload()
    assert {name: type(encoder).__name__ for name, encoder in merged.items()} == {
        "text": "BertModel",
        "image": "ViTModel",
    }
    for name, family in NAMES.items():
        with torch.no_grad():
            found = merged[name](**tiny_encoders.inputs(family, 2)).last_hidden_state
        torch.testing.assert_close(found, states(model)[name], rtol=0, atol=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with model.disable_adapter():
        plain = model.merge_and_unload()["text"]
    wanted = tiny_encoders.build("bert").encoder.layer[0].attention.self.query.weight
    assert torch.equal(plain.encoder.layer[0].attention.self.query.weight, wanted)
    assert U2A(merged, num_labels=3)  # and they are encoders again


@pytest.mark.slow
def test_fused_linears_gated_ones_and_unequal_heads_go_out_come_in_and_are_merged(tmp_path):
    names = {"text": "modernbert", "image": "dinov3_gated", "answer": "qwen3"}

    def model(lora):
        encoders = {modality: tiny_encoders.build(name) for modality, name in names.items()}
        return U2A(encoders, num_labels=3, lora=lora).eval()

    def states(encoders):
        each = {modality: tiny_encoders.inputs(name, 2) for modality, name in names.items()}
        with torch.no_grad():
            found = {modality: encoder(**each[modality]) for modality, encoder in encoders.items()}
        return {modality: getattr(rows, "last_hidden_state", rows) for modality, rows in found.items()}

    trained = model(LoraConfig(r=2, target_modules=("q", "v", "fc1")))
    for name, parameter in trained.named_parameters():
        if "lora_b" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    trained.save_adapters(tmp_path)
    wanted, other = states(trained.encoders), model(None)
    for modality in names:
        other.load_adapter(tmp_path, modality=modality)
    for found in (other.encoders, trained.merge_and_unload()):
        for modality, rows in states(found).items():
            torch.testing.assert_close(rows, wanted[modality], rtol=0, atol=1e-4)
    with trained.disable_adapter():
        plain = states(trained.encoders)
    assert all((plain[modality] - rows).abs().max() > 0.01 for modality, rows in wanted.items())


@pytest.mark.parametrize("stored", ["int8", "int8_w8a8", "nf4", "bfloat16"])
def test_merging_what_is_rounded_warns(stored):
    encoders = {name: tiny_encoders.build(family) for name, family in NAMES.items()}
    if stored == "bfloat16":
        encoders["text"].bfloat16()
        model = U2A(encoders, num_labels=3)
    else:
        model = U2A(encoders, num_labels=3, quantization={"text": stored})
    with pytest.warns(UserWarning, match=f"the text encoder is stored as {stored}") as caught:
        merged = model.merge_and_unload()
    assert len(caught) == 1 and merged["text"].dtype == model.encoders["text"].dtype


def test_what_bitfit_trains_is_in_the_merged_encoder(folders):
    model = make_model(folders, "bitfit").eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1)
    merged = model.merge_and_unload()["image"]
    with torch.no_grad():
        found = merged(**tiny_encoders.inputs("vit", 2)).last_hidden_state
    torch.testing.assert_close(found, states(model)["image"], rtol=0, atol=1e-4)
