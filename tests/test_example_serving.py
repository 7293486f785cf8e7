"""The example of serving, in its short form: eight adapters learn, and answer in one batch what they answer alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "serving" / "run.py"
NAMES = [f"by_{step}" for step in range(1, 9)]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    pytest.importorskip("matplotlib", reason="the example draws with matplotlib")
    folder = tmp_path_factory.mktemp("serving") / "out"
    command = [sys.executable, str(EXAMPLE), "--quick", "--threads", "1", "--out", str(folder)]
    done = subprocess.run(command, cwd=folder.parent, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder.parent / "stdout").write_text(done.stdout)
    return folder


@pytest.fixture(scope="module")
def results(out):
    return json.loads((out / "results.json").read_text())


def test_writes_an_adapter_for_each_step_a_plot_and_the_figures(out):
    assert {path.name for path in out.iterdir()} == {"adapters", "results.json", "serving.png"}
    assert {path.name for path in (out / "adapters").iterdir() if path.is_dir()} == set(NAMES)


def test_each_row_is_answered_by_its_adapter(results):
    assert list(results["answers"]) == NAMES
    assert all(numbers[0] == 5 and len(numbers) == 8 for numbers in results["answers"].values())
    assert results["same_as_alone"] is True
    assert results["right"] >= 6  # of 8, after 30 steps of training each


def test_all_ways_of_serving_are_timed_and_copies_need_more_memory(results, out):
    speeds, memory = results["requests_per_second"], results["megabytes"]
    assert set(speeds) == set(memory) == {"mixed", "switched", "copies"}
    assert all(set(by_size) == {"8"} and by_size["8"] > 0 for by_size in speeds.values())
    assert memory["mixed"] == memory["switched"] < memory["copies"] / 3
    assert "one mixed batch" in (out.parent / "stdout").read_text()
