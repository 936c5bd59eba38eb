"""An option is kept in one place, and each method says which options of the recipe are its own."""

import pytest
import tiny_encoders

from u2a_fast import PMF, U2A, JointEmbedding, LateFusion, LoraConfig, load_model
from u2a_fast.methods import METHODS, MultimodalModel
from u2a_fast.training import TrainOptions, adaptation

SMOOTH, PRIOR = {"label_smoothing": 0.3}, {"all_absent": "prior"}
CHANGES = {
    U2A: {**SMOOTH, **PRIOR, "modality_dropout": 0.6, "align_weight": 0.7, "absent": "where"},
    PMF: SMOOTH,
    JointEmbedding: {**SMOOTH, "vicreg_weight": 0.9},
    LateFusion: {**SMOOTH, **PRIOR},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folders = {}
    for name, family in {"image": "vit", "text": "bert"}.items():
        folders[name] = str(tmp_path_factory.mktemp(name))
        tiny_encoders.build(family).save_pretrained(folders[name])
    return folders


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS.values())
def test_what_is_set_later_is_saved_and_loaded(method, folders, tmp_path):
    model = method(folders, num_labels=3)
    for name, value in CHANGES[method].items():
        assert getattr(model, name) != value
        setattr(model, name, value)
    model.save_pretrained(tmp_path)
    again = load_model(tmp_path)
    assert {name: getattr(again, name) for name in CHANGES[method]} == CHANGES[method]
    assert again.auxiliary_weight == model.auxiliary_weight


@pytest.mark.parametrize("method", METHODS.values())
def test_a_value_that_is_refused_changes_nothing(method, folders):
    model = method(folders, num_labels=3)
    with pytest.raises(ValueError, match=r"label_smoothing must be at least 0 and below 1, not 1\.5"):
        model.label_smoothing = 1.5
    with pytest.raises(ValueError, match=r'all_absent must be .*"error"'):
        model.all_absent = "skip"
    assert (model.label_smoothing, model.all_absent) == (0.0, "error")


def test_every_method_of_the_table_has_a_recipe_that_fits():
    of_u2a = {"modality_dropout": 0.4, "translators": True, "separate_heads": False}
    options = TrainOptions(lora_r=3, lora_alpha=6, tuning="lora", feature_cache="here", **of_u2a)
    lora = LoraConfig(r=3, lora_alpha=6)
    assert {name: adaptation(method, options) for name, method in METHODS.items()} == {
        "u2a": {"lora": lora, "modality_dropout": 0.4, "translate_all": True, "separate_heads": False},
        "pmf": {"feature_cache": "here"},
        "joint_embedding": {"tuning": lora},
        "late_fusion": {"lora": lora},
    }


def test_a_constructor_of_other_arguments_gets_its_options_or_an_error():
    class Open(U2A):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)

    class Renamed(LateFusion):
        def __init__(self, encoders, num_labels, adapter=None):
            super().__init__(encoders, num_labels, lora=adapter)

    class WithRecipe(Renamed):
        @classmethod
        def recipe(cls, options):
            return {"adapter": options.lora}

    options = TrainOptions(lora_r=3)
    assert adaptation(Open, options) == adaptation(U2A, options)
    assert adaptation(WithRecipe, options) == {"adapter": options.lora}
    with pytest.raises(TypeError, match="Renamed takes no 'lora', which its recipe names"):
        adaptation(Renamed, options)
    with pytest.raises(NotImplementedError, match="MultimodalModel does not say which options"):
        adaptation(MultimodalModel, options)
