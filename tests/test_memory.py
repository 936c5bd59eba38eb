"""Bytes are counted right, ours are few, and recomputing them changes no number."""

import copy

import pytest
import tiny_encoders
import torch
import transformers
from torch import nn
from torch.nn import functional as F

from u2a_fast import PMF, U2A, LoraConfig, memory, memory_counts
from u2a_fast.encoders import from_pretrained_model

ROLES = {
    "image": r".*(q_proj|k_proj|v_proj|o_proj|query|key|value|attention\.output\.dense)",
    "text": r".*(query|key|value|attention\.output\.dense)",
}


# ------------------------------------------------------------------------------------------------------- counting
def test_storages_are_counted_once_and_parameters_not_at_all():
    linear = nn.Linear(8, 4)
    x = torch.ones(3, 8, requires_grad=True)

    def f():
        half = x[:2]  # a view: its storage is that of x
        return linear(x).sum() + linear(half).sum() + (x * x).sum()

    assert memory.saved_bytes(f, linear.parameters()) == 3 * 8 * 4
    assert memory.saved_bytes(f) == 3 * 8 * 4 + 8 * 4 * 4


def test_what_is_freed_before_the_end_is_not_counted():
    x = torch.ones(5, requires_grad=True)

    def f():
        x.exp().detach()
        return x.exp()

    assert memory.saved_bytes(f) == 5 * 4


def test_nothing_is_kept_without_gradients():
    with torch.no_grad():
        assert memory.saved_bytes(lambda: torch.ones(5, requires_grad=True).exp()) == 0


# -------------------------------------------------------------------------------------------------- against PEFT
def small(depth=1.0):
    """DINOv2-S on 65 tokens and MiniLM on 16; `depth` shortens both."""
    sizes = dict(hidden_size=384, num_attention_heads=6)
    image = transformers.Dinov2Config(num_hidden_layers=int(12 * depth), image_size=112, patch_size=14, **sizes)
    text = transformers.BertConfig(num_hidden_layers=int(6 * depth), intermediate_size=1536, **sizes)
    return {"image": transformers.Dinov2Model(image), "text": text_model(text)}, 16


def base(depth=1.0):
    """ViT-B on 197 tokens and BERT-base on 64."""
    image = transformers.ViTModel(transformers.ViTConfig(num_hidden_layers=int(12 * depth)), add_pooling_layer=False)
    return {"image": image, "text": text_model(transformers.BertConfig(num_hidden_layers=int(12 * depth)))}, 64


def text_model(config):
    """Without dropout, whose masks would count against PEFT."""
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    return transformers.BertModel(config, add_pooling_layer=False)


def inputs_of(models, batch, length):
    side = models["image"].config.image_size
    return {
        "image": {"pixel_values": torch.randn(batch, 3, side, side)},
        "text": {"input_ids": torch.randint(5, 1000, (batch, length))},
    }


def our_step(models, inputs, autocast, **options):
    encoders = {m: copy.deepcopy(model) if autocast else copy.deepcopy(model).bfloat16() for m, model in models.items()}
    model = U2A(encoders, num_labels=8, lora=LoraConfig(r=8), modality_dropout=0.0, **options).train()
    labels = torch.zeros(len(inputs["text"]["input_ids"]), dtype=torch.long)

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model(**inputs, labels=labels).loss

    return model, step


def peft_step(models, inputs):
    import peft

    adapted = nn.ModuleDict(
        {
            m: peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=8, target_modules=ROLES[m]))
            for m, model in models.items()
        }
    ).train()
    head = nn.Linear(models["text"].config.hidden_size, 8)
    labels = torch.zeros(len(inputs["text"]["input_ids"]), dtype=torch.long)

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            rows = [adapted[m](**inputs[m]).last_hidden_state[:, 0] for m in adapted]
            return F.cross_entropy(head(rows[0] + rows[1]), labels)

    return adapted, step


@pytest.fixture(scope="module", params=[pytest.param("small"), pytest.param("base", marks=pytest.mark.slow)])
def against_peft(request):
    """(models, inputs, bytes that PEFT keeps)"""
    make, batch = {"small": (small, 8), "base": (base, 2)}[request.param]
    models, length = make(depth=0.5)
    inputs = inputs_of(models, batch, length)
    adapted, step = peft_step(models, inputs)
    return models, inputs, memory.saved_bytes(step, adapted.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [True, False])
def test_a_step_keeps_at_most_0_60_of_what_peft_keeps(against_peft, autocast):
    models, inputs, peft_bytes = against_peft
    model, step = our_step(models, inputs, autocast)
    assert memory.saved_bytes(step, model.parameters()) <= 0.60 * peft_bytes


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [True, False])
def test_checkpointing_keeps_at_most_0_20_of_what_peft_keeps(against_peft, autocast):
    models, inputs, peft_bytes = against_peft
    model, step = our_step(models, inputs, autocast)
    model.activation_checkpointing_enable()
    assert memory.saved_bytes(step, model.parameters()) <= 0.20 * peft_bytes


@pytest.mark.slow
def test_activations_alone_stay_below_0_60_of_pefts():
    """PEFT under autocast also keeps a bf16 copy of every frozen weight; large batches leave only the activations."""
    models, length = small(depth=0.5)
    kept = {}
    for batch in (4, 8):
        inputs = inputs_of(models, batch, length)
        for name, (model, step) in {"peft": peft_step(models, inputs), "ours": our_step(models, inputs, True)}.items():
            kept[name, batch] = memory.saved_bytes(step, model.parameters())
    assert kept["ours", 8] - kept["ours", 4] <= 0.60 * (kept["peft", 8] - kept["peft", 4])


# -------------------------------------------------------------------------------------------------------- planning
@pytest.mark.slow
def test_the_plan_counts_what_peft_and_full_fine_tuning_keep():
    models, length = small()
    rows = memory.plan({m: model.config for m, model in models.items()}, batch=2, tokens={"text": length})
    inputs = inputs_of(models, 2, length)
    adapted, step = peft_step(models, inputs)
    measured = memory.saved_bytes(step, adapted.parameters())
    assert abs(rows[1].activations - measured) < 0.01 * measured
    assert rows[1].gradients == 4 * sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    full = nn.ModuleDict(models).train()
    measured = memory.saved_bytes(
        lambda: sum(model(**inputs[m]).last_hidden_state[:, 0].sum() for m, model in full.items()), full.parameters()
    )
    assert rows[2].activations == measured
    assert rows[2].gradients == 4 * sum(p.numel() for p in full.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("mode", [None, "int8", "nf4"])
def test_the_plan_counts_what_our_model_takes(mode):
    models, length = small(depth=0.5)
    configs = {m: model.config for m, model in models.items()}
    planned = memory.plan(configs, batch=4, tokens={"text": length}, quantization=mode)[0]
    inputs = inputs_of(models, 4, length)
    model, step = our_step(models, inputs, autocast=False, quantization=mode)
    kept = memory.saved_bytes(step, model.parameters())
    weights = sum(t.numel() * t.itemsize for t in [*model.parameters(), *model.buffers()])
    assert abs(planned.activations - kept) < 0.01 * kept
    assert abs(planned.weights - weights) < 0.001 * weights


FAMILIES = tiny_encoders.FAMILIES
PAIRS = [*zip(FAMILIES[::2], [*FAMILIES[1::2], FAMILIES[0]], strict=False)]  # the last may be beside the first


@pytest.mark.slow
@pytest.mark.parametrize("one, other", PAIRS)
def test_every_family_can_be_planned(one, other):
    configs = {name: tiny_encoders.build(name, num_hidden_layers=5).config for name in (one, other)}
    rows = memory.plan(configs, batch=2)
    assert all(row.activations > 0 and row.weights > 0 for row in rows)
    assert rows[0].total < rows[2].total


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_further_layers_are_extrapolated_exactly(checkpointing, monkeypatch):
    configs = {
        "image": tiny_encoders.build("vit", num_hidden_layers=6).config,
        "text": tiny_encoders.build("bert", num_hidden_layers=5).config,
    }
    extrapolated = memory.plan(configs, batch=2, checkpointing=checkpointing)
    monkeypatch.setattr(memory_counts, "DEPTHS", (9, 10))
    assert memory.plan(configs, batch=2, checkpointing=checkpointing) == extrapolated


@pytest.mark.slow
def test_the_plan_of_encoders_larger_than_this_machine_is_quick_and_in_order():
    image = transformers.ViTConfig(
        hidden_size=1408, num_hidden_layers=40, num_attention_heads=16, intermediate_size=6144
    )
    text = transformers.BertConfig(
        hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=16384
    )
    rows = memory.plan({"image": image, "text": text}, batch=64, quantization="int8")
    assert rows[2].weights > 27 * 2**30 and rows[2].optimizer == 2 * rows[2].gradients
    assert 0.25 < rows[0].weights / rows[2].weights < 0.28
    assert rows[0].total < rows[1].total < rows[2].total


@pytest.mark.slow
def test_int8_training_takes_at_most_a_quarter_of_full_fine_tuning():
    models, length = small()
    configs = {m: model.config for m, model in models.items()}
    for dtype in (torch.bfloat16, torch.float32):
        rows = memory.plan(configs, batch=32, quantization="int8", tokens={"text": length}, dtype=dtype)
        assert rows[0].total <= 0.25 * rows[2].total


@pytest.mark.slow
@pytest.mark.parametrize("quantization, limit", [(None, 0.34), ("int8", 0.20)])
def test_pmf_training_takes_a_fraction_of_full_fine_tuning(quantization, limit):
    models, length = base()
    encoders = {name: model.bfloat16() for name, model in models.items()}
    model = PMF(encoders, num_labels=101, fusion_layers=2, quantization=quantization)
    rows = memory.memory_report(model, batch_size=1, tokens={"text": length})  # of more samples, a smaller one
    assert rows[0].total <= limit * rows[2].total


@pytest.mark.parametrize(
    "total, words", [(24 * 10**9, "from 24 GB on"), (24 * 10**9 + 1, "from 48 GB on"), (80 * 10**9 + 1, "none of them")]
)
def test_a_plan_says_which_gpus_it_fits(total, words):
    sentence = memory.fits([memory.MemoryRow("ours", total - 6, 1, 2, 3)])
    assert sentence == f"computed, for GPUs of 24, 48 and 80 GB: ours fits {words}"


FLAT = {"num_hidden_layers": 2}  # as many as are counted: nothing is extrapolated


@pytest.mark.slow
def test_tokens_set_the_length_of_images_and_texts():
    configs = {"image": transformers.ViTConfig(**FLAT), "text": transformers.BertConfig(**FLAT)}
    plain, half, short = (
        memory.plan(configs, batch=1, tokens=tokens)[0].activations for tokens in (None, {"image": 50}, {"text": 64})
    )
    assert half < plain and short < plain


@pytest.mark.slow
def test_8_bit_states_take_a_quarter():
    configs = {"image": transformers.ViTConfig(**FLAT), "text": transformers.BertConfig(**FLAT)}
    plain, small_states = (memory.plan(configs, optimizer=name)[2] for name in ("adamw", "adamw_8bit"))
    assert 0.25 < small_states.optimizer / plain.optimizer < 0.26


UNCOUNTABLE = [
    ({"optimizer": "sgd"}, "adamw"),
    ({"batch": 0}, "at least 1, not 0"),
    ({"tokens": {"txt": 64}}, "'txt'"),
    ({"tokens": {"text": 0}}, "text must be at least 1"),
]


@pytest.mark.parametrize("options, words", [({"method": "pmf"}, "memory_report"), *UNCOUNTABLE])
def test_what_cannot_be_planned_is_refused_before_anything_is_counted(options, words, monkeypatch):
    monkeypatch.setattr(memory, "extrapolate", None)
    with pytest.raises(ValueError, match=words):
        memory.plan({"image": transformers.ViTConfig(), "text": transformers.BertConfig()}, **options)


@pytest.mark.parametrize("options, words", UNCOUNTABLE)
def test_what_cannot_be_reported_is_refused_before_anything_is_counted(options, words, monkeypatch):
    monkeypatch.setattr(memory, "saved_bytes", None)
    options = {"batch_size" if name == "batch" else name: value for name, value in options.items()}
    model = U2A({"image": tiny_encoders.build("vit"), "text": tiny_encoders.build("bert")}, num_labels=2)
    with pytest.raises(ValueError, match=words):
        memory.memory_report(model, **options)


@pytest.mark.slow
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_a_model_reports_itself(quantization, capsys, monkeypatch):
    encoders = {"image": tiny_encoders.build("vit").bfloat16(), "text": tiny_encoders.build("bert").bfloat16()}
    configs = {m: model.config for m, model in encoders.items()}
    model = U2A(encoders, num_labels=2, lora=LoraConfig(r=8), quantization=quantization).eval()
    rows = memory.memory_report(model, batch_size=16, tokens={"text": 7})
    planned = memory.plan(configs, batch=16, tokens={"text": 7}, quantization=quantization)
    assert [row.name for row in rows] == [row.name for row in planned]
    assert rows[1:] == planned[1:]
    assert rows[0].weights == sum(t.numel() * t.itemsize for t in [*model.parameters(), *model.buffers()])
    assert 0 <= rows[0].activations - planned[0].activations < 0.1 * planned[0].activations  # fusion, head and loss
    assert not model.training
    monkeypatch.setenv("COLUMNS", "60")  # too few
    memory.print_plan(rows)
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("full fine-tuning", "weights", "gradients", "optimizer", "kept", "share"))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["siglip_text", "siglip2_text", "siglip2_vision", "data2vec_vision", "videomae"])
def test_inputs_of_every_kind_are_reported_as_they_are_planned(family):
    """Texts of a tower alone, rows of patches, films, and encoders that compute numbers of their own when made."""
    encoders = {"one": tiny_encoders.build(family).bfloat16(), "other": tiny_encoders.build("bert").bfloat16()}
    configs = {m: model.config for m, model in encoders.items()}
    model = U2A(encoders, num_labels=2, lora=LoraConfig(r=8))
    rows = memory.memory_report(model, batch_size=16, tokens={"other": 7})
    planned = memory.plan(configs, batch=16, tokens={"other": 7})
    assert rows[1:] == planned[1:]
    assert 0 <= rows[0].activations - planned[0].activations < 0.1 * planned[0].activations  # fusion, head and loss


def test_tokens_are_rows_of_films_and_of_patches():
    """Of a film of four frames, two at once; both pictures of 2 x 2 patches."""
    for family, tokens in (("videomae", 8), ("siglip2_vision", 4)):
        model = tiny_encoders.build(family)
        config = memory_counts.with_tokens(model.config, tokens)
        encoder = from_pretrained_model(type(model)(config))
        assert encoder(**memory_counts.dummy_inputs(config, 3, tokens)).shape == (3, tokens, encoder.width)


@pytest.mark.slow
def test_a_report_takes_other_lengths_and_leaves_everything_as_it_was(tmp_path):
    encoders = {"image": tiny_encoders.build("vit"), "text": tiny_encoders.build("bert", vocab_size=3)}
    model = PMF(encoders, num_labels=2, fusion_layers=1, feature_cache=tmp_path)
    plain, longer = (
        memory.memory_report(model, 4)[0],
        memory.memory_report(model, 4, tokens={"image": 17, "text": 20})[0],
    )
    assert longer.activations > plain.activations > 0
    with torch.no_grad():
        assert memory.memory_report(model, 4)[0] == plain
    assert model.feature_cache is not None and not any(tmp_path.rglob("*.safetensors"))


# --------------------------------------------------------------------------------------------------- recomputation
