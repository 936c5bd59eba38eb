"""What was trained of an encoder is saved, and the model that the caller gave stays as it is."""

import parity
import pytest
import tiny_encoders
import torch

from u2a_fast import U2A, JointEmbedding, LateFusion, set_backend

PAIR = {"image": "vit", "text": "bert"}


def built(method=U2A, **options):
    return method(tiny_encoders.build_many(PAIR), num_labels=3, **options).eval()


def logits(model):
    with torch.no_grad():
        return model(**parity.batch(PAIR, 3, dtype=torch.float32)).logits


def reloaded(model, folder):
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder, encoders=tiny_encoders.build_many(PAIR))


@pytest.mark.slow
def test_what_was_trained_is_saved_again_and_again(tmp_path):
    model = built()
    for p in model.encoders["text"].blocks[-1].norm2.parameters():
        p.requires_grad_(True).data.add_(1.0)
    expected = logits(model)
    for name in ("a", "b", "c"):
        model = reloaded(model, tmp_path / name)
        assert torch.equal(logits(model), expected)
    assert not model.encoders["text"].blocks[-1].norm2.weight.requires_grad
    for encoder in model.encoders.values():
        encoder.name_or_path = "where it was read"
    names = {name: merged.name_or_path for name, merged in model.merge_and_unload().items()}
    assert names["text"] == ""


def test_what_trained_first_is_saved_though_it_is_frozen_by_then(tmp_path):
    model = built(JointEmbedding)
    model.encoders["text"].blocks[0].fc1.bias.data.add_(1.0)
    model.requires_grad_(False)
    assert torch.equal(logits(reloaded(model, tmp_path)), logits(model))


def test_training_leaves_the_given_model_as_it_is():
    given = tiny_encoders.build("bert")
    before = {name: tensor.clone() for name, tensor in given.state_dict().items()}
    model = U2A({"a": given, "b": given}, num_labels=3).eval()
    model.encoders["a"].requires_grad_(True)
    twin = {name: p.clone() for name, p in model.encoders["b"].named_parameters() if "lora_" not in name}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    batch = tiny_encoders.inputs("bert", 4)
    model.train()(a=batch, b=batch, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in given.state_dict().items())
    own = dict(model.encoders["b"].named_parameters())
    assert all(torch.equal(own[name], p) for name, p in twin.items())


def test_loading_leaves_the_given_model_as_it_is(tmp_path):
    model = built(LateFusion)
    model.encoders["text"].requires_grad_(True)
    for p in model.encoders["text"].parameters():
        p.data = p.data + 0.1
    model.save_pretrained(tmp_path)
    given = tiny_encoders.build_many(PAIR)
    before = {name: tensor.clone() for name, tensor in given["text"].state_dict().items()}
    again = LateFusion.from_pretrained(tmp_path, encoders=given)
    torch.testing.assert_close(logits(again), logits(model))  # frozen, a block runs as one op
    assert all(torch.equal(tensor, before[name]) for name, tensor in given["text"].state_dict().items())


def test_a_dtype_holds_for_given_models_too(tmp_path):
    built().save_pretrained(tmp_path)
    given = tiny_encoders.build_many(PAIR)
    model = U2A.from_pretrained(tmp_path, encoders=given, dtype=torch.bfloat16)
    assert {encoder.dtype for encoder in model.encoders.values()} == {torch.bfloat16}
    assert {model.dtype for model in given.values()} == {torch.float32}


@pytest.mark.parametrize("family", ["dinov2", "qwen3", "gemma3"])
def test_scales_and_norms_of_heads_train_where_they_are_unfrozen(family):
    def gradients(backend):
        set_backend(backend)
        torch.manual_seed(0)
        model = LateFusion({"x": tiny_encoders.build(family, num_hidden_layers=3)}, num_labels=3)
        model = model.double().requires_grad_(True)
        batch = parity.batch({"x": family}, 3)
        model(**batch, labels=torch.tensor([0, 1, 2])).loss.backward()
        return {name: p.grad for name, p in model.named_parameters()}

    expected, found = gradients("reference"), gradients("torch")
    assert [name for name, grad in found.items() if grad is None] == [n for n, g in expected.items() if g is None]
    for name, grad in expected.items():
        if grad is not None:
            torch.testing.assert_close(found[name], grad, rtol=1e-8, atol=1e-10, msg=name)
