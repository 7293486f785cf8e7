"""Adapters on two processes: the same weights as one process gives on the rows of both, saved and loaded whole.

What runs in the processes is in `tests/workers`.
"""

import pytest
from distributed import in_two_processes
from workers.recipes import NETWORKS, QUICK, RECIPES


def test_data_parallel_and_fully_sharded(tmp_path):
    assert in_two_processes("ddp:quick", "fsdp2:quick", folder=tmp_path) == [(list(QUICK), list(QUICK))] * 2


@pytest.mark.slow
def test_all_of_data_parallel_and_fully_sharded(tmp_path):
    trained = in_two_processes("ddp:everything", "fsdp2:everything", folder=tmp_path, timeout=400)
    assert trained == [(list(RECIPES), list(RECIPES))] * 2


@pytest.mark.slow
def test_more_of_what_is_fully_sharded(tmp_path):
    from workers.fsdp2 import METHODS

    assert in_two_processes("fsdp2:more", folder=tmp_path, timeout=400) == [(list(METHODS),)] * 2


@pytest.mark.slow
def test_prompts_that_a_network_makes(tmp_path):
    trained = in_two_processes("fsdp2:networks", "accelerated:fsdp1_networks", folder=tmp_path, timeout=400)
    assert trained == [(list(NETWORKS), ["p-tuning", "prefix"])] * 2


@pytest.mark.slow
def test_accelerate(tmp_path):
    trained = in_two_processes("accelerated:data_parallel_and_fsdp2", folder=tmp_path, timeout=400)
    assert trained == [(list(RECIPES),)] * 2


@pytest.mark.slow
def test_first_version_of_fsdp(tmp_path):
    recipes = ["lora", "copies", "dora", "prompt"]
    assert in_two_processes("accelerated:fsdp1", folder=tmp_path, timeout=400) == [(recipes,)] * 2


@pytest.mark.slow
def test_zero3(tmp_path):
    pytest.importorskip("deepspeed", reason="ZeRO-3 needs DeepSpeed")
    trained = in_two_processes("zero3:everything", "zero3:networks", folder=tmp_path, timeout=400)
    assert trained == [(list(RECIPES), list(NETWORKS))] * 2
