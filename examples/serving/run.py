"""Serve eight adapters from one model, each request with its own, and see what that costs.

A small language model learns to go on counting by whatever step it is shown. Eight adapters then teach it to count by
ones, by twos, ... by eights from a single number. Eight requests for eight adapters are answered in one batch, and three
ways to serve a queue of requests are timed: one mixed batch, one batch per adapter with a switch between, and eight
merged copies of the model.
"""

import argparse
import copy
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# Before torch starts its threads: on a machine that others use too, threads that spin while they wait slow all down.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import matplotlib
import torch
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from peft import LoraConfig, PeftModel, get_peft_model

matplotlib.use("Agg")  # before pyplot: there may be no screen

import matplotlib.pyplot as plt

NUMBERS = 64
STEPS = range(1, 9)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Plan:
    """How big the model is, how long everything trains, and how often each way of serving is timed."""

    width: int
    base_steps: int
    adapter_steps: int
    queues: tuple[int, ...]
    repeats: int


FULL = Plan(width=256, base_steps=350, adapter_steps=60, queues=(8, 16, 32, 64), repeats=7)
QUICK = Plan(width=96, base_steps=110, adapter_steps=30, queues=(8,), repeats=2)
WAYS = {"mixed": "one mixed batch", "switched": "a batch per adapter, switching", "copies": "eight merged copies"}
COLOURS = {"mixed": "#1b998b", "switched": "#d1495b", "copies": "#8a8f98"}


def name_of(step: int) -> str:
    return f"by_{step}"


def counting(steps: torch.Tensor, length: int) -> torch.Tensor:
    """Numbers modulo 64 from a random start, one row for each step: (rows, length)."""
    start = torch.randint(0, NUMBERS, (len(steps), 1))
    return (start + steps[:, None] * torch.arange(length)) % NUMBERS


def train(model: torch.nn.Module, count: int, rate: float, draw: Callable[[], torch.Tensor], title: str) -> float:
    """Train on what `draw` gives and return the last loss."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=count)
    model.train()
    for _ in tqdm(range(count), desc=title, leave=False):
        rows = draw()
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
    return loss.item()


def build(plan: Plan) -> LlamaForCausalLM:
    """A model that goes on counting by the step that it is shown."""
    config = LlamaConfig(
        hidden_size=plan.width,
        intermediate_size=2 * plan.width,
        num_hidden_layers=4,
        num_attention_heads=4,
        vocab_size=NUMBERS + 1,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=NUMBERS,
    )
    model = LlamaForCausalLM(config)
    train(model, plan.base_steps, 2e-3, lambda: counting(torch.randint(1, 9, (48,)), 16), "Base")
    return model


def teach(model: LlamaForCausalLM, plan: Plan) -> PeftModel:
    """The model with an adapter for each step."""
    config = LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config, adapter_name=name_of(1))
    for step in tqdm(STEPS, desc="Adapters"):
        if step > 1:
            adapted.add_adapter(name_of(step), copy.deepcopy(config))
        adapted.set_adapter(name_of(step))
        train(adapted, plan.adapter_steps, 5e-3, lambda step=step: counting(torch.full((32,), step), 8), name_of(step))
    return adapted.eval()


@torch.no_grad()
def answers(model: PeftModel, start: int = 5, length: int = 8) -> tuple[torch.Tensor, bool]:
    """What the eight adapters say after one number, in one batch; and whether each says the same when asked alone."""
    names = [name_of(step) for step in STEPS]
    prompt = torch.full((len(names), 1), start)
    options = {"max_new_tokens": length - 1, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    together = model.generate(input_ids=prompt, adapter_names=names, **options)
    alone = []
    options["attention_mask"] = options["attention_mask"][:1]
    for name in names:
        model.set_adapter(name)
        alone.append(model.generate(input_ids=prompt[:1], **options)[0])
    return together, torch.equal(together, torch.stack(alone))


def ways_to_serve(model: PeftModel, copies: list[torch.nn.Module]) -> dict[str, Callable[[torch.Tensor], object]]:
    """For each way: a function that answers a queue in which the adapters take turns."""
    count = len(STEPS)

    def mixed(queue: torch.Tensor) -> object:
        return model(input_ids=queue, adapter_names=[name_of(1 + row % count) for row in range(len(queue))])

    def switched(queue: torch.Tensor) -> object:
        for position, step in enumerate(STEPS):
            model.set_adapter(name_of(step))
            model(input_ids=queue[position::count])

    def from_copies(queue: torch.Tensor) -> object:
        for position, merged in enumerate(copies):
            merged(input_ids=queue[position::count])

    return {"mixed": mixed, "switched": switched, "copies": from_copies}


@torch.no_grad()
def time_ways(model: PeftModel, copies: list[torch.nn.Module], plan: Plan) -> dict[str, dict[int, float]]:
    """Requests per second by way and length of the queue. The ways take turns, so that all see the same machine."""
    ways = ways_to_serve(model, copies)
    speeds: dict[str, dict[int, float]] = {way: {} for way in ways}
    for size in tqdm(plan.queues, desc="Serving"):
        queue = counting(torch.randint(1, 9, (size,)), 32)
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for turn in range(plan.repeats + 1):
            for way, serve in ways.items():
                start = time.perf_counter()
                serve(queue)
                if turn:  # the first is for warming up
                    seconds[way].append(time.perf_counter() - start)
        for way in ways:
            speeds[way][size] = size / statistics.median(seconds[way])
    return speeds


def megabytes(tensors) -> float:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e6


def draw(speeds: dict[str, dict[int, float]], memory: dict[str, float], path: Path) -> None:
    """Requests per second over the length of the queue, and the memory that each way needs."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), width_ratios=[3, 2], layout="constrained")
    for way, by_size in speeds.items():
        left.plot(list(by_size), list(by_size.values()), "o-", color=COLOURS[way], label=WAYS[way])
    sizes = list(next(iter(speeds.values())))
    left.set(xlabel="requests in the queue, for eight adapters in turn", ylabel="requests per second", ylim=(0, None))
    left.set_xscale("log", base=2)
    left.set_xticks(sizes, [str(size) for size in sizes])
    left.set_title("Speed")
    left.legend(frameon=False)
    bars = right.barh(list(map(WAYS.get, memory)), list(memory.values()), color=list(map(COLOURS.get, memory)))
    right.bar_label(bars, fmt="%.0f MB", padding=4)
    right.set(xlabel="weights in memory, MB", xlim=(0, max(memory.values()) * 1.25))
    right.set_title("Memory")
    right.invert_yaxis()
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def run(plan: Plan, out: Path, seed: int) -> dict[str, object]:
    torch.manual_seed(seed)
    out.mkdir(parents=True, exist_ok=True)
    model = teach(build(plan), plan)
    model.save_pretrained(out / "adapters")
    spoken, same = answers(model)
    expected = torch.stack([(5 + step * torch.arange(8)) % NUMBERS for step in STEPS])
    right = (spoken == expected).all(1)
    copies = [copy.deepcopy(model).merge_and_unload(adapter_names=[name_of(step)]).eval() for step in STEPS]
    speeds = time_ways(model, copies, plan)
    shared = megabytes(model.parameters())
    memory = {"mixed": shared, "switched": shared, "copies": sum(megabytes(each.parameters()) for each in copies)}
    draw(speeds, memory, out / "serving.png")
    results = {
        "answers": {name_of(step): row.tolist() for step, row in zip(STEPS, spoken)},
        "right": int(right.sum()),
        "same_as_alone": same,
        "requests_per_second": speeds,
        "megabytes": memory,
    }
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    return results


def show(results: dict[str, object]) -> None:
    print("\nEight requests in one batch, each with its own adapter; all start at 5:\n")
    for name, numbers in results["answers"].items():
        print(f"  {name}: {' '.join(f'{number:2d}' for number in numbers)}")
    print(f"\n{results['right']} of {len(STEPS)} count right; the same as alone: {results['same_as_alone']}\n")
    speeds, memory = results["requests_per_second"], results["megabytes"]
    sizes = list(next(iter(speeds.values())))
    heads = "".join(f"{size:>8}" for size in sizes)
    print(f"{'requests per second, queue of':<34}{heads}{'MB':>8}")
    for way, by_size in speeds.items():
        print(f"{WAYS[way]:<34}" + "".join(f"{by_size[size]:>8.0f}" for size in sizes) + f"{memory[way]:>8.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that everything works")
    parser.add_argument("--out", type=Path, default=Path("outputs/serving"), help="folder for the results")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    show(run(QUICK if arguments.quick else FULL, arguments.out, arguments.seed))
    print(f"\nPlot and figures are in {arguments.out}.")


if __name__ == "__main__":
    main()
