"""PMF through the tools that users have: evaluation, Trainer, saved folders and the cache of frozen features."""

import parity
import pytest
import tiny_data
import tiny_encoders
import torch

from u2a_fast import PMF, MultimodalCollator, evaluate, load_model


def test_evaluate_reports_every_scenario():
    built = {"text": tiny_encoders.build("bert"), "image": tiny_encoders.build("vit")}
    model = PMF(built, num_labels=3, fusion_layers=1, processors=tiny_data.processors())
    rows = evaluate(model, tiny_data.samples(6), ["full", "image missing", "rate 0.7"])
    assert [row["n"] for row in rows] == [6, 6, 6]
    assert model.predict([{"text": "red thing"}, {"image": tiny_data.samples(1)[0]["image"]}]).shape == (2, 3)


@pytest.mark.slow
def test_saved_and_reloaded(tmp_path):
    folders = tiny_data.encoder_folders(tmp_path)
    model = PMF(folders, num_labels=3, fusion_layers=1, query_prompts=3, train_fusion_context=False).eval()
    model.save_pretrained(tmp_path / "saved")
    batch = MultimodalCollator(tiny_data.processors())(tiny_data.samples(4))
    again = load_model(tmp_path / "saved")
    assert isinstance(again, PMF) and torch.equal(model(**batch).logits, again(**batch).logits)
    handed = {name: tiny_encoders.build(family) for name, family in {"text": "bert", "image": "vit"}.items()}
    handed = PMF.from_pretrained(tmp_path / "saved", encoders=handed)
    assert torch.equal(model(**batch).logits, handed(**batch).logits)


@pytest.mark.slow
def test_trainer_trains_and_resumes(tmp_path):
    whole, resumed = tiny_data.whole_and_resumed(lambda folders: PMF(folders, num_labels=3, fusion_layers=1), tmp_path)
    parameters = zip(whole.export_parameters().items(), resumed.export_parameters().values(), strict=True)
    assert all(torch.equal(a, b) for (_, a), b in parameters)


def test_cached_features_give_the_same_logits_and_run_the_prefix_once(tmp_path):
    built = {"image": tiny_encoders.build("vit"), "text": tiny_encoders.build("bert")}
    cached = PMF(built, num_labels=5, fusion_layers=1, feature_cache=tmp_path).eval()
    plain = PMF(built, num_labels=5, fusion_layers=1).eval()
    plain.load_state_dict(cached.state_dict())
    inputs = parity.batch({"image": "vit", "text": "bert"}, 5, dtype=torch.float32)
    present = parity.random_presence(5, 2, 0)
    first = cached(**inputs, modality_mask=present).logits
    torch.testing.assert_close(first, plain(**inputs, modality_mask=present).logits)
    misses = cached.feature_cache.misses
    assert torch.equal(cached(**inputs, modality_mask=present).logits, first)
    assert cached.feature_cache.misses == misses == int(present.sum())
