"""The example of ranks, in its short form: four methods learn, and only those that scale with the rank gain from it."""

import pytest

from examples import load_example, run_example

METHODS = ["LoRA", "DoRA", "PiSSA", "rsLoRA"]


@pytest.fixture(scope="module")
def example():
    return load_example("ranks", "sklearn")


@pytest.fixture(scope="module")
def outcome(example, tmp_path_factory):
    return run_example(example, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def runs(outcome):
    return {(run["method"], run["rank"]): run for run in outcome.results["runs"]}


def last_loss(run):
    return sum(run["losses"][-5:]) / 5


def test_the_halves_share_no_digit(example):
    known, new = example.load_halves(0)
    assert len(known.labels) + len(new.labels) == 1797
    assert {int(label) for label in known.labels} == {int(label) for label in new.labels} == {0, 1, 2, 3, 4}


def test_writes_these_files(outcome):
    assert outcome.files == {"results.json", "ranks.png"}
    assert outcome.is_picture("ranks.png")


def test_every_method_runs_at_every_rank(runs):
    expected = {("head alone", None), ("all weights", None)} | {
        (method, rank) for method in METHODS for rank in (2, 32)
    }
    assert set(runs) == expected


def test_what_is_trained(runs):
    head = 64 * 5 + 5
    a_rank = 3 * (4 * (64 + 64) + 2 * (64 + 128))  # layers; attention; perceptron
    for rank in (2, 32):
        for method in ("LoRA", "PiSSA", "rsLoRA"):
            assert runs[method, rank]["trainable"] == head + rank * a_rank
        magnitudes = 3 * (4 * 64 + 128 + 64)
        assert runs["DoRA", rank]["trainable"] == head + rank * a_rank + magnitudes


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rank", [2, 32])
def test_every_method_learns_more_than_a_head(runs, method, rank):
    assert last_loss(runs[method, rank]) < last_loss(runs["head alone", None])


def test_the_rank_matters_where_the_scale_allows_it(runs):
    assert last_loss(runs["rsLoRA", 32]) < 0.9 * last_loss(runs["rsLoRA", 2])
    assert last_loss(runs["rsLoRA", 32]) < 0.9 * last_loss(runs["LoRA", 32])
    assert last_loss(runs["PiSSA", 32]) < 0.98 * last_loss(runs["LoRA", 32])


def test_prints_the_table(outcome):
    for part in ("rank 2", "rank 32", *METHODS, "head alone", "all weights"):
        assert part in outcome.printed
