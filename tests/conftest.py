"""What all tests share: no network, one thread, the same random numbers every time."""

from __future__ import annotations

import os

# Before anything imports the libraries that read them.
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import random

import numpy as np
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _precision_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 4 writes a Trainer's precision into the environment, where those of later tests would find it."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no accelerator here")
