"""What cannot be right is refused, in one sentence that says what would do."""

from dataclasses import replace
from operator import attrgetter

import peft
import pytest
import tiny_encoders
import torch
import transformers
from transformers import BertConfig, BertForSequenceClassification, CLIPConfig, CLIPModel

from u2a_fast.encoders import from_pretrained_model
from u2a_fast.encoders.families import BERT, BERT_ROLES

SMALL = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)


ROPE = {"rope_theta": 100.0, "factor": 2.0}
FACTORS = {f"{length}_factor": [1.0, 2.0, 3.0] for length in ("short", "long")}
LONG_ROPE = ROPE | FACTORS | {"rope_type": "longrope", "original_max_position_embeddings": 8}


def of(name, **settings):
    """Hugging Face's model of a name: `GPT2` -> GPT2Model."""
    return getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**settings))


def t5():
    return transformers.T5EncoderModel(
        transformers.T5Config(vocab_size=9, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )


def pruned():
    model = tiny_encoders.build("bert")
    for role in ("query", "key", "value"):
        setattr(model.encoder.layer[1].attention.self, role, torch.nn.Linear(32, 24))
    model.encoder.layer[1].attention.output.dense = torch.nn.Linear(24, 32)
    return model


def of_another_version():
    model = tiny_encoders.build("vit")
    model.layers[0].mlp.intermediate = model.layers[0].mlp.fc1
    del model.layers[0].mlp.fc1
    return model


def with_adapters():
    peft = pytest.importorskip("peft")
    model = tiny_encoders.build("bert")
    model.add_adapter(peft.LoraConfig(target_modules=["query"]))
    return model


class FusedLayerNorm(torch.nn.Module):
    """As apex has it: LayerNorm, and no subclass of torch's."""

    def __init__(self, width):
        super().__init__()
        self.weight, self.bias, self.eps = *(torch.nn.Parameter(torch.ones(width)) for _ in range(2)), 1e-5


def with_foreign_norms():
    model = tiny_encoders.build("bert")
    model.encoder.layer[0].output.LayerNorm = FusedLayerNorm(32)
    return model


def in_fp8():
    model = tiny_encoders.build("bert")
    model.encoder.layer[1].output.dense.weight.data = torch.zeros(32, 45).to(torch.float8_e4m3fn)
    return model


def packed():
    return torch.ao.quantization.quantize_dynamic(tiny_encoders.build("bert"), {torch.nn.Linear})


def wrapped_by_peft():
    return peft.get_peft_model(tiny_encoders.build("bert"), peft.LoraConfig(target_modules=["query"])).base_model


ESM_POSITIONS = "EsmModel with position_embedding_type='relative_key' .* our block takes 'absolute' or 'rotary'"


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: BertForSequenceClassification(BertConfig(vocab_size=9, **SMALL)), "task head"),
        (lambda: of("GPT2", vocab_size=9, n_embd=16, n_layer=1, n_head=2), "BERT.*Whisper encoder"),
        (lambda: CLIPModel(CLIPConfig(text_config=SMALL | {"vocab_size": 9}, vision_config=SMALL)), "two towers"),
        (pruned, "pruned"),
        (of_another_version, "layer 0 of ViTModel has no 'mlp.fc1'"),
        (with_adapters, "carries adapters of PEFT: merge them"),
        (lambda: tiny_encoders.build("bert", is_decoder=True), "is_decoder"),
        (lambda: tiny_encoders.build("wav2vec2", add_adapter=True), "add_adapter"),
        (lambda: tiny_encoders.build("wav2vec2_stable", adapter_attn_dim=4), "adapter_attn_dim"),
        (lambda: tiny_encoders.build("bert", hidden_act="prelu"), "'prelu' has parameters of its own"),
        (t5, "T5EncoderModel is not supported: its layers have a relative position bias"),
        (lambda: of("DebertaV2", vocab_size=9, **SMALL), "DebertaV2Model .* attention to relative positions"),
        (lambda: of("WavLM", **tiny_encoders.CONFIGS["wav2vec2"][2]), "WavLMModel .* a relative position bias"),
        (lambda: tiny_encoders.build("beit", use_relative_position_bias=True), "a relative position bias"),
        (lambda: tiny_encoders.build("data2vec_vision", use_shared_relative_position_bias=True), "a relative position"),
        (lambda: tiny_encoders.build("gemma3", attn_logit_softcapping=30.0), "a soft cap on attention"),
        (lambda: tiny_encoders.build("llama", rope_parameters=ROPE | {"rope_type": "dynamic"}), "'dynamic'"),
        (lambda: tiny_encoders.build("qwen3", rope_parameters=LONG_ROPE), "'longrope'"),
        (lambda: tiny_encoders.build("esm", position_embedding_type="relative_key"), ESM_POSITIONS),
        (with_foreign_norms, "a FusedLayerNorm is not read"),
        (in_fp8, r"a Linear of torch\.float8_e4m3fn is not taken: load the encoder in floating point"),
        (packed, "a Linear of packed weights is not taken: load the encoder in floating point"),
        (wrapped_by_peft, r"LoraModel wraps an encoder: pass model\.merge_and_unload\(\), or the plain encoder"),
        (
            lambda: torch.compile(tiny_encoders.build("bert")),
            r"wraps an encoder: pass model\._orig_mod",
        ),
        (
            lambda: torch.nn.DataParallel(tiny_encoders.build("bert")),
            r"wraps an encoder: pass model\.module",
        ),
    ],
)
def test_unsupported_models_are_refused_in_one_sentence(build, message):
    with pytest.raises(ValueError, match=message):
        from_pretrained_model(build())


@pytest.mark.parametrize(
    "name, told",
    [
        *((name, "config") for name in ("llama", "qwen2", "qwen3", "mistral", "gemma3", "clip_text")),
        *((name, "layers.1.self_attn") for name in ("llama", "qwen2", "qwen3", "mistral", "gemma3")),
    ],
)
def test_a_causal_model_that_is_told_to_see_both_ways_is_refused(name, told):
    model = tiny_encoders.build(name)
    attrgetter(told)(model).is_causal = False
    with pytest.raises(ValueError, match=r"is_causal=False sees both ways, .*: set it to True, or describe"):
        from_pretrained_model(model)


def test_pictures_that_are_not_square_are_refused_where_positions_turn():
    encoder = from_pretrained_model(tiny_encoders.build("dinov3"))
    with pytest.raises(ValueError, match=r"pictures of 16 x 24 pixels are not square.*crop or resize"):
        encoder.embed(pixel_values=torch.randn(1, 3, 16, 24))


def test_positions_that_turn_a_part_of_a_head_are_refused():
    model = tiny_encoders.build("nomic_bert")
    model.rotary_emb.inv_freq = model.rotary_emb.inv_freq[:2].clone()
    encoder = from_pretrained_model(model)
    with pytest.raises(ValueError, match="turn 4 of the 8 features of a head"):
        encoder(**tiny_encoders.inputs("nomic_bert", 2))


@pytest.mark.parametrize("size", [(25, 25), (26, 30), (8, 72)])
def test_pictures_that_would_be_cut_to_whole_patches_are_refused(size):
    encoder = from_pretrained_model(tiny_encoders.build("vit_mae"))
    with pytest.raises(ValueError, match=r"have 9 patches, .* for 9, of 24 x 24 pixels: resize them"):
        encoder.embed(pixel_values=torch.randn(1, 3, *size))


def test_pictures_without_a_position_for_each_patch_are_refused():
    encoder = from_pretrained_model(tiny_encoders.build("vit_mae"))
    with pytest.raises(ValueError, match="have 25 patches, and this encoder has positions for 9"):
        encoder.embed(pixel_values=torch.randn(1, 3, 40, 40))


@pytest.mark.parametrize(
    "name, inputs, message",
    [
        ("whisper", {"input_features": (1, 80, 18)}, "takes 12 mel bands and 18 frames, not 80 and 18: let its own"),
        ("whisper", {"input_features": (1, 12, 30)}, "takes 12 mel bands and 18 frames, not 12 and 30: let its own"),
        ("ast", {"input_values": (1, 56, 32)}, "takes 24 mel bands and 56 frames, not 32 and 56: let its own"),
        ("ast", {"input_values": (1, 24, 56)}, "takes 24 mel bands and 56 frames, not 56 and 24: let its own"),
        ("videomae", {"pixel_values": (1, 6, 3, 24, 24)}, "takes 4 frames, not 6: give .* processor.num_frames = 4"),
        ("wav2vec2", {"input_features": (1, 12, 18)}, "takes input_values, .*, not input_features: give it"),
        ("whisper", {"input_values": (1, 400)}, "takes input_features, attention_mask, not input_values: give it"),
        ("vit", {"input_ids": (1, 3)}, "takes pixel_values, not input_ids: give it"),
    ],
)
def test_what_another_encoders_processor_makes_is_refused(name, inputs, message):
    encoder = from_pretrained_model(tiny_encoders.build(name))
    inputs = {key: torch.randn(shape) for key, shape in inputs.items()}
    with pytest.raises(ValueError, match=message):
        encoder.embed(**inputs)
    if "give it" in message:
        with pytest.raises(ValueError, match=message):
            encoder.padding_mask(**inputs)


def test_an_rmsnorm_with_a_bias_is_refused():
    model = tiny_encoders.build("llama")
    model.norm.bias = torch.nn.Parameter(torch.ones(32))
    with pytest.raises(ValueError, match="a LlamaRMSNorm is not read"):
        from_pretrained_model(model)


def test_a_family_that_lacks_a_product_is_refused():
    family = replace(BERT, roles={role: path for role, path in BERT_ROLES.items() if role != "k"})
    with pytest.raises(ValueError, match=r"roles of the family BERT.* must name qkv or q, k, v, not just q, v, o"):
        from_pretrained_model(tiny_encoders.build("bert"), family=family)


@pytest.mark.parametrize("shape", [(3, 5), (3, 9), (1, 7), (4, 7)])
def test_a_mask_of_other_samples_or_tokens_is_refused(shape):
    """Rows are laid end to end by it: those of one sample would be another's."""
    encoder, given = from_pretrained_model(tiny_encoders.build("bert")), torch.ones(shape, dtype=torch.long)
    given[-1, -2:] = 0
    with pytest.raises(ValueError, match=r"a mask of \[\d, \d\] is not one of \[3, 7\] \(samples, tokens\)"):
        encoder(input_ids=torch.full((3, 7), 5), attention_mask=given)
