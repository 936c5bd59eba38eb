import itertools

import numpy as np
import pytest
import torch

from u2a_fast.data import MissingPattern, import_upstream_table

PAIR = ("image", "text")
TRIPLE = ("image", "text", "audio")
KINDS = [("both", PAIR), ("text", PAIR), ("image", PAIR), ("any", PAIR), ("both", TRIPLE), ("audio", TRIPLE),
         ("any", TRIPLE)]  # fmt: skip


@pytest.mark.parametrize(("kind", "modalities"), KINDS)
@pytest.mark.parametrize(("rate", "n"), [(0.7, 90), (0.7, 170), (0.7, 180), (0.9, 101), (0, 50), (1, 50), (0.3, 0)])
def test_exactly_the_rounded_down_share_is_incomplete_and_nothing_empty(kind, modalities, rate, n):
    table = MissingPattern(rate=rate, kind=kind).table(n, modalities)
    assert table.shape == (n, len(modalities))
    assert table.dtype == torch.bool
    assert (~table).any(dim=1).sum() == {0.7: 7 * n // 10, 0.9: 9 * n // 10, 0.3: 3 * n // 10}.get(rate, rate * n)
    assert table.any(dim=1).all()


@pytest.mark.parametrize(
    ("n", "lost"),
    [(15552, [5443, 5443]), (2608, [912, 913]), (7799, [2729, 2730]), (61142, [21399, 21400]), (22716, [7950, 7951])],
)
def test_the_counts_are_those_of_the_literature(n, lost):
    """Image and text lost at rate 0.7, kind both, for the splits of MM-IMDb and UPMC Food-101."""
    assert (~MissingPattern(rate=0.7).table(n, PAIR)).sum(dim=0).tolist() == lost


@pytest.mark.parametrize("rate", [0.7, 0.9])
@pytest.mark.parametrize("kind", PAIR)
def test_a_modalitys_name_takes_that_modality_alone(kind, rate):
    lost = (~MissingPattern(rate=rate, kind=kind).table(200, PAIR)).sum(dim=0)
    assert lost.tolist() == [200 * rate if name == kind else 0 for name in PAIR]


@pytest.mark.parametrize(("ratio", "lost"), [(0, [0, 70]), (0.3, [21, 49]), (0.29, [20, 50]), (1, [70, 0])])
def test_both_ratio_is_the_share_that_loses_the_first_modality(ratio, lost):
    assert (~MissingPattern(both_ratio=ratio).table(100, PAIR)).sum(dim=0).tolist() == lost


def test_of_three_modalities_both_takes_one_each_and_evenly():
    lost = ~MissingPattern(rate=0.5, kind="both").table(100, TRIPLE)
    assert lost.sum(dim=1).max() == 1
    assert lost.sum(dim=0).tolist() == [16, 17, 17]


def test_any_takes_every_proper_subset_equally_often():
    lost = ~MissingPattern(rate=1, kind="any").table(600, TRIPLE)
    rows = [tuple(row) for row in lost.tolist()]
    subsets = [row for row in itertools.product([False, True], repeat=3) if 0 < sum(row) < 3]
    assert {row: rows.count(row) for row in set(rows)} == dict.fromkeys(subsets, 100)


@pytest.mark.parametrize(("kind", "modalities", "both_ratio"), [*((*case, 0.5) for case in KINDS), ("both", PAIR, 0.3)])
def test_what_is_missing_at_a_low_rate_is_missing_at_a_higher_one(kind, modalities, both_ratio):
    tables = [MissingPattern(rate, kind, both_ratio).table(157, modalities) for rate in (0.1, 0.5, 0.7, 0.9)]
    for low, high in itertools.pairwise(tables):
        changed = low != high
        assert (high <= low).all()
        assert low[changed.any(dim=1)].all(), "a row that was incomplete already must not lose more"


def test_seed_and_split_choose_the_table():
    base = MissingPattern()
    assert torch.equal(base.table(500, PAIR), MissingPattern().table(500, PAIR))
    for other in (MissingPattern(seed=1), MissingPattern(split="test")):
        assert not torch.equal(base.table(500, PAIR), other.table(500, PAIR))


def test_tables_stay_the_same_over_versions():
    table = MissingPattern(rate=0.5).table(12, PAIR)
    kept = ["".join(letter for letter, present in zip("it", row, strict=True) if present) for row in table.tolist()]
    assert kept == ["t", "it", "it", "t", "t", "it", "it", "i", "it", "i", "i", "it"]
    assert MissingPattern().hash(90, PAIR) == "8404d793dd6cfcf58f13ce33fa5efcc9b4316b1563f39299da783eebda27cb8c"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rate": 1.1}, "rate must lie between 0 and 1, not 1.1"),
        ({"rate": -0.1}, "rate must lie between 0 and 1"),
        ({"rate": float("nan")}, "rate must lie between 0 and 1, not nan"),
        ({"both_ratio": 2}, "both_ratio must lie"),
        ({"seed": -1}, "seed must be a whole number"),
        ({"seed": 0.5}, "seed must be a whole number"),
        ({"seed": True}, "seed must be a whole number"),
        ({"seed": np.bool_(True)}, "seed must be a whole number"),
        ({"seed": np.float64(1)}, "seed must be a whole number"),
        ({"rate": True}, "rate must lie between 0 and 1, not True"),
        ({"rate": None}, "rate must lie between 0 and 1, not None"),
    ],
)
def test_values_out_of_range_are_refused_in_a_sentence(arguments, message):
    with pytest.raises(ValueError, match=message):
        MissingPattern(**arguments)


@pytest.mark.parametrize(
    ("pattern", "n", "modalities", "message"),
    [
        (MissingPattern(kind="speech"), 9, PAIR, "kind must be .* not 'speech'"),
        (MissingPattern(), 9, ("image",), "two or more"),
        (MissingPattern(), 9, ("image", "image"), "two or more different"),
        (MissingPattern(), 9, ("image", "any"), "must not be called"),
        (MissingPattern(), -1, PAIR, "n must be a whole number, 0 or larger, not -1"),
        (MissingPattern(), 9.0, PAIR, "n must be a whole number"),
        (MissingPattern(), True, PAIR, "n must be a whole number"),
        (MissingPattern(both_ratio=0.3), 9, TRIPLE, "both_ratio = 0.3 divides two"),
    ],
)
def test_tables_that_make_no_sense_are_refused_in_a_sentence(pattern, n, modalities, message):
    with pytest.raises(ValueError, match=message):
        pattern.table(n, modalities)


@pytest.mark.parametrize("seed", [np.int64(3), np.uint8(3)])
@pytest.mark.parametrize("rate", [np.float32(0.7), np.float64(0.7), 0.7])
def test_numbers_of_numpy_mean_what_those_of_python_do(tmp_path, rate, seed):
    pattern, plain = MissingPattern(rate, both_ratio=np.float32(0.3), seed=seed), MissingPattern(0.7, "both", 0.3, 3)
    assert pattern == plain
    assert torch.equal(pattern.table(np.int64(90), PAIR), plain.table(90, PAIR))
    assert pattern.hash(np.int64(90), PAIR) == plain.hash(90, PAIR)
    pattern.save(tmp_path / "table.safetensors", np.int64(90), PAIR)
    assert MissingPattern.load(tmp_path / "table.safetensors")[0] == plain


def test_the_hash_covers_everything_that_decides_the_table():
    variants = [
        MissingPattern(),
        MissingPattern(rate=0.5),
        MissingPattern(kind="text"),
        MissingPattern(both_ratio=0.4),
        MissingPattern(seed=1),
        MissingPattern(split="test"),
    ]
    hashes = {pattern.hash(90, PAIR) for pattern in variants}
    hashes |= {MissingPattern().hash(91, PAIR), MissingPattern().hash(90, ("text", "image"))}
    assert len(hashes) == len(variants) + 2
    assert MissingPattern(rate=1).hash(90, PAIR) == MissingPattern(rate=1.0).hash(90, PAIR)


def test_the_summary_counts_sets_of_modalities():
    assert MissingPattern(rate=0.6, kind="any", seed=3, split="test").summary(10, TRIPLE) == (
        "6 of 10 test samples are incomplete: 1 without image, 1 without text, 1 without audio, "
        "1 without image and text, 1 without image and audio, 1 without text and audio (kind any, seed 3)."
    )
    assert MissingPattern(rate=0).summary(10, PAIR) == "0 of 10 train samples are incomplete (kind both, seed 0)."


def test_a_saved_table_comes_back_with_its_parameters(tmp_path):
    pattern = MissingPattern(rate=0.4, kind="any", seed=5, split="test")
    pattern.save(tmp_path / "table.safetensors", 50, TRIPLE)
    loaded, table, modalities = MissingPattern.load(tmp_path / "table.safetensors")
    assert loaded == pattern
    assert modalities == TRIPLE
    assert torch.equal(table, pattern.table(50, TRIPLE))


def test_an_altered_table_is_refused(tmp_path):
    path = tmp_path / "table.safetensors"
    MissingPattern().save(path, 50, PAIR)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([1 - content[-1]]))
    with pytest.raises(ValueError, match="altered"):
        MissingPattern.load(path)
    path.write_bytes(content.replace(b'\\"seed\\": 0', b'\\"seed\\": 1'))
    with pytest.raises(ValueError, match="altered"):
        MissingPattern.load(path)


def test_a_file_that_is_no_table_is_refused(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="not a missing table"):
        MissingPattern.load(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="not a missing table"):
        MissingPattern.load(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_upstream_tables_are_imported(tmp_path, dtype):
    torch.save(torch.tensor([0, 1, 2], dtype=dtype), tmp_path / "table.pt")
    table = import_upstream_table(tmp_path / "table.pt", ("text", "audio", "image"))
    assert table.tolist() == [[True, True, True], [False, True, True], [True, True, False]]


@pytest.mark.parametrize(
    ("content", "message"),
    [(torch.tensor([0, 3]), "holds 3"), (torch.zeros(2, 2), "one number per sample"), ({"a": 1}, "does not hold"),
     (MissingPattern(), "cannot be read")],
)  # fmt: skip
def test_other_files_are_no_upstream_tables(tmp_path, content, message):
    torch.save(content, tmp_path / "table.pt")
    with pytest.raises(ValueError, match=message):
        import_upstream_table(tmp_path / "table.pt")


def test_an_upstream_table_needs_its_two_modalities(tmp_path):
    with pytest.raises(ValueError, match="image and text"):
        import_upstream_table(tmp_path / "table.pt", ("image", "audio"))
