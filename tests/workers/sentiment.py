"""The training of the example of two processes, on a few words."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "two_processes"

sys.path.insert(0, str(EXAMPLE))
import train  # noqa: E402  (the example's script, as torchrun would start it)
import transformers.models.bert.modeling_bert  # noqa: F401, E402  (once, before there are two processes)

sys.path.remove(str(EXAMPLE))

PLAN = train.Plan(train=48, held_out=16, epochs=1, batch=16)
SEED = 0


def fully_sharded(folder: Path) -> list[dict[str, Any]]:
    """Train as one process and as two; returns what this process reports."""
    ways = ["one", "fsdp2"] if dist.get_rank() == 0 else ["fsdp2"]
    return [dataclasses.asdict(train.run(way, PLAN, SEED, folder)) for way in ways]
