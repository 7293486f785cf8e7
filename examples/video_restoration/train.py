"""One training loop for the base and for the adapters."""

import math
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from data import Pairs, sample_batch
from diffusers import CogVideoXTransformer3DModel
from model import FRAMES, HEIGHT, WIDTH, predict
from tqdm import tqdm


@dataclass(frozen=True)
class Schedule:
    """How long, how fast and on how much at once to train."""

    steps: int
    rate: float
    batch: int = 1
    warmup: int = 10


def rate_factor(step: int, schedule: Schedule) -> float:
    """Return the share of the peak learning rate at a step: a linear warm-up, then half a cosine down to zero."""
    warmup = min(schedule.warmup, schedule.steps // 4)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, schedule.steps - warmup)
    return 0.5 * (1 + math.cos(math.pi * progress))


def train(
    model: CogVideoXTransformer3DModel, pairs: Pairs, schedule: Schedule, seed: int, title: str
) -> tuple[list[float], float]:
    """Train whatever requires a gradient; return the loss of every step and the seconds that it took."""
    generator = torch.Generator().manual_seed(seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=schedule.rate, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, schedule))
    model.train()
    losses, start = [], time.perf_counter()
    bar = tqdm(range(schedule.steps), desc=title, unit="step", mininterval=0.5)
    for _ in bar:
        degraded, true = sample_batch(pairs, schedule.batch, FRAMES, (HEIGHT, WIDTH), generator)
        loss = F.mse_loss(predict(model, degraded), true)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.4f}")
    return losses, time.perf_counter() - start
