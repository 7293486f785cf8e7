"""The example of quantised models, in its short form: every form learns alike, in a quarter or an eighth of the memory."""

import pytest

from examples import load_example, run_example

FORMS = {
    "float32": 1.0,
    "int8, bitsandbytes": 0.3,
    "int8, torchao": 0.3,
    "NF4, bitsandbytes": 0.2,
    "NF4, LoftQ start": 0.2,
    "FP4, bitsandbytes": 0.2,
}
"""Form -> what share of the memory it takes at most, with its scales and tables."""


@pytest.fixture(scope="module")
def example():
    return load_example("quantized", "sklearn", "bitsandbytes", "torchao")


@pytest.fixture(scope="module")
def outcome(example, tmp_path_factory):
    return run_example(example, tmp_path_factory.mktemp("quantized"))


@pytest.fixture(scope="module")
def runs(outcome):
    return {run["form"]: run for run in outcome.results["runs"]}


def last_loss(run):
    return sum(run["losses"][-5:]) / 5


def test_writes_these_files(outcome):
    assert outcome.files == {"results.json", "quantized.png"}
    assert outcome.is_picture("quantized.png")


def test_every_form_is_run_with_the_same_adapter(runs):
    assert set(runs) == set(FORMS)
    head = 64 * 5 + 5
    factors = 2 * 8 * (4 * (64 + 64) + 2 * (64 + 128))  # layers, rank; attention, perceptron
    assert {run["trainable"] for run in runs.values()} == {head + factors}


def test_memory(runs):
    dense = 2 * (4 * 64 * 64 + 2 * 64 * 128) * 4
    assert runs["float32"]["weight_bytes"] == dense
    for form, share in FORMS.items():
        assert runs[form]["weight_bytes"] <= share * dense


def test_fewer_bits_round_more(runs):
    off = {form: run["rounding"] for form, run in runs.items()}
    assert off["float32"] == 0
    for form in ("int8, bitsandbytes", "int8, torchao"):
        assert 0 < off[form] < off["NF4, bitsandbytes"] / 3
    assert off["NF4, LoftQ start"] < off["NF4, bitsandbytes"] < off["FP4, bitsandbytes"]


def test_all_learn_alike(runs):
    reference = runs["float32"]
    assert last_loss(reference) < 0.7 * reference["losses"][0]
    for run in runs.values():
        assert last_loss(run) == pytest.approx(last_loss(reference), rel=0.1)


def test_merging_rounds_and_unmerging_does_not(runs):
    assert runs["float32"]["merge_rounding"] < 1e-5
    for form, run in runs.items():
        assert run["unmerged_exactly"]
        assert form == "float32" or run["merge_rounding"] > 1e-4


def test_prints_the_table(outcome):
    for part in (*FORMS, "known digits", "new digits", "merged", "trains 14,661 parameters"):
        assert part in outcome.printed


def test_forms_of_packages_that_are_missing_are_left_out(example, monkeypatch, capsys):
    monkeypatch.setattr(example.importlib.util, "find_spec", lambda name: None)
    assert [name for name, form in example.FORMS.items() if example.installed(form)] == ["float32"]
    run = example.Run("float32", 0, 0.0, 0.9, 0.5, 0.5, 0.0, True, 1000, 7, 0.1, [1.0])
    example.print_table([run])
    assert "left out, since they are not installed: bitsandbytes, torchao" in capsys.readouterr().out
