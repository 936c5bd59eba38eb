"""Labels however they are spelled: one class per meaning, several per row, or numbers."""

import logging
import unicodedata

import datasets
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from u2a_fast.data.labels import label_feature, label_names, settle_labels, task_of

MANY = settings(max_examples=200, deadline=None, derandomize=True, database=None)


def settled(labels, **options):
    rows = [{"place": f"t.csv, row {number}", "label": label} for number, label in enumerate(labels, start=1)]
    names = settle_labels(rows, **options)
    return names, [row["label"] for row in rows]


@pytest.mark.parametrize(
    ("labels", "names", "result"),
    [
        ([0, 1, 1.0], ["0", "1"], ["0", "1", "1"]),
        ([" 1", "1"], ["1"], ["1", "1"]),
        ([True, 1, 0], ["0", "1"], ["1", "1", "0"]),
        ([True, False, "true"], ["False", "True"], ["True", "False", "True"]),
        (["true", "TRUE", "False"], ["False", "TRUE"], ["TRUE", "TRUE", "False"]),
        (["yes", " yes ", "no"], ["no", "yes"], ["yes", "yes", "no"]),
        (["007", "7", "10"], ["7", "10"], ["7", "7", "10"]),
        (["007", "010"], ["007", "010"], ["007", "010"]),
        (["1", "2", "a"], ["1", "2", "a"], ["1", "2", "a"]),
        (["-1", "+1", "1", "-0", "0"], ["-1", "0", "1"], ["-1", "1", "1", "0", "0"]),
        (["1_000", "1000"], ["1000", "1_000"], ["1_000", "1000"]),
        (["12345678901234567890", "12345678901234567891"],) * 2 + (["12345678901234567890", "12345678901234567891"],),
        (["9" * 5000, "b"], ["9" * 5000, "b"], ["9" * 5000, "b"]),
        (["Caf\u00e9", "Cafe\u0301"], ["Caf\u00e9"], ["Caf\u00e9"] * 2),
        (["red dog", "red  dog", "red\tdog", "red\u00a0dog", "red\u3000dog\n"], ["red dog"], ["red dog"] * 5),
        (["dog", "dog\u200b", "\ufeffdog", "d\u00adog", "\u200ddog", "dog\u200f"], ["dog"], ["dog"] * 6),
        (["\u0d28\u0d4d", "\u0d28\u0d4d\u200d"],) * 3,  # a joiner at the end makes another letter of Malayalam
        (["\U0001f468\u200d\U0001f467", "\U0001f468\U0001f467"],) * 1
        + (["\U0001f468\u200d\U0001f467", "\U0001f468\U0001f467"],) * 2,
        (["1", "1.0", "01", "true", "2"], ["1", "2"], ["1", "1", "1", "1", "2"]),
        (["250.0", "250.00", "V58.1"],) * 3,
        (["0e1", "0e2", "a7f"],) * 3,
        (["0", "false", "maybe"],) * 3,
        (["[0, 10]", "[10, 20]"],) * 3,
        (["[18-25]", "[26-35]"],) * 3,
        (["4.4", "5.0", "5.1", "Q"],) * 3,
        (["dog", "\u202adog\u202c", "\u2066dog\u2069", "\u061cdog", "dog\x7f", "dog\0"], ["dog"], ["dog"] * 6),
        ([1, 1.0, "other"], ["1", "other"], ["1", "1", "other"]),
    ],
)
def test_spellings_of_one_label_are_one_class(labels, names, result):
    assert settled(labels) == (names, result)


@pytest.mark.parametrize(
    ("labels", "result"),
    [([0.5, 1, 2], [0.5, 1, 2]), (["1.0", "2.0"], [1, 2]), (["1e-3", "5"], [0.001, 5]), ([1.0, 2.0], [1, 2]),
     (["1,5", "2", "0,25"], [1.5, 2, 0.25]), (["\u22121,5", "1,250"], [-1.5, 1.25]), (["\u22120.5", "-3"], [-0.5, -3]),
     ([[0.5, 1], [2, 3]], [[0.5, 1], [2, 3]])],
)  # fmt: skip
def test_real_numbers_are_a_regression(labels, result):
    assert settled(labels) == (None, result)


def test_the_task_may_be_said():
    assert settled([1.0, 2.0], task="classification") == (["1.0", "2.0"], ["1.0", "2.0"])
    assert settled(["1,5", "2,5"], task="classification")[0] == ["1,5", "2,5"]
    assert settled(["1,5", "b"])[0] == ["1,5", "b"]
    assert settled(["1,2", "3", "2,3"], task="regression") == (None, [1.2, 3, 2.3])
    assert settled(["1,2", "3", "2,3"], separator=",")[0] == ["1", "2", "3"]
    assert settled(["0.5", "1.5", "NA"], task="classification")[0] == ["0.5", "1.5", "NA"]
    assert settled(["1.0", "2.0", "a"])[0] == ["1.0", "2.0", "a"] and settled(["1", "2", "NA"])[0] == ["1", "2", "NA"]
    assert settled([0.5, 2], task="classification")[0] == ["0.5", "2"]
    assert settled(["3", 4], task="regression") == (None, [3, 4])
    assert settled(["a", "b"], task="multi_label") == (["a", "b"], [[1, 0], [0, 1]])
    assert settled([[0, 1]], task="regression") == (None, [[0, 1]])


def test_lists_and_separated_names_are_several_classes():
    expected = ["action", "drama"], [[1, 1], [0, 1], [0, 0]]
    assert settled([["drama", " action"], ["drama"], []]) == expected
    assert settled(["action|drama", " drama |", []], separator="|") == expected
    assert settled([["drama", "action"], "drama", []]) == expected
    assert settled([[0, 1], [1, 1]]) == (["0", "1"], [[0, 1], [1, 1]])


def test_spellings_of_one_label_are_one_class_in_sets_too():
    assert settled(["1|2", "1.0", "01|3", "True|true"], separator="|") == (
        ["1", "2", "3"], [[1, 1, 0], [1, 0, 0], [1, 0, 1], [1, 0, 0]]
    )  # fmt: skip
    assert settled([["250.0", "250.00"], ["V58.1"]])[0] == ["250.0", "250.00", "V58.1"]
    assert settled([["a"], ["red\u00a0 dog\u200b", "red dog"]])[0] == ["a", "red dog"]
    assert settled(["a|\u200b|b"], separator="|")[0] == ["a", "b"]


@pytest.mark.parametrize(
    ("labels", "lists"),
    [
        (["['red', 'blue']", "['blue']", "[]"], [["red", "blue"], ["blue"], []]),
        (['["red", "blue"]', '["blue"]'], [["red", "blue"], ["blue"]]),
        (["['red','blue']", str(["it's", 'a "b"'])], [["red", "blue"], ["it's", 'a "b"']]),
        (["[0, 1]", " [1, 0] "], [[0, 1], [1, 0]]),
        (["['red']", "blue"], [["red"], "blue"]),
        (["('red', 'blue')", "('blue',)", "()", "{'red'}", "set()"], [["red", "blue"], ["blue"], [], ["red"], []]),
    ],
)
def test_a_list_may_be_written_as_text(labels, lists):
    assert settled(labels) == settled(lists)
    assert settled(labels, task="classification")[1] == [label.strip() for label in labels]


def test_brackets_around_a_name_are_letters():
    assert settled(["[NSFW]", "[cat]"])[1] == ["[NSFW]", "[cat]"]
    assert settled(["('Heroes')", "{'x': 1}"])[1] == ["('Heroes')", "{'x': 1}"]
    assert settled(["[1]|[2]", "[1]"], separator="|")[0] == ["[1]", "[2]"]


@pytest.mark.parametrize(
    "labels",
    [
        ["1,5", "2", "0,25"],
        ["1,5", "2,1"],
        ["3,0", "1,5"],
        ["\u22121,5", "1,6"],
        ["1,05", "2"],
        ["1,5", "2,5", "3"],
        ["0,5", "1,5", "2"],
        ["1", "1,5", "2", "2,5", "3", "3,5", "4", "4,5", "5"],
        ["3,5", "4,5", "5", "4", "3"],
    ],
)
def test_commas_that_are_no_list_of_rising_numbers_are_decimal(labels):
    assert settled(labels) == (None, [float(label.replace(",", ".").replace("\u2212", "-")) for label in labels])


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (["a", None], {}, r"t\.csv, row 2 has no label"),
        ([{"a": 1}], {}, r"row 1 has a dict as its label: write a name"),
        ([b"a"], {}, r"row 1 has a bytes as its label"),
        ([[1, 2], [1]], {}, r"differ in length \(2 numbers at t\.csv, row 1, 1 at t\.csv, row 2\)"),
        ([[1, 2], ["a"]], {}, r"row 2 has no list of numbers"),
        ([[1, None]], {}, r"row 1 has no label"),
        ([0.5, float("inf")], {}, r"1 of the numeric labels are inf \(t\.csv, row 2\)"),
        ([[float("inf")]], {}, r"row 1 has the label inf"),
        (["3", "many"], {"task": "regression"}, r"row 2 has the label 'many', which is no number"),
        (
            [["a"], ["b", "c"]],
            {"task": "classification"},
            r"row 1 has several labels, which a classification cannot have",
        ),
        (["1,234", "12"], {}, r"row 1 has the label '1,234', which may be 1\.234 or 1234: write numbers with a point"),
        ([[0.5]], {"task": "multi_label"}, "row 1 has a vector as its label, which is no multi_label"),
        (["\ud800"], {}, r"row 1 has the label '\\ud800', half of a surrogate pair"),
        ([[], []], {"task": "multi_label"}, "no row has any label"),
        (["\u200b", "a"], {}, "row 1 has no label"),
        (
            ["['a' 'b']", "['c']"],
            {},
            r"row 1 has the label .*, which is no list as Python or JSON writes it: write names",
        ),
        (
            ["3", "1,2", "2,3"],
            {},
            r"row 2 has the label '1,2', which may be one number or 2 labels of the row: pass --lab",
        ),
        (["1, 2, 12", "3"], {}, r"row 1 has the label '1, 2, 12', which may be one number or 3 labels"),
        ([0.5, 0.0, 1.0, "NA"], {}, r"row 4 has the label 'NA', but most labels are numbers: write it as one, such as"),
        (["1e3", "2.5", "n/a"], {}, r"row 3 has the label 'n/a', but most labels are numbers"),
        (["0.5", "n/a", "1,5", "2"], {}, r"row 2 has the label 'n/a', but most labels are numbers"),
        (["1,200,000", "950", "2,500"], {}, r"row 1 has the label '1,200,000', but most labels are numbers"),
        (["950.25", "1,200.50", "2,500"], {}, r"row 2 has the label '1,200\.50', but most"),
        (["1,5", "2,5", "1.200,50"], {}, r"row 3 has the label '1\.200,50', but most"),
        (["950,5", "1.234", "12,25"], {}, r"row 2 has the label '1\.234', which may be 1\.234 or 1234: write numbers"),
        (["950.25", "1 200.50", "2\u00a0500"], {}, r"row 2 has the label '1 200\.50', but most"),
        (["0.5", "1.5"] * 5 + ["#N/A"], {}, r"row 11 has the label '#N/A', but most labels are numbers"),
        (["0.5", "1.5"] * 5 + ["12 kg"], {}, r"row 11 has the label '12 kg', but most labels are numbers"),
        (["$1.50", "$2.50"], {}, r"row 1 has the label '\$1\.50', but most labels are numbers"),
        (["12,5 %", "2 \u20ac"], {}, r"row 1 has the label '12,5 %', but most"),
        (["1.5", "(1.5)", "5.3-"], {}, r"row 2 has the label '\(1\.5\)', but most"),
        (["1,20,000.5"], {}, r"row 1 has the label '1,20,000\.5', but most"),
        (["850", "1.200", "12.500"], {}, r"row 2 has the label '1\.200', which may be 1\.200 or 1200: write numbers"),
        (["850", "1.200", "12.500"], {"task": "regression"}, r"row 2 has the label '1\.200', which may be"),
        (["a"], {"task": "ranking"}, "task must be one of classification, multi_label, regression"),
    ],
)
def test_what_does_not_fit_is_named_with_its_row(labels, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        settled(labels, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("labels", [["850", "1.200", "12.50"], ["1500", "1.200", "2.400"], [850, 1.125, 12.375]])
def test_points_are_decimal_where_they_cannot_part_thousands(labels):
    assert settled(labels) == (None, [float(label) for label in labels])


def test_several_names_beside_numbers_are_classes():
    assert settled(["0.5", "1.5"] * 4 + ["low"])[0] == ["0.5", "1.5", "low"]


def test_numbers_that_fp32_cannot_tell_apart_are_refused():
    with pytest.raises(ValueError, match=r"differ too little for their size, 1600000000\.5 \(t\.csv, row 1\) for one"):
        settled([1600000000.5, 1600000010.5, 1600000100.5])
    assert settled([1.6e9 + 0.5, 1.7e9])[0] is None and settled([2.5, 2.5])[0] is None
    assert settled([1600000000.5, 1600000010.5], task="classification")[0] == ["1600000000.5", "1600000010.5"]


def test_names_that_differ_in_case_are_kept_apart_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        assert settled(["Dog", "dog"])[0] == ["Dog", "dog"]
    assert "differ in case alone and are two classes" in caplog.text


CELLS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.binary(max_size=3)
    | st.sampled_from(["1", " 1", "1.0", "01", "true", "True", "nan", "-0", "1e5", "a|b", "\ud800", "\u2028"]),
    lambda inner: st.lists(inner, max_size=3), max_leaves=4,
)  # fmt: skip


@pytest.mark.slow
@MANY
@given(st.lists(CELLS, min_size=1, max_size=6), st.sampled_from([None, "classification", "multi_label", "regression"]),
       st.sampled_from([None, "|"]))  # fmt: skip
@example([False, "NAN"], "classification", None)
def test_any_labels_are_settled_or_refused_in_a_sentence(labels, task, separator):
    try:
        names, result = settled(labels, task=task, separator=separator)
    except ValueError as error:
        assert str(error) and "\n" not in str(error).replace(repr(labels), "")
        return
    assert names is None or (len(set(names)) == len(names) and all(isinstance(name, str) for name in names))
    if names is None:
        assert all(isinstance(value, float | list) for value in result)
    elif isinstance(result[0], list):
        assert all(len(value) == len(names) and set(value) <= {0.0, 1.0} for value in result)
    else:
        assert set(result) == set(names)


SPELL = [lambda name: name, lambda name: f" {name}\t", lambda name: unicodedata.normalize("NFD", name)]


@pytest.mark.slow
@MANY
@given(st.lists(st.tuples(st.sampled_from(["a", "é", "Ångström", "b c", "犬"]), st.sampled_from(SPELL)), min_size=1))
def test_a_name_means_the_same_however_it_is_spelled(drawn):
    _, result = settled([spell(name) for name, spell in drawn])
    assert result == [name for name, _ in drawn]


@pytest.mark.slow
@MANY
@given(
    st.lists(
        st.tuples(st.integers(-3, 30), st.sampled_from([int, float, str, "{}.0".format, " {}".format])), min_size=2
    )
)
def test_a_whole_number_means_the_same_however_it_is_written(drawn):
    drawn.append((7, int))
    names, result = settled([write(number) for number, write in drawn])
    assert [float(label) for label in result] == [number for number, _ in drawn]
    assert [float(name) for name in names] == sorted({number for number, _ in drawn})


def test_features_carry_names_and_task_through_selecting_and_saving(tmp_path):
    cases = {"classification": (["a", "b"], False), "multi_label": (["a", "b"], True), "regression": (None, False)}
    for task, (names, vectors) in cases.items():
        value = [1.0, 0.0] if vectors else 1
        features = datasets.Features({"label": label_feature(names, vectors)})
        data = datasets.Dataset.from_dict({"label": [value] * 4}, features=features)
        data = datasets.concatenate_datasets([data.select([0, 1]), data.select([2])])
        data.save_to_disk(tmp_path / task)
        feature = datasets.load_from_disk(tmp_path / task).features["label"]
        assert (task_of(feature), label_names(feature)) == (task, names)
    assert task_of(label_feature(None, True)) == "regression" and task_of(None) is None


def test_marks_may_be_written_as_real_numbers():
    assert settled(["[1.0, 0.0]", "[0.0, 1.]"]) == settled(["[1, 0]", "[0, 1]"])
