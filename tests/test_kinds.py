"""Kinds of models in figures: what they are called, and that a kind keeps its colour."""

import pytest

from configs import ablations, enwik8, ladder
from train.analysis.kinds import COLOURS, Style, kind_of, styles

NAMES = {
    "projected": "FSN, projected form",
    "fsn": "FSN, published form",
    "transformer": "transformer",
    "shifted": "transformer with token shift",
    "base": "base layer",
    "projected_base": "base layer",
    "modes": "FSN with collective modes",
    "projected_modes": "FSN with collective modes",
}


@pytest.mark.parametrize("arm", enwik8.ARMS)
def test_every_kind_of_the_configs_has_its_name(arm):
    assert kind_of(enwik8.get_config(arm).model) == NAMES[arm.rpartition("_")[0]]


def test_a_rung_does_not_change_the_kind():
    for kind in ("fsn", "projected", "transformer"):
        assert kind_of(ladder.get_config(f"{kind}_4m").model) == NAMES[kind]


@pytest.mark.parametrize(
    "arm",
    ["no_delay", "four_harmonics", "published_linear_values", "published_no_similarity_head"],
)
def test_a_changed_form_is_not_called_by_the_name_of_the_form(arm):
    assert kind_of(ablations.get_config(arm).model) == "fsn"


def test_four_heads_do_not_change_the_kind():
    four = ablations.get_config("published_four_heads").model
    assert kind_of(four) == NAMES["fsn"]


def test_arms_of_different_kinds_have_the_colours_of_their_kinds():
    arms = [("a", "transformer with token shift"), ("b", "FSN, projected form")]
    assert styles(arms) == [Style(kind, COLOURS[kind]) for _, kind in arms]


@pytest.mark.parametrize("other", ["transformer", "fsn"])
def test_arms_of_one_kind_or_of_none_keep_their_names(other):
    arms = [("a", "transformer"), ("b", other)]
    assert styles(arms) == [Style("a", "C0"), Style("b", "C1")]


def test_colours_differ():
    assert len(set(COLOURS.values())) == len(COLOURS)
