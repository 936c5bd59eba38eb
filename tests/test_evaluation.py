"""The scenario table equals separate passes with each mask, and its scores equal scikit-learn's."""

import csv
import math

import datasets
import pandas as pd
import pytest
import tiny_data
import torch
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    f1_score,
    mean_absolute_error,
    r2_score,
    roc_auc_score,
)

from u2a_fast import U2A, LateFusion, MissingPattern, MultimodalCollator, evaluate
from u2a_fast.data.labels import label_feature
from u2a_fast.evaluation import class_order, default_scenarios, scenario_logits, scenario_mask
from u2a_fast.prediction import predict_answers
from u2a_fast.reports import print_report, with_baseline

NAMES = ("text", "image")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tiny_data.encoder_folders(tmp_path_factory.mktemp("encoders"))


@pytest.fixture(scope="module", params=[U2A, LateFusion])
def model(request, folders):
    torch.manual_seed(0)
    model = request.param(folders, num_labels=4, processors=tiny_data.processors())  # class 3 never occurs
    with torch.no_grad():
        model.head.weight.normal_(std=2.0)
    return model


def rows_with_holes(count=30):
    rows = tiny_data.samples(count)
    for i, row in enumerate(rows):
        row.update({"text": None} if i % 6 == 1 else {"image": None} if i % 6 == 4 else {})
    return rows


def test_logits_of_nothing_make_no_report_and_no_answer(folders):
    broken = LateFusion(folders, num_labels=3, processors=tiny_data.processors())
    torch.nn.init.constant_(broken.head.bias, float("nan"))
    with pytest.raises(ValueError, match="the logits of 'full' hold values that are not finite: take"):
        evaluate(broken, tiny_data.samples(4), ["full"])
    with pytest.raises(ValueError, match="the logits hold values that are not finite"):
        predict_answers(broken, [{"text": "red"}])


@pytest.mark.slow
def test_every_scenario_equals_a_pass_of_its_own(model):
    rows = rows_with_holes()
    report = {row["scenario"]: row for row in evaluate(model, rows, batch_size=8)}
    assert list(report) == default_scenarios(NAMES)
    natural = torch.tensor([[row[name] is not None for name in NAMES] for row in rows])
    labels = torch.tensor([row["label"] for row in rows])
    batch = MultimodalCollator(tiny_data.processors())(rows)
    batch.pop("labels"), batch.pop("modality_mask")
    model.eval()
    for scenario, row in report.items():
        mask = scenario_mask(scenario, natural, NAMES)
        counted = mask.any(dim=1)
        kept = {name: {k: v[counted] for k, v in values.items()} for name, values in batch.items()}
        predicted = model(**kept, modality_mask=mask[counted]).logits.argmax(dim=1)
        assert row["n"] == int(counted.sum())
        assert row["accuracy"] == pytest.approx(accuracy_score(labels[counted], predicted))
        assert row["macro_f1"] == pytest.approx(f1_score(labels[counted], predicted, average="macro"))


@pytest.mark.slow
def test_report_files(model, tmp_path):
    report = evaluate(model, tiny_data.samples(6), output_dir=tmp_path)
    with open(tmp_path / "report.csv", encoding="utf-8") as file:
        written = list(csv.DictReader(file))
    assert list(written[0]) == ["scenario", "accuracy", "macro_f1", "n"]
    assert [row["scenario"] for row in written] == [row["scenario"] for row in report]
    assert [float(row["accuracy"]) for row in written] == pytest.approx([r["accuracy"] for r in report], abs=1e-4)
    for name in ("report.png", "confusion.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_each_encoder_runs_once_a_sample(model, monkeypatch):
    seen = dict.fromkeys(NAMES, 0)
    for name, encoder in model.encoders.items():
        embed = encoder.embed

        def counting(name=name, embed=embed, **inputs):
            seen[name] += next(iter(inputs.values())).shape[0]
            return embed(**inputs)

        monkeypatch.setattr(encoder, "embed", counting)
    evaluate(model, rows_with_holes(), batch_size=7)
    assert seen == {"text": 25, "image": 25}


def test_masks_never_add_what_is_not_there():
    natural = torch.tensor([[True, True], [True, False], [False, True]] * 20)
    for scenario in default_scenarios(NAMES):
        mask = scenario_mask(scenario, natural, NAMES)
        assert not (mask & ~natural).any()
        if scenario.startswith("rate"):
            drawn = MissingPattern(float(scenario[5:]), "both", split="test").table(60, NAMES)
            assert mask.any(dim=1).all() and torch.equal(mask[::3], drawn[::3])


def test_a_scenario_is_reported_once_however_it_is_named(model):
    rows, once = tiny_data.samples(6), ["rate 0.5"]
    (expected,) = evaluate(model, rows, once)
    assert evaluate(model, rows, 2 * once) == evaluate(model, rows, *once) == [expected]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scenarios": []}, "needs scenarios"),
        ({"output_dir": "file"}, "file is"),
        ({"output_dir": "file/in"}, "file/in"),
    ],
)
def test_what_cannot_be_written_is_refused_before_anything_runs(options, words, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(model, "encode", None)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=words):
        evaluate(model, tiny_data.samples(3), **options)


def test_what_is_refused_leaves_no_folder(model, tmp_path):
    with pytest.raises(ValueError, match="this data set is empty"):
        evaluate(model, [], output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_scored_is_refused(model):
    for unknown in ("no image", "rate high", "rate nan"):
        with pytest.raises(ValueError, match=f"unknown scenario '{unknown}'"):
            evaluate(model, tiny_data.samples(3), scenarios=[unknown])
    for call in (evaluate, type(model).predict):
        with pytest.raises(ValueError, match="a batch needs at least 1 sample, not 0: choose another batch_size"):
            call(model, tiny_data.samples(3), batch_size=0)


def test_multilabel_scores(folders):
    model = U2A(folders, num_labels=3, processors=tiny_data.processors())
    rows = [{**row, "label": [float(row["label"] == i) for i in range(3)]} for row in tiny_data.samples(6)]
    (row,) = evaluate(model, rows, scenarios=["full"])
    logits, labels = model.predict(rows), torch.tensor([r["label"] for r in rows])
    predicted = logits > 0
    assert row["macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro", zero_division=0))
    assert row["accuracy"] == pytest.approx((predicted == labels.bool()).float().mean().item())
    assert row["micro_f1"] == pytest.approx(f1_score(labels, predicted, average="micro"))
    assert row["map"] == pytest.approx(average_precision_score(labels, logits.sigmoid(), average="macro"))
    assert row["majority"] == pytest.approx(f1_score(labels, torch.ones(6, 3), average="macro"))


def test_numbers_are_not_scored_against_places_among_classes(folders):
    model = U2A(folders, num_labels=1, problem_type="regression", processors=tiny_data.processors())
    rows = datasets.Dataset.from_dict({"text": ["red", "blue"], "label": [0, 1]})
    rows = rows.cast_column("label", datasets.ClassLabel(names=["7", "14"]))
    with pytest.raises(ValueError, match=r'these labels are classes \(7, 14, ..\), .* task="regression"'):
        evaluate(model, rows, scenarios=["full"])


@pytest.mark.slow
@pytest.mark.parametrize("outputs", [1, 2])
def test_regression_scores(folders, outputs, tmp_path):
    model = U2A(folders, num_labels=outputs, problem_type="regression", processors=tiny_data.processors())
    generator = torch.Generator().manual_seed(0)
    labels = torch.randn(9, outputs, generator=generator)
    rows = [{**row, "label": label.tolist() if outputs > 1 else label.item()}
            for row, label in zip(tiny_data.samples(9), labels, strict=True)]  # fmt: skip
    (row,) = evaluate(model, rows, scenarios=["full"], output_dir=tmp_path)
    predicted = model.predict(rows)
    assert row["mae"] == pytest.approx(mean_absolute_error(labels, predicted), rel=1e-5)
    assert row["rmse"] == pytest.approx(((labels - predicted) ** 2).mean().sqrt().item(), rel=1e-5)
    assert row["r2"] == pytest.approx(r2_score(labels.numpy(), predicted.numpy()), rel=1e-4) and row["majority"] == 0
    header = (tmp_path / "report.csv").read_text(encoding="utf-8").splitlines()[0]
    assert header == "scenario,mae,rmse,r2,n" and not (tmp_path / "confusion.png").exists()


def test_two_classes_have_an_auroc(folders):
    model = U2A(folders, num_labels=2, processors=tiny_data.processors())
    rows = [{**row, "label": row["label"] % 2} for row in tiny_data.samples(9)]
    (row,) = evaluate(model, rows, scenarios=["full"])
    chances = model.predict(rows).softmax(dim=1)[:, 1]
    assert row["auroc"] == pytest.approx(roc_auc_score([r["label"] for r in rows], chances))
    (row,) = evaluate(model, [row for row in rows if row["label"] == 0], scenarios=["full"])
    assert math.isnan(row["auroc"]) and row["majority"] == 1


@pytest.mark.slow
def test_a_stream_is_scored_as_its_rows_are(model):
    rows = rows_with_holes()
    stream = datasets.IterableDataset.from_generator(lambda: iter(rows))
    expected, found = evaluate(model, rows, batch_size=7), evaluate(model, stream, batch_size=7)
    assert found[:3] == expected[:3]
    assert [row["n"] for row in found] == [row["n"] for row in expected]
    drawn = scenario_logits(model, iter(rows), ["rate 1.0"], 7, 0)[0]["rate 1.0"]
    assert not torch.equal(drawn, scenario_logits(model, rows, ["full"], 7, 0)[0]["full"])


def test_what_is_cut_or_broken_is_reported_at_the_end(model, caplog):
    rows = [{**row, "text": "red " * 40 if i < 2 else row["text"]} for i, row in enumerate(tiny_data.samples(6))]
    rows[3]["image"] = b"no picture"
    evaluate(model, rows, scenarios=["full"])
    assert "1 of 6 image cells cannot be decoded and count as absent" in caplog.messages
    assert "2 of 6 text cells are cut to 16 tokens (the longest has 40 tokens)" in caplog.messages


def test_several_labels_are_read_by_name(folders):
    model = U2A(folders, num_labels=3, problem_type="multi_label_classification", processors=tiny_data.processors())
    model.config.id2label = {0: "a", 1: "b", 2: "c"}
    features = datasets.Features({"text": datasets.Value("string"), "label": label_feature(["c", "a"], True)})
    data = datasets.Dataset.from_list([{"text": "red", "label": [1.0, 0.0]}], features=features)
    assert scenario_logits(model, data, ["full"], 2, 0)[2].tolist() == [[0, 0, 1]]


def test_the_table_of_a_report_shows_what_to_compare_with(capsys):
    scenarios = ("full", "image missing", "text missing", "rate 0.7")
    own = [{"scenario": name, "accuracy": 0.8, "macro_f1": 0.7, "n": 9, "majority": 0.4} for name in scenarios]
    single = [
        {**own[0], "scenario": name, "accuracy": score} for name, score in (("text only", 0.6), ("image only", 0.5))
    ]
    rows = own + with_baseline(own, "late fusion") + with_baseline(single, "unimodal")
    print_report(rows, title="u2a on [bold]a[/b].csv")
    out = capsys.readouterr().out
    assert "u2a on [bold]a[/b].csv" in out and "late fusion" in out and out.count("0.400") == 4
    found = {line.split("│")[1].strip(): line.split("│")[-2].strip() for line in out.splitlines() if "0.400" in line}
    assert list(found.values()) == ["0.600", "0.600", "0.500", "0.600"]


def test_a_map_style_dataset_of_any_kind_is_read_by_its_length(model):
    class Cycle(torch.utils.data.Dataset):
        """`__getitem__` never says IndexError."""

        rows = tiny_data.samples(3)

        def __len__(self):
            return 5

        def __getitem__(self, i):
            return self.rows[i % 3]

    (row,) = evaluate(model, Cycle(), scenarios=["full"])
    assert row["n"] == 5


def test_a_column_that_is_not_there_is_an_absent_modality(model):
    words = [{"text": row["text"], "label": row["label"]} for row in tiny_data.samples(6)]
    with_column = [{**row, "image": None} for row in words]
    scenarios = ["full", "image missing", "rate 0.9"]
    expected = evaluate(model, with_column, scenarios)
    assert (
        evaluate(model, datasets.Dataset.from_list(words), scenarios) == evaluate(model, words, scenarios) == expected
    )
    assert [row["n"] for row in evaluate(model, words, ["text missing"])] == [0]


def test_what_cannot_be_decoded_counts_as_absent_in_every_scenario(model):
    words = [{**row, "image": None} for row in tiny_data.samples(12)]
    broken = [{**row, "image": b"no picture"} for row in words]
    scenarios = ["full", "rate 0.9"]
    (expected, present, _), (logits, found, _) = (scenario_logits(model, d, scenarios, 5, 0) for d in (words, broken))
    assert torch.equal(present, found) and not found[:, 1].any()
    for name in scenarios:
        assert torch.equal(logits[name], expected[name]) and torch.equal(logits[name], logits["full"])


def test_labels_that_do_not_fit_are_named(model):
    rows = tiny_data.samples(3)
    for label in (7, -1):
        with pytest.raises(ValueError, match=f"rows 3 to 4: label {label} is out of range"):
            evaluate(model, [*rows, {**rows[0], "label": label}], batch_size=2)
    with pytest.raises(TypeError, match=r"rows 3 to 4: the column text holds the float 1\.5; a text must"):
        evaluate(model, [*rows, {"text": 1.5, "label": 0}], batch_size=2)
    with pytest.raises(ValueError, match="this data set is empty"):
        evaluate(model, [])
    with pytest.raises(ValueError, match="needs a label in every sample"):
        evaluate(model, [{"text": "red"}])
    (row,) = evaluate(model, [*rows, {**rows[0], "label": -100}], scenarios=["full"])
    assert row["n"] == 3


def test_class_names_decide_where_both_sides_have_them(folders):
    model = U2A(folders, num_labels=3, processors=tiny_data.processors())
    names = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["red", "green"])})
    data = datasets.Dataset.from_list([{"text": "red", "label": 0}, {"text": "green", "label": 1}], features=names)
    assert scenario_logits(model, data, ["full"], 2, 0)[2].tolist() == [0, 1]  # LABEL_0, .. are no names
    model.config.id2label = {0: "blue", 1: "green", 2: "red"}
    assert scenario_logits(model, data, ["full"], 2, 0)[2].tolist() == [2, 1]
    model.config.id2label = {0: "blue", 1: "green", 2: "yellow"}
    with pytest.raises(ValueError, match="no class 'red': its classes are blue, green, yellow"):
        evaluate(model, data)


@pytest.mark.parametrize(
    ("known", "given"),
    [(["1", "2", "3"], ["1.0", "2.0", "3.0"]), (["1", "2", "10"], ["01", "+2", "1e1"]), (["no", "1", "x"], ["no", "x"]),
     (["false", "true"], ["False", "True"]), (["0", "1"], ["FALSE", "true"]), (["nan", "1"], ["nan", "1.0"])],
)  # fmt: skip
def test_class_names_mean_the_same_however_they_are_spelled(folders, known, given):
    model = U2A(folders, num_labels=len(known), processors=tiny_data.processors())
    model.config.id2label = dict(enumerate(known))
    data = datasets.Dataset.from_dict({"label": []}, datasets.Features({"label": datasets.ClassLabel(names=given)}))
    expected = [known.index(name) if name in known else given.index(name) for name in given]
    assert class_order(data, model).tolist() == expected


def test_a_spelling_of_its_own_comes_first(folders):
    model = U2A(folders, num_labels=3, processors=tiny_data.processors())
    model.config.id2label = {0: "1", 1: "1.0", 2: "True"}
    names = datasets.ClassLabel(names=["True", "1.0", "1"])
    data = datasets.Dataset.from_dict({"label": []}, datasets.Features({"label": names}))
    assert class_order(data, model).tolist() == [2, 1, 0]


def test_names_in_any_samples_are_scored_by_name(folders, caplog):
    model = U2A(folders, num_labels=3, processors=tiny_data.processors())
    model.config.id2label = {0: "1", 1: "2", 2: "10"}
    rows = [{"text": "red", "label": label} for label in ("10", "2.0", "01")]
    assert scenario_logits(model, rows, ["full"], 2, 0)[2].tolist() == [2, 1, 0]
    assert scenario_logits(model, pd.DataFrame(rows), ["full"], 2, 0)[2].tolist() == [2, 1, 0]
    assert "taken for places" not in caplog.text
    with pytest.raises(ValueError, match="no class '3': its classes are 1, 2, 10"):
        evaluate(model, [{"text": "red", "label": "3"}])
    assert scenario_logits(model, [{"text": "red", "label": 1}], ["full"], 2, 0)[2].tolist() == [1]
    assert "labels that are numbers are taken for places among the classes, 0 for '1'" in caplog.text


def test_several_names_of_a_sample_are_scored_by_name(folders):
    model = U2A(folders, num_labels=3, processors=tiny_data.processors(), problem_type="multi_label_classification")
    model.config.id2label = {0: "a", 1: "b", 2: "c"}
    labels = [["c", "a"], [0.0, 1.0, 0.0], []]
    rows = [{"text": "red", "label": label} for label in labels]
    assert scenario_logits(model, rows, ["full"], 2, 0)[2].tolist() == [[1, 0, 1], [0, 1, 0], [0, 0, 0]]


def test_numbers_of_a_regression_may_be_whole_and_any(folders):
    model = U2A(folders, num_labels=1, problem_type="regression", processors=tiny_data.processors())
    (row,) = evaluate(model, [{"text": "red", "label": label} for label in (-100, 0, 7)], scenarios=["full"])
    assert row["n"] == 3


def test_rows_with_nothing_in_them_are_told(model, caplog):
    rows = evaluate(model, [*tiny_data.samples(6), {"text": " ", "label": 0}], ["full"])
    assert rows[0]["n"] == 6
    assert "1 of 7 rows have nothing that can be read and do not count (rows 7)" in caplog.messages
