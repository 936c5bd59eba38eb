"""Epochs of PMF whose frozen features lie on disk already, against the first one, which writes them.

    pytest benches/test_cache.py --benchmark-only -s

ViT-B/16 at 224 + BERT-base with all 12 layers, of which the last two fuse; two batches of 4, forward and backward, all
present, texts of 8 to 128 tokens. "no cache" computes everything in every epoch.
"""

import shutil

from arms import DEVICE, FAST, hold, measure
from models import CLASSES, even_lengths, make_batch, presence_table, tiny_encoders, vit_and_bert

from u2a_fast import PMF
from u2a_fast.feature_cache import FeatureCache

LAYERS, FUSION_LAYERS, BATCH, BATCHES, ROUNDS = 12, 2, 4, 2, 4


def time_epochs(benchmark, models, folder, batches, fusion_layers, rounds, **facts):
    model = PMF({n: m.to(FAST) for n, m in models.items()}, CLASSES, fusion_layers=fusion_layers).to(DEVICE).train()
    first, cached = FeatureCache(folder / "first"), FeatureCache(folder / "cached")

    def epoch(cache):
        model.feature_cache = cache
        for batch in batches:
            model(**batch).loss.backward()

    def first_epoch():
        shutil.rmtree(first.folder, ignore_errors=True)
        epoch(first)

    epoch(cached)
    arms = {"first": first_epoch, "cached": lambda: epoch(cached), "no cache": lambda: epoch(None)}
    rows = measure(benchmark, arms, "first", rounds, warmup=1, fusion_layers=fusion_layers, **facts)
    stored = sum(path.stat().st_size for path in cached.folder.rglob("*.safetensors"))
    benchmark.extra_info["bytes"] = {"cached": stored}
    assert cached.misses == sum(int(batch["modality_mask"].sum()) for batch in batches)
    return rows


def several(batch, batches, longest, image_size):
    """Batches whose samples are all different."""
    whole = make_batch(even_lengths(batch * batches, 8, longest), presence_table(batch * batches, 0.0), image_size)
    return [cut(whole, slice(i * batch, (i + 1) * batch)) for i in range(batches)]


def cut(tree, rows):
    return {name: cut(value, rows) for name, value in tree.items()} if isinstance(tree, dict) else tree[rows]


def test_cached_epoch(benchmark, tmp_path):
    facts = {"encoders": "ViT-B + BERT-base", "layers": LAYERS, "longest_text": 128}
    batches = several(BATCH, BATCHES, 128, 224)
    rows = time_epochs(benchmark, vit_and_bert(LAYERS), tmp_path, batches, FUSION_LAYERS, ROUNDS, **facts)
    hold(benchmark, {"cache: gain of a cached epoch": rows["first"]["median_s"] / rows["cached"]["median_s"]})


def test_smoke(benchmark, tmp_path):
    time_epochs(benchmark, tiny_encoders(3), tmp_path, several(2, 2, 12, 32), 1, 2)
