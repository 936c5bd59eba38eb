"""Samples a second through the collator: what the data can feed, beside what a step eats.

    pytest benches/test_data.py --benchmark-only -s

Emoji pictures and names with 70% of the samples incomplete, decoded, tokenised and processed in batches of 32, in the
process itself and in 2 workers; "cached": every picture lies in the data cache already. The workers share the cores
with everything else here; the process start of a loader counts, as it does once an epoch.
"""

from arms import hold, measure
from torch.utils.data import DataLoader, Subset
from transformers import AutoTokenizer
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from u2a_fast import MissingPattern, MultimodalCollator
from u2a_fast.data import dinov2_folder, load_emoji, minilm_folder, with_missing

SAMPLES, BATCH, ROUNDS = 320, 32, 7


def collator(cache=None):
    processors = {
        "image": AutoImageProcessor.from_pretrained(dinov2_folder(image_size=112)),
        "text": AutoTokenizer.from_pretrained(minilm_folder()),
    }
    return MultimodalCollator(processors, cache=cache)


def time_data(benchmark, folder, samples, workers, rounds):
    rows = with_missing(load_emoji()["train"], MissingPattern(rate=0.7, kind="both"), ("image", "text"))
    subset, plain, cached = Subset(rows, range(samples)), collator(), collator(folder)

    def through(workers, collate):
        return sum(len(b["labels"]) for b in DataLoader(subset, BATCH, num_workers=workers, collate_fn=collate))

    arms = {f"{n} workers": (lambda n=n: through(n, plain)) for n in workers}
    arms |= {f"{n} workers, cached": (lambda n=n: through(n, cached)) for n in workers}
    assert {arm() for arm in arms.values()} == {samples}  # and the cache is full
    base = f"{workers[0]} workers"
    measured = measure(benchmark, arms, base, rounds, warmup=1, samples=samples, missing_rate=0.7)
    rates = {name: samples / row["median_s"] for name, row in measured.items()}
    stored = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    benchmark.extra_info.update(samples_per_second=rates, bytes={"cached": stored})
    hold(benchmark, {f"data: samples a second, {name}": rate for name, rate in rates.items() if "A/A" not in name})


def test_data(benchmark, tmp_path):
    time_data(benchmark, tmp_path, SAMPLES, (0, 2), ROUNDS)


def test_smoke(benchmark, tmp_path):
    time_data(benchmark, tmp_path, 8, (0, 1), 2)
