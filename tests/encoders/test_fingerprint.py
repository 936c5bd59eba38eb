"""An encoder that is not the one a model was trained with is told, whatever its name."""

import logging

import parity
import pytest
import tiny_encoders
import torch

from u2a_fast import LateFusion, load_model
from u2a_fast.encoders import from_pretrained_model
from u2a_fast.encoders.fingerprint import differ, fingerprint, is_fingerprint


@pytest.fixture
def folder(tmp_path):
    tiny_encoders.build("bert").save_pretrained(tmp_path / "bert")
    return str(tmp_path / "bert")


def changed(model, how):
    if how == "merged":
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["value"]))
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.1)
        return model.merge_and_unload()
    if how == "shorter":
        model.encoder.layer = model.encoder.layer[:1]
    return model


@pytest.mark.parametrize("how", ["merged", "shorter", "as it was"])
def test_a_model_that_was_changed_before_is_told_when_it_is_read_by_its_name(how, folder, tmp_path, caplog):
    given = changed(type(tiny_encoders.build("bert")).from_pretrained(folder), how)
    model = LateFusion({"text": given}, num_labels=3, lora=None).eval()
    model.save_pretrained(tmp_path / "saved")
    with caplog.at_level(logging.WARNING):
        again = load_model(tmp_path / "saved")
    assert ("pass encoders={'text': ...}" in caplog.text) == (how != "as it was")
    caplog.clear()
    again = load_model(tmp_path / "saved", encoders={"text": given})
    batch = parity.batch({"text": "bert"}, 3, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, model(**batch).logits)
    assert not caplog.records


@pytest.mark.parametrize("options", [{"dtype": torch.bfloat16}, {"quantization": "int8"}, {}])
def test_rounding_is_no_change(options, folder, tmp_path, caplog):
    model = LateFusion({"text": folder}, num_labels=3)
    model.save_pretrained(tmp_path / "a")
    with caplog.at_level(logging.WARNING):
        load_model(tmp_path / "a", **options).save_pretrained(tmp_path / "b")
        load_model(tmp_path / "b")
    assert "other weights" not in caplog.text


def test_an_encoder_that_was_trained_has_no_name(folder):
    model = LateFusion({"text": folder}, num_labels=3)
    model.encoders["text"].blocks[0].norm1.bias.requires_grad_(True)
    model.eval().train()
    assert LateFusion(model.encoders, num_labels=3).config.encoders == {"text": ""}


@pytest.mark.parametrize("family", tiny_encoders.FAMILIES)
def test_every_family_has_one(family):
    model = tiny_encoders.build(family)
    text = fingerprint(from_pretrained_model(model))
    assert is_fingerprint(text) and len(text.split()) > 10
    assert not differ(text, fingerprint(from_pretrained_model(model.bfloat16())))
