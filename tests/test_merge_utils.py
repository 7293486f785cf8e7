"""Merging of task tensors, with numbers small enough to follow by hand."""

import pytest
import torch

from peft.utils.merge_utils import (
    calculate_majority_sign_mask,
    dare_linear,
    dare_ties,
    disjoint_merge,
    magnitude_based_pruning,
    magnitude_prune,
    prune,
    random_pruning,
    reshape_weight_task_tensors,
    task_arithmetic,
    ties,
)

FIRST = torch.tensor([[1.0, -2.0, 3.0], [0.5, 0.0, -6.0]])
SECOND = torch.tensor([[-4.0, -1.0, 2.0], [0.25, 0.0, 1.0]])
TASKS = [FIRST, SECOND]
WEIGHTS = torch.tensor([2.0, 0.5])
MERGES = {
    "task_arithmetic": task_arithmetic,
    "magnitude_prune": lambda tasks, weights: magnitude_prune(tasks, weights, 0.5),
    "ties": lambda tasks, weights: ties(tasks, weights, 0.5),
    "dare_linear": lambda tasks, weights: dare_linear(tasks, weights, 0.5),
    "dare_ties": lambda tasks, weights: dare_ties(tasks, weights, 0.5),
}


def test_weights_gain_trailing_dimensions():
    assert reshape_weight_task_tensors(torch.zeros(2, 3, 4), WEIGHTS).tolist() == [[[2.0]], [[0.5]]]


def test_task_arithmetic_is_the_weighted_sum():
    torch.testing.assert_close(task_arithmetic(TASKS, WEIGHTS), 2 * FIRST + 0.5 * SECOND)


@pytest.mark.parametrize(
    "density, kept",
    [
        (0.0, []),
        (1 / 6, [-6.0]),
        (0.5, [-2.0, 3.0, -6.0]),
        (0.6, [-2.0, 3.0, -6.0]),
        (0.99, [1.0, -2.0, 3.0, 0.5, -6.0]),
    ],
)
def test_magnitude_pruning_keeps_the_largest(density, kept):
    pruned = prune(FIRST, density, "magnitude")
    assert pruned[pruned != 0].tolist() == kept
    assert pruned.shape == FIRST.shape
    torch.testing.assert_close(pruned, magnitude_based_pruning(FIRST, density))


def test_magnitude_pruning_keeps_the_count_in_case_of_ties():
    assert magnitude_based_pruning(torch.ones(4, 4), 0.25).sum() == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["magnitude", "random"])
def test_pruning_keeps_type_and_input(dtype, method):
    tensor = FIRST.to(dtype)
    assert prune(tensor, 0.5, method).dtype == dtype
    assert torch.equal(tensor, FIRST.to(dtype))


def test_random_pruning_keeps_about_the_share_and_the_expectation():
    ones = torch.ones(100, 100)
    plain, rescaled = prune(ones, 0.25, "random"), prune(ones, 0.25, "random", rescale=True)
    assert set(plain.unique().tolist()) == {0.0, 1.0}
    assert set(rescaled.unique().tolist()) == {0.0, 4.0}
    assert plain.mean().item() == pytest.approx(0.25, abs=0.02)
    assert rescaled.mean().item() == pytest.approx(1.0, abs=0.08)


def test_random_pruning_of_everything_divides_by_nothing():
    assert torch.equal(random_pruning(FIRST, 0.0, rescale=True), torch.zeros_like(FIRST))


@pytest.mark.parametrize("density", [1.0, 1.5])
def test_a_full_density_warns_and_prunes_nothing(density):
    with pytest.warns(UserWarning, match="all entries are kept"):
        assert prune(FIRST, density, "magnitude") is FIRST


@pytest.mark.parametrize("density", [-0.1, float("nan")])
def test_a_density_outside_the_range_is_refused(density):
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        prune(FIRST, density, "magnitude")


def test_an_unknown_pruning_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'magnitude'"):
        prune(FIRST, 0.5, "magnitudes")


@pytest.mark.parametrize(
    "method, elected",
    # Columns: agreement, a tie, one large against two small, nothing.
    [("total", [1, 1, -1, 1]), ("frequency", [1, 1, 1, 1])],
)
def test_the_sign_of_the_majority(method, elected):
    tasks = torch.tensor([[1.0, 2.0, 1.0, 0.0], [2.0, -2.0, 1.0, 0.0], [1.0, 0.0, -9.0, 0.0]])
    mask = calculate_majority_sign_mask(tasks, method)
    assert mask.dtype == torch.bool
    assert torch.equal(mask, tasks.sign() == torch.tensor(elected))


def test_an_unknown_election_is_refused_with_the_nearest():
    with pytest.raises(RuntimeError, match="Did you mean 'frequency'"):
        calculate_majority_sign_mask(torch.stack(TASKS), "frequencies")


def test_disjoint_merge_averages_what_is_admitted():
    mask = torch.tensor([[True, True, False], [True, False, False]])
    merged = disjoint_merge(torch.tensor([[1.0, 5.0, 7.0], [3.0, 9.0, 9.0]]), mask)
    assert merged.tolist() == [2.0, 5.0, 0.0]


def test_magnitude_prune_sums_the_pruned():
    expected = 2 * torch.tensor([[0, -2.0, 3], [0, 0, -6]]) + 0.5 * torch.tensor([[-4.0, 0, 2], [0, 0, 1]])
    # Of SECOND, -1 and 1 are equally large, and either may be the third to be kept.
    merged = magnitude_prune(TASKS, WEIGHTS, 0.5)
    other = 2 * torch.tensor([[0, -2.0, 3], [0, 0, -6]]) + 0.5 * torch.tensor([[-4.0, -1, 2], [0, 0, 0]])
    assert torch.equal(merged, expected) or torch.equal(merged, other)


def test_ties_elects_without_weights_and_averages_with_them():
    first = torch.tensor([4.0, 1.0, -3.0, 0.1])
    second = torch.tensor([-3.0, 2.0, -1.0, 0.1])
    # Trimmed to two entries each: [4, 0, -3, 0] and [-3, 2, 0, 0]; elected: +, +, -, +.
    merged = ties([first, second], torch.tensor([0.5, 10.0]), density=0.5)
    assert merged.tolist() == [2.0, 20.0, -1.5, 0.0]


def test_dare_is_random_pruning_then_the_sum():
    torch.manual_seed(3)
    expected = [prune(task, 0.5, "random", rescale=True) for task in TASKS]
    torch.manual_seed(3)
    torch.testing.assert_close(dare_linear(TASKS, WEIGHTS, 0.5), task_arithmetic(expected, WEIGHTS))


def test_dare_ties_is_random_pruning_then_the_election():
    torch.manual_seed(3)
    dropped = torch.stack([prune(task, 0.5, "random", rescale=True) for task in TASKS])
    mask = calculate_majority_sign_mask(dropped, "frequency")
    expected = disjoint_merge(dropped * WEIGHTS.view(2, 1, 1), mask)
    torch.manual_seed(3)
    torch.testing.assert_close(dare_ties(TASKS, WEIGHTS, 0.5, majority_sign_method="frequency"), expected)


@pytest.mark.parametrize("merge", MERGES.values(), ids=MERGES)
def test_every_merge_keeps_the_shape_and_checks_its_input(merge):
    assert merge(TASKS, WEIGHTS).shape == FIRST.shape
    assert merge([FIRST], torch.tensor([1.0])).shape == FIRST.shape
    with pytest.raises(ValueError, match="one shape"):
        merge([FIRST, SECOND.T], WEIGHTS)
    with pytest.raises(ValueError, match="One weight per task"):
        merge(TASKS, torch.tensor([1.0]))
