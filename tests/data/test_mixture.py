"""Mixtures: exact proportions, disjoint splits, settings of a data set, estimated statistics."""

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.test_order import Numbers
from vila.core.errors import DataError, UnknownNameError
from vila.data.dataset import DatasetEntry, Split, Subset, open_mixture
from vila.data.mixture import Mixture, MixtureDataset
from vila.data.stats import dataset_stats


def counts_by_name(mixture, start, stop):
    return Counter(mixture.datasets[mixture.locate(p)[0]].name for p in range(start, stop))


def test_weights_divide_an_epoch_as_long_as_all_data_sets():
    parts = [MixtureDataset("a", Numbers(900, "a"), weight=1), MixtureDataset("b", Numbers(100, "b"), weight=1)]
    mixture = Mixture(parts, seed=4)
    assert mixture.epoch_length == 1000
    assert counts_by_name(mixture, 0, 1000) == {"a": 500, "b": 500}
    counts = Counter(mixture[p][1].id for p in range(2000))
    # 1000 of each in two epochs: every sample of b ten times, of a once, and its first hundred of the next pass twice.
    assert {counts[f"b{i}"] for i in range(100)} == {10}
    assert Counter(counts[f"a{i}"] for i in range(900)) == {1: 800, 2: 100}


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 50), st.floats(0.01, 10)), min_size=1, max_size=6))
def test_weighted_counts_add_up_and_are_within_one_of_the_exact_fraction(sets):
    mixture = Mixture([MixtureDataset(str(n), Numbers(size), weight=w) for n, (size, w) in enumerate(sets)], seed=0)
    length, total = sum(size for size, _ in sets), sum(w for _, w in sets)
    assert mixture.epoch_length == sum(mixture.samples_per_epoch) == length
    assert all(
        abs(count - length * w / total) < 1 for count, (_, w) in zip(mixture.samples_per_epoch, sets, strict=True)
    )


def test_part_of_an_epoch_has_about_the_same_proportions():
    mixture = Mixture(
        [MixtureDataset("a", Numbers(6000, "a")), MixtureDataset("b", Numbers(2000, "b"), repeat=2)], seed=9
    )
    for start in range(0, 10_000, 1000):
        # 400 +- 15.5 by chance; five deviations.
        assert abs(counts_by_name(mixture, start, start + 1000)["b"] - 400) < 78


@pytest.mark.parametrize(
    ("parts", "names"),
    [
        (
            [MixtureDataset("a", Numbers(3), weight=1), MixtureDataset("b", Numbers(3))],
            ["b"],
        ),
        (
            [MixtureDataset("a", Numbers(3), weight=1), MixtureDataset("b", Numbers(0), weight=1)],
            ["b"],
        ),
    ],
)
def test_missing_weights_and_weights_of_empty_data_sets_are_errors_with_their_names(parts, names):
    with pytest.raises(DataError) as caught:
        Mixture(parts, seed=0)
    assert caught.value.value == names


@settings(max_examples=40, deadline=None)
@given(size=st.integers(0, 4200), fraction=st.floats(0.001, 0.999))
def test_training_and_validation_split_partition_the_data_set(size, fraction):
    source = Numbers(size)
    train, val = Split(source, fraction, val=False), Split(source, fraction, val=True)
    left, right = ([view.locate(i) for i in range(len(view))] for view in (train, val))
    assert sorted(left + right) == list(range(size))
    whole = size // 1000 * 1000
    assert abs(sum(i < whole for i in right) - whole * fraction) <= 1


def test_appended_samples_move_no_other_sample_between_the_splits():
    def val(size):
        view = Split(Numbers(size), 0.1, val=True)
        return {view.locate(i) for i in range(len(view))}

    assert val(2345) == {i for i in val(9000) if i < 2345}


def test_a_subset_is_fixed_and_without_repeats():
    subset = Subset(Numbers(1000), 30)
    chosen = [subset.locate(i) for i in range(30)]
    assert len(set(chosen)) == 30
    assert chosen != sorted(chosen)
    assert chosen == [Subset(Numbers(1000), 30).locate(i) for i in range(30)]
    assert len(Subset(Numbers(5), 30)) == 5
    with pytest.raises(IndexError):
        subset[30]
    with pytest.raises(IndexError):
        Split(Numbers(100), 0.1, val=False)[90]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "qa.jsonl"
    rows = [
        {"id": str(n), "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
        for n in range(40)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_entries_select_splits_subsets_and_get_unique_names(file):
    mixture = open_mixture(
        [
            DatasetEntry("messages", file, val_fraction=0.25, max_samples=7),
            DatasetEntry("messages", file, val_fraction=0.25, split="val", image_mode="resize", template="caption"),
        ],
        seed=0,
    )
    assert [part.name for part in mixture.datasets] == ["qa", "qa#2"]
    assert [part.image_mode for part in mixture.datasets] == [None, "resize"]
    first, second = ({part.source[i].id for i in range(len(part.source))} for part in mixture.datasets)
    assert len(first) == 7
    assert not first & second


def test_an_unknown_template_of_an_entry_is_an_error_on_opening(file):
    with pytest.raises(UnknownNameError) as caught:
        open_mixture([DatasetEntry("messages", file, template="vicunna_v1")], seed=0)
    assert "vicuna_v1" in caught.value.near


def test_statistics_count_samples_and_estimate_tokens_and_images():
    from tests.data.test_packing import sample

    parts = [
        MixtureDataset("long", Numbers(100)),
        MixtureDataset("short", Numbers(50), repeat=2),
        MixtureDataset("none", Numbers(0)),
    ]
    found = dataset_stats(
        Mixture(parts, seed=0), lambda part, s: sample(0, 30, images=2) if part.name == "long" else sample(0, 10), 8
    )
    assert [(one.name, one.samples, one.tokens, one.images) for one in found] == [
        ("long", 100, 3000, 200),
        ("short", 100, 1000, 0),
        ("none", 0, 0, 0),
    ]
    assert [one.token_share for one in found] == [0.75, 0.25, 0.0]
    assert [one.num_measured for one in found] == [8, 8, 0]


def test_statistics_of_all_samples_are_exact():
    from tests.data.test_packing import sample

    mixture = Mixture([MixtureDataset("a", Numbers(20))], seed=0)
    (one,) = dataset_stats(mixture, lambda part, s: sample(0, int(s.id[1:]) + 1), 100)
    assert (one.tokens, one.num_measured) == (210, 20)
