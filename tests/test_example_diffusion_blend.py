"""The example of blending, in its short form: two adapters learn a style each, and their weights dose them apart."""

import pytest
import torch
from safetensors.torch import load_file

from examples import load_example, run_example

STYLES = ["slanted", "bold"]


@pytest.fixture(scope="module")
def example():
    return load_example("diffusion_blend", "diffusers", "sklearn")


@pytest.fixture(scope="module")
def outcome(example, tmp_path_factory):
    return run_example(example, tmp_path_factory.mktemp("blend"))


def test_slant_and_coverage_measure_what_they_say(example):
    stroke = torch.zeros(1, 1, 16, 16)
    for row in range(4, 12):
        stroke[0, 0, row, 15 - row] = 1  # a pixel to the right for each pixel upwards
    assert float(example.slant(stroke)) == pytest.approx(1.0)
    assert float(example.slant(stroke.flip(-1))) == pytest.approx(-1.0)
    assert float(example.coverage(stroke)) == pytest.approx(8 / 256)


def test_the_styles_differ_in_their_own_measure(example):
    upright = example.load_upright()
    slanted, bold = (example.restyle(upright, style) for style in STYLES)
    assert float(example.slant(slanted.ink).mean()) > float(example.slant(upright.ink).mean()) + 0.4
    assert float(example.coverage(bold.ink).mean()) > 1.3 * float(example.coverage(upright.ink).mean())
    assert float(example.coverage(slanted.ink).mean()) == pytest.approx(
        float(example.coverage(upright.ink).mean()), rel=0.05
    )


def test_writes_these_files(outcome):
    adapters = {f"{style}/pytorch_lora_weights.safetensors" for style in STYLES}
    assert outcome.files == adapters | {"blend.png", "measures.png", "results.json"}
    assert outcome.is_picture("blend.png") and outcome.is_picture("measures.png")


@pytest.mark.parametrize("style", STYLES)
def test_a_style_grows_with_its_weight_whatever_the_other_weighs(outcome, style):
    for row in outcome.results["measured"][style]:
        assert row == sorted(row)
        assert row[-1] - row[0] > {"slanted": 0.1, "bold": 0.03}[style]


@pytest.mark.parametrize("style", STYLES)
def test_a_style_hardly_touches_the_measure_of_the_other(outcome, style):
    table = torch.tensor(outcome.results["measured"][style])
    assert (table - table.mean(0)).abs().max() < 0.4 * (table[:, -1] - table[:, 0]).min()


def test_the_adapters_are_saved_apart_and_differ(outcome):
    slanted, bold = (load_file(outcome.out / style / "pytorch_lora_weights.safetensors") for style in STYLES)
    assert set(slanted) == set(bold)
    assert all(not torch.equal(slanted[key], bold[key]) for key in slanted)
    assert sum(tensor.numel() for tensor in slanted.values()) == outcome.results["parameters"]["adapter"]


def test_prints_the_table(outcome):
    for part in ("slant, with “bold” at 0", "ink, with “slanted” at 1"):
        assert part in outcome.printed
