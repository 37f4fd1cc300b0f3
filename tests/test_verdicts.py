"""Comparisons of recorded runs: what is decided, what is not, and what cannot be compared."""

import math

import pytest
from small_runs import write_record

from train.analysis import verdicts
from train.analysis.copy_depth import BUCKETS, DISTANCES, EVENTS
from train.analysis.records import Arm, read_arms
from train.analysis.verdicts import NotComparableError, NotRunError


@pytest.fixture
def arms_of(tmp_path):
    """Arms from the curves of their seeds, in the order given."""

    def make(**curves):
        folders = [
            write_record(tmp_path, arm, seed=seed, curve=curve)
            for arm, seeds in curves.items()
            for seed, curve in enumerate(seeds)
        ]
        return list(read_arms(folders).values())

    return make


LOW, HIGH = ((3.0, 1.99), (3.1, 2.01)), ((3.2, 2.49), (3.3, 2.51))


def test_a_clear_difference_is_decided_either_way(arms_of):
    low, high = arms_of(low=LOW, high=HIGH)
    found = verdicts.below([low, high])
    assert (found.direction, found.reason) == ("holds", "")
    # 2.00 and 2.50, each with a deviation of 0.01414 over two seeds: a standard error of 0.01414.
    assert "low 2.0000 ± 0.0141 (n = 2)" in found.measured
    assert "-0.5000 ± 0.0141 (s.e.)" in found.measured
    assert verdicts.below([high, low]).direction == "fails"


def test_one_seed_decides_nothing(arms_of):
    low, high = arms_of(low=LOW[:1], high=HIGH)
    found = verdicts.below([low, high])
    assert (found.direction, found.reason) == ("undecided", "one seed")


def test_nor_does_a_difference_within_the_noise(arms_of):
    one, other = arms_of(one=((3, 2.0), (3, 2.2)), other=((3, 2.1), (3, 2.3)))
    found = verdicts.below([one, other])
    assert (found.direction, found.reason) == ("undecided", "within 2 standard errors")


def test_below_throughout_needs_every_evaluation(arms_of):
    low, high = arms_of(low=LOW, high=HIGH)
    assert verdicts.below_throughout([low, high]).direction == "holds"
    assert "at 2 of 2 evaluations" in verdicts.below_throughout([low, high]).measured


def test_below_at_the_end_alone_is_not_throughout(arms_of):
    late, early = arms_of(
        late=((4.0, 3.5, 1.99), (4.1, 3.6, 2.01)), early=((3.2, 3.0, 2.49), (3.3, 3.1, 2.51))
    )
    found = verdicts.below_throughout([late, early])
    assert found.direction == "fails" and "at 1 of 3 evaluations" in found.measured
    assert verdicts.below([late, early]).direction == "holds"


def test_above_once_in_the_middle_is_not_yet_against_it(arms_of):
    once, other = arms_of(
        once=((3.0, 2.6, 1.99), (3.1, 2.62, 2.01)), other=((3.2, 2.5, 2.49), (3.3, 2.5, 2.51))
    )
    assert verdicts.below_throughout([once, other]).direction == "undecided"
    twice, other = arms_of(
        twice=((3.4, 2.6, 1.99), (3.5, 2.62, 2.01)), another=((3.2, 2.5, 2.49), (3.3, 2.5, 2.51))
    )
    assert verdicts.below_throughout([twice, other]).direction == "fails"


def test_above_within_the_noise_is_undecided(arms_of):
    wide, other = arms_of(wide=((3.0, 1.9), (3.6, 2.1)), other=((3.2, 2.49), (3.3, 2.51)))
    found = verdicts.below_throughout([wide, other])
    assert found.direction == "undecided" and "at 1 of 2" in found.measured
    assert found.reason == "above at some, within the noise"


def test_every_seed_is_compared_with_the_mean(arms_of):
    mixed, mean = arms_of(mixed=((3, 1.9), (3, 2.6)), mean=HIGH)
    assert verdicts.every_seed_below([mixed, mean]).direction == "fails"
    assert "1 of 2 seeds" in verdicts.every_seed_below([mixed, mean]).measured


def test_tracking_is_within_a_bound_to_either_side(arms_of):
    one, other = arms_of(one=LOW, other=((3, 2.03), (3, 2.05)))
    # 2.00 and 2.04, each with a standard error of 0.01: 0.04 apart, give or take 0.028.
    for pair in ([one, other], [other, one]):
        assert verdicts.tracks(pair, within=0.07).direction == "holds"
        assert verdicts.tracks(pair, within=0.05).direction == "undecided"
        assert verdicts.tracks(pair, within=0.03).direction == "undecided"
        assert verdicts.tracks(pair, within=0.01).direction == "fails"


@pytest.mark.parametrize(
    ("start", "end", "direction"),
    [((2.5, 2.52), (2.09, 2.11), "holds"), ((3.1, 3.12), (2.09, 2.11), "fails"),
     ((2.9, 3.0), (2.09, 2.11), "undecided"), ((2.5, 2.52), (2.0, 2.2), "undecided"),
     ((2.5, 2.52), (1.0, 1.1), "fails")],
)  # fmt: skip
def test_early_only_is_ahead_at_first_and_level_at_last(arms_of, start, end, direction):
    full = tuple(zip(start, end, strict=True))
    first, second = arms_of(full=full, without=((3.0, 2.09), (3.02, 2.11)))
    assert verdicts.early_only([first, second], within=0.05).direction == direction


def test_the_whole_split_counts_where_every_run_has_it(tmp_path):
    folders = [
        write_record(tmp_path, "one", whole=2.5),
        write_record(tmp_path, "one", seed=1, whole=2.7),
        write_record(tmp_path, "other", whole=2.0),
    ]
    arms = list(read_arms(folders).values())
    assert [loss.values for loss in verdicts.losses_at_end(arms)] == [(2.5, 2.7), (2.0,)]
    (folders[2] / "evaluations.jsonl").unlink()
    losses = verdicts.losses_at_end(list(read_arms(folders).values()))
    assert [loss.values for loss in losses] == [(2.0, 2.0), (2.0,)]
    assert not losses[0].whole_split


@pytest.mark.parametrize(
    ("fact", "what"),
    [
        ({"sha256": "0000"}, "different data"),
        ({"context": 9}, "different context"),
        ({"characters": 2 * 10**6}, "different budget"),
        ({"bytes": 98}, "different evaluated bytes"),
        ({"stride": 4}, "different evaluation stride"),
        ({"parameters": 1011}, "different numbers of parameters"),
    ],
)
def test_unlike_arms_are_not_compared(tmp_path, fact, what):
    folders = [write_record(tmp_path, "one"), write_record(tmp_path, "other", **fact)]
    arms = list(read_arms(folders).values())
    with pytest.raises(NotComparableError, match=what):
        verdicts.check_comparable(arms)
    if "characters" in fact:
        verdicts.check_comparable(arms, same_budget=False)
    if "parameters" in fact:
        verdicts.check_comparable(arms, same_size=False)


def test_one_percent_apart_is_matched(tmp_path):
    folders = [write_record(tmp_path, "one"), write_record(tmp_path, "other", parameters=1010)]
    verdicts.check_comparable(list(read_arms(folders).values()))


def test_an_arm_without_a_finished_run_has_not_run(tmp_path):
    folder = write_record(tmp_path, "one")
    (folder / "summary.json").unlink()
    with pytest.raises(NotRunError, match="one"):
        verdicts.wanted(read_arms([folder]), ["one"])
    with pytest.raises(NotRunError, match="nobody"):
        verdicts.wanted({}, ["nobody"])


def test_a_ladder_needs_its_rungs_and_every_one_of_them(tmp_path):
    pairs = {}
    for rung, ours in (("1m", 1.9), ("2m", 1.8), ("4m", 1.999)):
        folders = [
            write_record(tmp_path, f"{kind}_{rung}", seed=seed, curve=(bpc + seed / 100,))
            for kind, bpc in (("fsn", ours), ("transformer", 2.0))
            for seed in range(2)
        ]
        pairs[rung] = list(read_arms(folders).values())
    near = {"1m": pairs["1m"], "4m": pairs.pop("4m")}
    assert verdicts.ladder(near, rungs=2).reason == "within 2 standard errors"
    one_seed = {rung: [Arm(arm.name, arm.runs[:1]) for arm in arms] for rung, arms in pairs.items()}
    assert verdicts.ladder(one_seed, rungs=2).reason == "one seed"
    assert verdicts.ladder(pairs, rungs=2).direction == "holds"
    assert verdicts.ladder(pairs, rungs=3).reason == "2 of 3 rungs"
    against = {"1m": pairs["1m"], "2m": pairs["2m"][::-1]}
    assert verdicts.ladder(against, rungs=2).direction == "fails"


def depth_table(base, full, *, far_copy=0.5, width=0.01):
    """A copy-depth table with one difference an arm, and another for far copies of the base."""

    def cells(mean, special):
        return [
            {
                "events": e,
                "distance": d,
                "bucket": b,
                "n": 5,
                **interval(special if (e, d) == ("copy", "far") else mean, width),
            }
            for e in EVENTS
            for d in DISTANCES
            for b in (*BUCKETS, "all")
        ]

    return {
        "reference": "plain",
        "arms": {
            "plain": {"difference": [], "runs": [{}, {}]},
            "beside": {"difference": [], "runs": [{}]},  # an arm that the claim is not about
            "base": {"difference": cells(base, far_copy), "runs": [{}, {}]},
            "full": {"difference": cells(full, full), "runs": [{}, {}]},
        },
    }


def interval(mean, width):
    return {"mean": mean, "low": mean - width, "high": mean + width}


@pytest.mark.parametrize(
    ("table", "direction"),
    [
        (depth_table(0.1, -0.1), "holds"),
        (depth_table(0.1, -0.1, far_copy=0.0), "fails"),  # worst elsewhere
        (depth_table(0.1, 0.1), "fails"),
        (depth_table(-0.1, -0.1), "fails"),
        (depth_table(0.1, -0.1, width=0.2), "undecided"),
        (depth_table(0.1, -0.1, far_copy=0.11), "undecided"),  # not clearly worst
    ],
)
def test_copy_depth_wants_all_three_parts(table, direction):
    found = verdicts.copy_depth(table, full="full", base="base")
    assert found.direction == direction
    with pytest.raises(NotRunError, match="nobody"):
        verdicts.copy_depth(table, full="nobody", base="base")
    table["arms"]["base"]["runs"] = [{}]
    assert verdicts.copy_depth(table, full="full", base="base").reason == "one seed"


def test_readings_must_be_of_every_coefficient():
    layer = {
        "coefficients": [
            {"strength": [0.1, -0.2], "angle": [0.0, 0.0]},
            {"strength": [0.3, 0.4], "angle": [0.0, 0.0]},
        ]
    }
    page = {"kernel_coefficients": 8, "layers": [layer, layer]}
    found = verdicts.readings(page)
    assert found.direction == "holds" and "20% of their strength is repulsive" in found.measured
    assert verdicts.readings({**page, "kernel_coefficients": 9}).direction == "fails"
    layer["coefficients"][0]["angle"][1] = math.nan
    assert verdicts.readings(page).direction == "fails"
