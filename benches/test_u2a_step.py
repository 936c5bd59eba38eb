"""A training step of U2A, forward and backward, against the same step written with transformers + PEFT.

    pytest benches/test_u2a_step.py --benchmark-only -s

ViT-B/16 at 224 + BERT-base, cut to LAYERS layers, batch 16, texts of 8 to 128 tokens; and the emoji encoders (DINOv2-S,
MiniLM), batch 32, with the names of 32 emoji. LoRA of rank 8 on q, k, v, o. PEFT's arms get pictures of zeros
and padded texts for what is absent, as public code has them. Its bf16 arms run only where bf16 is multiplied in
hardware: elsewhere they take many times as long as fp32, and beating them would say nothing.
"""

import copy

import pytest
import torch
from arms import DEVICE, FAST, best, counted_flops, hold, measure
from models import (
    ALPHA,
    CLASSES,
    RANK,
    PeftU2A,
    even_lengths,
    kept_by,
    make_batch,
    presence_table,
    real_rows,
    step,
    tiny_encoders,
    vit_and_bert,
)
from transformers import AutoTokenizer

from u2a_fast import U2A, LoraConfig
from u2a_fast.data import dinov2_folder, load_emoji, minilm_folder
from u2a_fast.encoders import load
from u2a_fast.memory import saved_bytes

LAYERS, BATCH, SHORTEST, LONGEST, MISSING = 3, 16, 8, 128, 0.7
EMOJI_BATCH = 32
ROUNDS = 9
HAS_BF16 = torch.bfloat16 == FAST
LIKE = "ViT-B + BERT-base"
COUNTED = ("packed", "where", "peft fp32 sdpa")  # flops do not depend on the dtype


def in_dtype(models, dtype):
    return {name: copy.deepcopy(model).to(dtype) for name, model in models.items()}


def ours(models, dtype=FAST, absent="pack", quantization=None):
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA)
    options = {"lora": lora, "modality_dropout": 0.0, "absent": absent, "quantization": quantization}
    return U2A(in_dtype(models, dtype), CLASSES, **options).to(DEVICE).train()


def peft_arms(models):
    """Under autocast the weights are fp32, and cast as they are multiplied."""
    kinds = {"fp32": (torch.float32, False)}
    if HAS_BF16:
        kinds |= {"autocast": (torch.float32, True), "bf16": (torch.bfloat16, False)}
    return {
        f"peft {kind} {attention}": PeftU2A(in_dtype(models, dtype), attention, autocast).train()
        for kind, (dtype, autocast) in kinds.items()
        for attention in ("eager", "sdpa")
    }


def our_arms(models):
    arms = {"packed": ours(models), "where": ours(models, absent="where")}
    if HAS_BF16:
        arms |= {"packed fp32": ours(models, torch.float32), "packed int8_w8a8": ours(models, quantization="int8_w8a8")}
    return arms


def time_step(benchmark, models, batch, rounds, **facts):
    arms = {**our_arms(models), **peft_arms(models)}
    steps = {name: step(model, **batch) for name, model in arms.items()}
    flops = {name: counted_flops(steps[name]) for name in COUNTED}
    kept = {name: kept_by(model, **batch) for name, model in arms.items()}
    facts |= {"flops": flops, "saved_bytes": kept, "batch": len(batch["labels"])}
    return measure(benchmark, steps, "packed", rounds, warmup=1, useful_flops=flops["packed"], **facts)


def gains(rows, case):
    """Our time against PEFT's best arm, against its default, and against computing absent rows too."""
    peft, packed = [name for name in rows if name.startswith("peft")], rows["packed"]["median_s"]
    found = {
        f"u2a_step {case}: gain over the best PEFT arm": best(rows, peft) / packed,
        f"u2a_step {case}: gain over computing absent rows": rows["where"]["median_s"] / packed,
    }
    if HAS_BF16 and case != "emoji":
        default, int8 = best(rows, ["peft fp32 eager", "peft fp32 sdpa"]), rows["packed int8_w8a8"]["median_s"]
        found[f"u2a_step {case}: gain over PEFT fp32"] = default / packed
        found[f"u2a_step {case}: gain of int8 W8A8 over the best PEFT arm"] = best(rows, peft) / int8
    return found


@pytest.mark.parametrize("missing", [MISSING, 0.0], ids=["70% missing", "full presence"])
def test_vit_and_bert(benchmark, missing):
    models = vit_and_bert(LAYERS)
    batch = make_batch(even_lengths(BATCH, SHORTEST, LONGEST), presence_table(BATCH, missing))
    facts = {"encoders": f"{LIKE}, {LAYERS} layers", "missing_rate": missing, "real_rows": real_rows(batch)}
    rows = time_step(benchmark, models, batch, ROUNDS, **facts, longest_text=LONGEST)
    hold(benchmark, gains(rows, f"{LIKE}, {'70% missing' if missing else 'full presence'}"))


def test_emoji(benchmark):
    sources = {"image": dinov2_folder(image_size=112), "text": minilm_folder()}
    models = {name: load(str(folder), name, dtype=torch.float32) for name, folder in sources.items()}
    names = list(load_emoji()["train"]["text"])[:EMOJI_BATCH]
    lengths = [len(each) for each in AutoTokenizer.from_pretrained(sources["text"])(names)["input_ids"]]
    batch = make_batch(torch.tensor(lengths), presence_table(EMOJI_BATCH, MISSING), image_size=112)
    facts = {"encoders": "DINOv2-S at 112 + MiniLM-L6", "missing_rate": MISSING, "longest_text": max(lengths)}
    rows = time_step(benchmark, {name: model.to(DEVICE) for name, model in models.items()}, batch, ROUNDS, **facts)
    hold(benchmark, gains(rows, "emoji"))


def time_padding(benchmark, model, lengths, rounds, **facts):
    """Texts of several lengths in one padded batch, against a batch of each length, which needs no padding."""

    def texts_of(each):
        everyone = torch.tensor([[False, True]]).expand(len(each), 2)
        return {n: value for n, value in make_batch(each, everyone, image_size=32).items() if n != "image"}

    batches = {
        "without padding": [texts_of(lengths[lengths == length]) for length in lengths.unique()],
        "padded": [texts_of(lengths)],
    }

    def losses(name):
        return torch.stack([model(**batch).loss for batch in batches[name]])

    kept = {name: saved_bytes(lambda name=name: losses(name), model.parameters()) for name in batches}
    steps = {name: (lambda name=name: losses(name).sum().backward()) for name in batches}
    facts |= {"saved_bytes": kept, "real_rows": int(lengths.sum()) + len(lengths), "longest_text": int(lengths.max())}
    return measure(benchmark, steps, "without padding", rounds, warmup=1, **facts), kept


def test_padding_costs_nothing(benchmark):
    lengths = torch.tensor([SHORTEST, LONGEST] * (BATCH // 2))
    rows, kept = time_padding(benchmark, ours(vit_and_bert(LAYERS)), lengths, ROUNDS, encoders=LIKE)
    over = "padded over the same rows without padding", "saved bytes, padded over without padding"
    ratio = kept["padded"] / kept["without padding"]
    hold(benchmark, {f"u2a_step: {over[0]}": rows["padded"]["ratio"], f"u2a_step: {over[1]}": ratio})


def place_of(batch):
    """Where a batch stands on the axes of the charts."""
    complete, mask = batch["modality_mask"].all(dim=1), batch["text"]["attention_mask"]
    return {
        "real_rows": real_rows(batch),
        "missing_rate": 1 - complete.float().mean().item(),
        "longest_text": mask.shape[1],
    }


def time_growth(benchmark, model, batches, rounds, **facts):
    """The worst relative deviation of the seconds from the line through them, over real rows."""
    steps = {name: step(model, **batch) for name, batch in batches.items()}
    points = {name: place_of(batch) for name, batch in batches.items()}
    rows = measure(benchmark, steps, next(iter(batches)), rounds, warmup=1, points=points, **facts)
    x = torch.tensor([points[name]["real_rows"] for name in batches], dtype=torch.float64)
    y = torch.tensor([rows[name]["median_s"] for name in batches], dtype=torch.float64)
    design = torch.stack([x, torch.ones_like(x)], dim=1)
    line = torch.linalg.lstsq(design, y[:, None]).solution.flatten()
    worst = ((design @ line - y).abs() / y).max().item()
    benchmark.extra_info.update(fit={"seconds_per_row": line[0].item(), "seconds": line[1].item(), "worst": worst})
    return worst


def growing(batch, lengths, image_size):
    """Batches with more and more present: by missing rate, and by length of the texts."""
    rates = {f"{rate:.0%} missing": rate for rate in (0.9, 0.7, 0.5, 0.3, 0.0)}
    made = {name: make_batch(lengths, presence_table(batch, rate), image_size) for name, rate in rates.items()}
    shorter = {f"texts of at most {n}": lengths.clamp(max=n) for n in (32, 64)}
    everyone = torch.ones(batch, 2, dtype=torch.bool)
    return {**made, **{name: make_batch(each, everyone, image_size) for name, each in shorter.items()}}


def test_cost_is_linear_in_real_rows(benchmark):
    batches = growing(BATCH, even_lengths(BATCH, SHORTEST, LONGEST), 224)
    worst = time_growth(benchmark, ours(vit_and_bert(LAYERS)), batches, ROUNDS, encoders=LIKE)
    hold(benchmark, {"u2a_step: worst deviation from a line in real rows": worst})


def test_smoke(benchmark):
    models, lengths = tiny_encoders(), even_lengths(8, 2, 9)
    batch = make_batch(lengths, presence_table(8, MISSING), 32)
    rows = time_step(benchmark, models, batch, 2, encoders="tiny", missing_rate=MISSING)
    hold(benchmark, {f"smoke {name}": gain for name, gain in gains(rows, "tiny").items()})


def test_padding_smoke(benchmark):
    time_padding(benchmark, ours(tiny_encoders()), torch.tensor([2, 8] * 4), 2)


def test_growth_smoke(benchmark):
    time_growth(benchmark, ours(tiny_encoders()), growing(8, even_lengths(8, 2, 9), 32), 2)


def test_both_compute_the_same_smoke(benchmark):
    """The loss of PEFT's arm is ours, with adapters that are zero still and the same mask tokens and head."""
    models = tiny_encoders()
    batch = make_batch(even_lengths(8, 2, 9), presence_table(8, MISSING), 32)
    model = U2A(copy.deepcopy(models), CLASSES, modality_dropout=0.0).to(DEVICE)
    theirs = PeftU2A(models, "sdpa")
    with torch.no_grad():
        theirs.head.load_state_dict(model.head.state_dict())
        for name, token in theirs.mask_tokens.items():
            token.copy_(model.mask_tokens[name].view(1, 1, -1))
    expected = benchmark.pedantic(lambda: model(**batch).loss, rounds=1)
    torch.testing.assert_close(theirs(**batch), expected, rtol=1e-4, atol=1e-4)
