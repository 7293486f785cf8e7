"""The example that `make demo` runs, in its short form: what it writes, what trains, and what training the copy is worth."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "video_restoration"
FILES = {
    "adapter/pytorch_lora_weights.safetensors",
    "base/config.json",
    "base/diffusion_pytorch_model.safetensors",
    "frames.png",
    "losses.png",
    "report.html",
    "restored.safetensors",
    "results.json",
    "trained.png",
}
LORA = {
    f"transformer_blocks.{block}.attn1.{layer}.lora_{matrix}.default.weight"
    for block in range(3)
    for layer in ("to_q", "to_k", "to_v", "to_out.0")
    for matrix in "AB"
}
COPY = {f"proj_out.modules_to_save.default.{part}" for part in ("weight", "bias")}
DAMAGES = {"twin", "blocks"}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    for package in ("av", "skvideo", "diffusers", "matplotlib"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the example needs {package}")
    folder = tmp_path_factory.mktemp("video") / "out"
    command = [sys.executable, str(EXAMPLE / "run.py"), "--quick", "--out", str(folder)]
    done = subprocess.run(command, cwd=folder.parent, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder.parent / "stdout").write_text(done.stdout)
    return folder


@pytest.fixture(scope="module")
def results(out):
    return json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def runs(results):
    return {run["key"]: run for run in results["runs"]}


def test_writes_these_files_and_no_others(out):
    assert {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()} == FILES
    assert {path.name for path in out.parent.iterdir()} == {"out", "stdout"}


@pytest.mark.parametrize("run, names", [("lora_alone", LORA), ("copy_frozen", LORA), ("copy_trained", LORA | COPY)])
def test_trains_exactly(runs, run, names):
    assert set(runs[run]["trainable"]) == names


@pytest.mark.parametrize("damage", sorted(DAMAGES))
def test_training_the_copy_pays(results, runs, damage):
    frozen, trained = runs["copy_frozen"]["psnr"][damage], runs["copy_trained"]["psnr"][damage]
    assert trained > frozen + 2
    assert frozen > results["psnr_before"][damage]
    assert runs["copy_frozen"]["colour"][damage] < 0.02 < 0.3 < runs["copy_trained"]["colour"][damage]


def test_a_frozen_copy_is_no_copy(runs):
    alone, frozen = runs["lora_alone"], runs["copy_frozen"]
    assert alone["losses"] == frozen["losses"]
    assert alone["psnr"] == frozen["psnr"]
    assert frozen["output_layer_moved"] == 0 < runs["copy_trained"]["output_layer_moved"]


def test_the_fresh_process_restores_the_same_frames(out, results, runs):
    assert results["fresh_process_equal"] is True
    restored = load_file(out / "restored.safetensors")
    assert set(restored) == DAMAGES
    code = (
        "import sys, json; from safetensors.torch import load_file; from data import carphone_pairs, psnr, split;"
        "frames = load_file(sys.argv[1]); truth = {k: split(p)[1].true for k, p in carphone_pairs().items()};"
        "print(json.dumps({k: psnr(f, truth[k][:len(f)]) for k, f in frames.items()}))"
    )
    command = [sys.executable, "-c", code, str(out / "restored.safetensors")]
    done = subprocess.run(command, cwd=EXAMPLE, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == pytest.approx(runs["copy_trained"]["psnr"], abs=1e-9)


def test_the_adapter_file_holds_the_trained_copy_under_its_plain_name(out):
    adapter = load_file(out / "adapter" / "pytorch_lora_weights.safetensors")
    base = load_file(out / "base" / "diffusion_pytorch_model.safetensors")
    assert set(adapter) == {name.replace(".default", "") for name in LORA} | {"proj_out.weight", "proj_out.bias"}
    assert not torch.equal(adapter["proj_out.weight"], base["proj_out.weight"])


def test_the_report_is_one_file(out):
    page = (out / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == page.count("<img ") == 3
    assert not any(part in page for part in ("<script", "http:", "https:"))  # colons, which no picture has in base64


def test_prints_the_table(out):
    table = (out.parent / "stdout").read_text()
    for part in ("before", "LoRA alone", "frozen (the defect)", "LoRA + copy, training", "bit for bit the same"):
        assert part in table
