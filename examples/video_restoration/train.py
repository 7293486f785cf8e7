"""One training loop for the base and for the adapters."""

import math
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from data import Pairs, sample_batch
from diffusers import CogVideoXTransformer3DModel
from model import CROP, FRAMES, predict
from tqdm import tqdm

COLOUR_WEIGHT = 3.0


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train."""

    steps: int
    rate: float
    batch: int = 4
    warmup: int = 10


def rate_factor(step: int, schedule: Schedule) -> float:
    """Return the share of the peak learning rate at a step: a linear warm-up, then half a cosine down to zero."""
    if step < schedule.warmup:
        return (step + 1) / schedule.warmup
    progress = (step - schedule.warmup) / max(1, schedule.steps - schedule.warmup)
    return 0.5 * (1 + math.cos(math.pi * progress))


def picture_loss(restored: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """Return the squared error, plus that of the colours alone: they carry little energy, but an eye sees them."""
    return F.mse_loss(restored, true) + COLOUR_WEIGHT * F.mse_loss(_colours(restored), _colours(true))


def train(
    model: CogVideoXTransformer3DModel, clips: list[Pairs], schedule: Schedule, seed: int, title: str
) -> tuple[list[float], float]:
    """Train whatever requires a gradient; return the loss of every step, and the seconds that it took."""
    generator = torch.Generator().manual_seed(seed)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=schedule.rate, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, schedule))
    model.train()
    losses, start = [], time.perf_counter()
    bar = tqdm(range(schedule.steps), desc=title, unit="step", mininterval=0.5)
    for _ in bar:
        damaged, true = sample_batch(clips, schedule.batch, FRAMES, CROP, generator)
        loss = picture_loss(predict(model, damaged), true)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.4f}", refresh=False)
    return losses, time.perf_counter() - start


def _colours(frames: torch.Tensor) -> torch.Tensor:
    """Return how far every channel is from grey."""
    return frames - frames.mean(-3, keepdim=True)
