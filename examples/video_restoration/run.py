"""Adapt a small video model to a new film three times, and see what becomes of the output layer.

`make demo` runs this file. It trains a base on black-and-white film, adapts it to a damaged colour negative with LoRA
alone, with a copy of the output layer that stays frozen, and with one that trains; saves the last adapter, loads it in
a fresh process, restores frames that no run has seen, and writes a report.
"""

import argparse
import copy
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Before torch starts its threads: on a machine that others use too, threads that spin while they wait slow all down.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from data import HELD_OUT, Pairs, base_pairs, carphone_pairs, negative, psnr, sample_batch, split
from diffusers import CogVideoXTransformer3DModel
from diffusers.utils import logging
from model import ADAPTER, CROP, FRAMES, adapter_config, build_base, restore, start_as_copy
from report import print_table, write_report
from safetensors.torch import load_file
from train import Schedule, train

THREADS = 2


@dataclass(frozen=True)
class Plan:
    """How long to train the base and every adapter, and how many of the held-out frames to restore."""

    base: Schedule
    adapter: Schedule
    frames: int


FULL = Plan(base=Schedule(steps=220, rate=2e-3), adapter=Schedule(steps=200, rate=7e-3), frames=HELD_OUT)
QUICK = Plan(base=Schedule(steps=16, rate=1e-3, batch=2), adapter=Schedule(steps=24, rate=7e-3, batch=2), frames=4)


@dataclass(frozen=True)
class Variant:
    """One of the runs to compare."""

    key: str
    title: str
    copy_output_layer: bool
    freeze_copy: bool


VARIANTS = (
    Variant("lora_alone", "LoRA alone", copy_output_layer=False, freeze_copy=False),
    Variant("copy_frozen", "LoRA + copy, frozen (the defect)", copy_output_layer=True, freeze_copy=True),
    Variant("copy_trained", "LoRA + copy, training", copy_output_layer=True, freeze_copy=False),
)


@dataclass
class Result:
    """What one run has to show for itself."""

    key: str
    title: str
    psnr: dict[str, float]
    colour: dict[str, float]
    trainable: dict[str, int]
    output_layer_moved: float
    seconds: float
    losses: list[float]


def train_base(plan: Plan, seed: int) -> tuple[CogVideoXTransformer3DModel, dict[str, Any]]:
    """Train the base on black-and-white film; return it and how well it undoes pixelation there."""
    film = base_pairs()
    model = build_base(seed)
    start_as_copy(model, sample_batch([film], 48, FRAMES, CROP, torch.Generator().manual_seed(seed))[1])
    losses, seconds = train(model, [film], plan.base, seed, "base, black-and-white film")
    some = film[-plan.frames :]
    figures = {
        "psnr_before": psnr(some.damaged, some.true),
        "psnr_after": psnr(restore(model, some.damaged), some.true),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": seconds,
    }
    return model, figures | {"losses": losses}


def add_adapter(base: CogVideoXTransformer3DModel, variant: Variant, seed: int) -> CogVideoXTransformer3DModel:
    """Put an adapter on a frozen copy of the base, through the door that diffusers offers."""
    model = copy.deepcopy(base).requires_grad_(False)
    torch.manual_seed(seed)
    model.add_adapter(adapter_config(variant.copy_output_layer), adapter_name=ADAPTER)
    if variant.freeze_copy:
        # The defect, by hand: the copies stood in the model and were used, but nothing switched their gradients on.
        for name, parameter in model.named_parameters():
            if ".modules_to_save." in name:
                parameter.requires_grad_(False)
    return model


def run_variant(
    base: CogVideoXTransformer3DModel, variant: Variant, clips: dict[str, tuple[Pairs, Pairs]], plan: Plan, seed: int
) -> tuple[CogVideoXTransformer3DModel, Result, dict[str, torch.Tensor]]:
    """Adapt the base in one way; return the model, its figures and the held-out frames as it restores them."""
    model = add_adapter(base, variant, seed)
    trainable = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    losses, seconds = train(model, [seen for seen, _ in clips.values()], plan.adapter, seed, variant.title)
    restored = {damage: restore(model, unseen.damaged) for damage, (_, unseen) in clips.items()}
    truth = {damage: unseen.true for damage, (_, unseen) in clips.items()}
    result = Result(
        key=variant.key,
        title=variant.title,
        psnr={damage: psnr(restored[damage], truth[damage]) for damage in clips},
        colour={damage: colourfulness(restored[damage]) / colourfulness(truth[damage]) for damage in clips},
        trainable=trainable,
        output_layer_moved=output_layer_moved(base, model),
        seconds=seconds,
        losses=losses,
    )
    return model, result, restored


def colourfulness(frames: torch.Tensor) -> float:
    """Return how far the channels are from grey, on average."""
    return float((frames - frames.mean(1, keepdim=True)).abs().mean())


def output_layer_moved(base: CogVideoXTransformer3DModel, model: CogVideoXTransformer3DModel) -> float:
    """Return by how much the output layer in use differs from the base's, relative to its size."""
    before = base.proj_out.weight.detach()
    return float((model.proj_out.weight.detach() - before).norm() / before.norm())


def restore_in_fresh_process(out: Path, frames: int) -> dict[str, torch.Tensor]:
    """Load the saved base and adapter in a new Python process and return the frames that it restores."""
    script = Path(__file__).with_name("restore.py")
    command = [sys.executable, str(script), "--out", str(out), "--frames", str(frames), "--threads", str(THREADS)]
    subprocess.run(command, check=True)
    return load_file(out / "restored.safetensors")


def main() -> None:
    """Run it all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/video_restoration"), help="where the results go")
    parser.add_argument("--quick", action="store_true", help="a few steps only, to see that everything works")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    start = time.perf_counter()
    # `make` gives every process one thread, which is right for tests that run side by side; this runs alone.
    torch.set_num_threads(THREADS)
    # Saving an adapter makes diffusers warn of a change of dtype that nobody asked for.
    logging.set_verbosity_error()
    plan = QUICK if arguments.quick else FULL
    arguments.out.mkdir(parents=True, exist_ok=True)

    halves = {damage: split(pairs) for damage, pairs in carphone_pairs().items()}
    clips = {damage: (seen, unseen[: plan.frames]) for damage, (seen, unseen) in halves.items()}
    base, base_figures = train_base(plan, arguments.seed)
    base.save_pretrained(arguments.out / "base")
    results, pictures = [], {}
    for variant in VARIANTS:
        model, result, pictures[variant.key] = run_variant(base, variant, clips, plan, arguments.seed)
        results.append(result)
    # The last run is the one to keep: its copy has learnt to paint.
    model.save_lora_adapter(arguments.out / "adapter", adapter_name=ADAPTER)
    again = restore_in_fresh_process(arguments.out, plan.frames)
    same = all(torch.equal(again[damage], frames) for damage, frames in pictures[VARIANTS[-1].key].items())

    held_out = {damage: unseen for damage, (_, unseen) in clips.items()}
    figures = {
        "seed": arguments.seed,
        "quick": arguments.quick,
        "threads": THREADS,
        "cpus": os.cpu_count(),
        "plan": asdict(plan),
        "base": base_figures,
        "psnr_before": {damage: psnr(unseen.damaged, unseen.true) for damage, unseen in held_out.items()},
        "psnr_inverted": {damage: psnr(negative(unseen.damaged), unseen.true) for damage, unseen in held_out.items()},
        "runs": [asdict(result) for result in results],
        "fresh_process_equal": same,
        "seconds": time.perf_counter() - start,
    }
    (arguments.out / "results.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")
    print_table(figures)
    write_report(arguments.out, figures, held_out, pictures)
    print(f"{arguments.out / 'report.html'} shows it ({time.perf_counter() - start:.0f} s)")
    if not same:
        sys.exit("the frames restored in a fresh process differ from those before saving")


if __name__ == "__main__":
    main()
