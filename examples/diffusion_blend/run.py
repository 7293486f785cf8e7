"""Blend two styles of a diffusion model: how slanted and how bold it writes, each an adapter, each with its weight.

A small UNet of diffusers learns to write the handwritten digits of scikit-learn. On the frozen model one LoRA adapter
learns digits that lean to the right, another one bold digits. `set_adapters` then mixes them with weights that neither
was trained for, and from the same noise the same digit comes out in 25 hands.
"""

import argparse
import json
import os
import time
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

# Before torch starts its threads: on a machine that others use too, threads that spin while they wait slow all down.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import matplotlib
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from diffusers.utils import logging
from sklearn.datasets import load_digits
from tqdm import tqdm

from peft import LoraConfig

matplotlib.use("Agg")  # before pyplot: there may be no screen

import matplotlib.pyplot as plt

SIZE, CONTEXT = 16, 16
STYLES = ("slanted", "bold")
COLOURS = {"slanted": "#1b998b", "bold": "#d1495b"}
TARGETS = ["conv1", "conv2", "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"]
NOISE = {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}


@dataclass(frozen=True)
class Plan:
    """How big the model is, how long base and adapters train, and how finely they are blended."""

    channels: tuple[int, int]
    base_steps: int
    adapter_steps: int
    batch: int
    weights: tuple[float, ...]
    samples: int  # of every digit, for each pair of weights
    denoising_steps: int


FULL = Plan((32, 64), 500, 150, 48, weights=(0.0, 0.25, 0.5, 0.75, 1.0), samples=2, denoising_steps=15)
QUICK = Plan((16, 32), 60, 35, 24, weights=(0.0, 0.5, 1.0), samples=2, denoising_steps=6)


@dataclass(frozen=True)
class Digits:
    """Pictures `(count, 1, 16, 16)`, ink from 0 to 1, and the digit that each one shows."""

    ink: torch.Tensor
    labels: torch.Tensor


def load_upright() -> Digits:
    """Return the digits of scikit-learn, half as large again and with room around them to lean into."""
    digits = load_digits()
    ink = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    ink = F.interpolate(ink, size=12, mode="bicubic", align_corners=False).clamp(0, 1)
    return Digits(F.pad(ink, (2, 2, 2, 2)), torch.tensor(digits.target))


def restyle(digits: Digits, style: str) -> Digits:
    """Return the digits leaning to the right, or with thick strokes."""
    if style == "bold":
        return Digits(F.max_pool2d(F.pad(digits.ink, (0, 1, 0, 1)), 2, stride=1), digits.labels)
    shear = torch.tensor([[1.0, 0.6, 0.0], [0.0, 1.0, 0.0]]).expand(len(digits.ink), 2, 3)
    grid = F.affine_grid(shear, list(digits.ink.shape), align_corners=False)
    return Digits(F.grid_sample(digits.ink, grid, align_corners=False), digits.labels)


def slant(ink: torch.Tensor) -> torch.Tensor:
    """Return how far each picture leans to the right: pixels sideways for a pixel upwards."""
    place = torch.arange(SIZE, dtype=ink.dtype)
    mass = _strokes(ink).squeeze(1)
    mass = mass / mass.sum((1, 2), keepdim=True)
    across = place[None, None, :] - (mass.sum(1) * place).sum(1)[:, None, None]
    down = place[None, :, None] - (mass.sum(2) * place).sum(1)[:, None, None]
    return -(mass * across * down).sum((1, 2)) / (mass * down**2).sum((1, 2))


def coverage(ink: torch.Tensor) -> torch.Tensor:
    """Return the share of each picture that is covered with ink: the thicker the strokes, the more."""
    return _strokes(ink).mean((1, 2, 3))


def _strokes(ink: torch.Tensor) -> torch.Tensor:
    """Return the ink without the grey haze that a small model leaves on the paper."""
    return torch.where(ink < 0.25, 0, ink).clamp(0, 1)


MEASURES = {"slanted": ("slant (pixels sideways per pixel upwards)", slant), "bold": ("share of ink (%)", coverage)}


def build_model(plan: Plan) -> UNet2DConditionModel:
    """Return an untrained UNet; a square of 2 x 2 pixels is one place with four channels."""
    return UNet2DConditionModel(
        sample_size=SIZE // 2,
        in_channels=4,
        out_channels=4,
        block_out_channels=plan.channels,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=CONTEXT,
        attention_head_dim=4,
        norm_num_groups=8,
        num_class_embeds=10,
    )


def predict(
    model: UNet2DConditionModel, noisy: torch.Tensor, time_step: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Return what the model makes of noisy latents; which digit they shall become, it is told as a class."""
    no_prompt = noisy.new_zeros(len(noisy), 1, CONTEXT)
    return model(noisy, time_step, no_prompt, class_labels=labels).sample


def train(model: UNet2DConditionModel, digits: Digits, steps: int, rate: float, plan: Plan, title: str) -> list[float]:
    """Train whatever requires a gradient to undo noise; return the loss of every step."""
    noise_scheduler = DDPMScheduler(**NOISE)
    latents = F.pixel_unshuffle(digits.ink * 2 - 1, 2)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps + 1, pct_start=0.1)
    model.train()
    losses = []
    bar = tqdm(range(steps), desc=title, unit="step", mininterval=0.5)
    for _ in bar:
        chosen = torch.randint(len(latents), (plan.batch,))
        clean, noise = latents[chosen], torch.randn(plan.batch, *latents.shape[1:])
        time_step = torch.randint(NOISE["num_train_timesteps"], (plan.batch,))
        noisy = noise_scheduler.add_noise(clean, noise, time_step)
        target = noise_scheduler.get_velocity(clean, noise, time_step)
        loss = F.mse_loss(predict(model, noisy, time_step, digits.labels[chosen]), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    return losses


@torch.no_grad()
def write(model: UNet2DConditionModel, labels: torch.Tensor, denoising_steps: int, seed: int) -> torch.Tensor:
    """Return a picture for each digit asked for; the same seed always starts from the same noise."""
    model.eval()
    scheduler = DDIMScheduler(**NOISE)
    scheduler.set_timesteps(denoising_steps)
    latents = torch.randn(len(labels), 4, SIZE // 2, SIZE // 2, generator=torch.Generator().manual_seed(seed))
    for time_step in scheduler.timesteps:
        latents = scheduler.step(predict(model, latents, time_step, labels), time_step, latents).prev_sample
    return (F.pixel_shuffle(latents, 2) + 1) / 2


def blend(model: UNet2DConditionModel, plan: Plan, seed: int) -> dict[tuple[float, float], torch.Tensor]:
    """Return the same digits, written with every pair of weights (slanted, bold)."""
    labels = torch.arange(10).repeat(plan.samples)
    pictures = {}
    pairs = [(slanted, bold) for slanted in plan.weights for bold in plan.weights]
    for pair in tqdm(pairs, desc="blending", unit="pair", mininterval=0.5):
        model.set_adapters(list(STYLES), list(pair))
        pictures[pair] = write(model, labels, plan.denoising_steps, seed)
    return pictures


def draw_grid(pictures: dict[tuple[float, float], torch.Tensor], plan: Plan, path: Path, shown: Iterable[int]) -> None:
    """Draw some digits, each once for every pair of weights."""
    figure = plt.figure(figsize=(9.4, 4.8))
    for part, (panel, index) in enumerate(zip(figure.subfigures(1, len(tuple(shown))), shown)):
        axes = panel.subplots(
            len(plan.weights),
            len(plan.weights),
            gridspec_kw={"wspace": 0.06, "hspace": 0.06, "left": 0.13, "right": 0.99, "bottom": 0.12, "top": 0.95},
        )
        for row, bold in enumerate(plan.weights):
            for column, slanted in enumerate(plan.weights):
                axis = axes[row, column]
                axis.imshow(pictures[slanted, bold][index, 0].numpy(), cmap="gray_r", vmin=0, vmax=1)
                axis.set(xticks=[], yticks=[])
                axis.spines[:].set_color("#d9d9d4")
                if row == len(plan.weights) - 1:
                    axis.set_xlabel(f"{slanted:g}", color=COLOURS["slanted"])
                if column == 0:
                    axis.set_ylabel(f"{bold:g}", color=COLOURS["bold"])
        panel.supxlabel("weight of “slanted”", color=COLOURS["slanted"], fontsize=11, y=0.01)
        if part == 0:
            panel.supylabel("weight of “bold”", color=COLOURS["bold"], fontsize=11, x=0.01)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def measure(pictures: dict[tuple[float, float], torch.Tensor], plan: Plan) -> dict[str, list[list[float]]]:
    """Return for each style its measure over its own weight (inner lists), for each weight of the other style."""
    table = {}
    for style, (_, quantity) in MEASURES.items():
        rows = []
        for other in plan.weights:
            pairs = [(own, other) if style == "slanted" else (other, own) for own in plan.weights]
            rows.append([float(quantity(pictures[pair]).mean()) for pair in pairs])
        table[style] = rows
    return table


def draw_measures(
    measured: dict[str, list[list[float]]], wanted: dict[str, dict[str, float]], plan: Plan, path: Path
) -> None:
    """Draw each style's measure over its weight: a line for each weight of the other style."""
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for axis, style, other in zip(axes, STYLES, reversed(STYLES)):
        name, unit = MEASURES[style][0], 1 if style == "slanted" else 100
        for weight, row in zip(plan.weights, measured[style]):
            shade = {"color": COLOURS[style], "alpha": 0.3 + 0.7 * weight}
            axis.plot(plan.weights, [unit * value for value in row], "o-", label=f"{weight:g}", **shade)
        # The curves rise from the lower left: what is written stands in the other two corners.
        for data, value in wanted[style].items():
            side, align = (0.99, "right") if data == "upright" else (0.01, "left")
            axis.axhline(unit * value, color="#8a8f98", linestyle=":", zorder=0)
            place = {"xy": (side, unit * value), "xycoords": ("axes fraction", "data"), "ha": align}
            above = {"xytext": (0, 4), "textcoords": "offset points"}
            axis.annotate(f"{data} digits of the data", **place, **above, color="#6a7078", fontsize=9)
        axis.legend(title=f"weight of “{other}”", frameon=False, loc="lower right", bbox_to_anchor=(1, 0.2), ncols=2)
        axis.set(xlabel=f"weight of “{style}”", ylabel=name)
        axis.margins(y=0.12)
        axis.grid(alpha=0.25)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def print_table(measured: dict[str, list[list[float]]], plan: Plan) -> None:
    """Print the table for a terminal."""
    print(f"\n{'its weight':34}" + "".join(f"{weight:>8g}" for weight in plan.weights))
    for style, other in zip(STYLES, reversed(STYLES)):
        for weight, row in zip(plan.weights, measured[style]):
            if weight in (plan.weights[0], plan.weights[-1]):
                cells = [f"{value:>8.2f}" if style == "slanted" else f"{value:>8.1%}" for value in row]
                print(
                    f"{'slant' if style == 'slanted' else 'ink'}, {f'with “{other}” at {weight:g}':27}"
                    + "".join(cells)
                )


def main() -> None:
    """Run it all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/diffusion_blend"), help="where the results go")
    parser.add_argument("--quick", action="store_true", help="a few steps only, to see that everything works")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    start = time.perf_counter()
    torch.set_num_threads(arguments.threads)
    # Saving an adapter makes diffusers warn of a change of dtype that nobody asked for.
    logging.set_verbosity_error()
    # The second adapter is meant to join the first.
    warnings.filterwarnings("ignore", message="The model carries adapters already")
    plan = QUICK if arguments.quick else FULL
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)

    upright = load_upright()
    styled = {style: restyle(upright, style) for style in STYLES}
    model = build_model(plan)
    losses = {"base": train(model, upright, plan.base_steps, 3e-3, plan, "base, upright digits")}
    model.requires_grad_(False)
    for style in STYLES:
        config = LoraConfig(r=arguments.rank, lora_alpha=arguments.rank, target_modules=TARGETS)
        model.add_adapter(config, adapter_name=style)
        # Alone: what one adapter learns must not count on the other.
        model.set_adapters(style)
        losses[style] = train(model, styled[style], plan.adapter_steps, 1e-2, plan, f"adapter, {style} digits")
        model.save_lora_adapter(arguments.out / style, adapter_name=style)
    trainable = sum(p.numel() for name, p in model.named_parameters() if f".{STYLES[0]}." in name)

    pictures = blend(model, plan, arguments.seed)
    measured = measure(pictures, plan)
    wanted = {
        style: {
            name: float(quantity(digits.ink).mean()) for name, digits in (("upright", upright), (style, styled[style]))
        }
        for style, (_, quantity) in MEASURES.items()
    }
    figures = {
        "seed": arguments.seed,
        "quick": arguments.quick,
        "threads": arguments.threads,
        "plan": asdict(plan),
        "rank": arguments.rank,
        "parameters": {"adapter": trainable, "all": sum(p.numel() for p in model.parameters())},
        "measured": measured,
        "data": wanted,
        "losses": losses,
        "seconds": time.perf_counter() - start,
    }
    (arguments.out / "results.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")
    draw_grid(pictures, plan, arguments.out / "blend.png", shown=(0, 5))
    draw_measures(measured, wanted, plan, arguments.out / "measures.png")
    print_table(measured, plan)
    print(f"{arguments.out / 'blend.png'} and measures.png show it ({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    main()
