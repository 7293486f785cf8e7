"""One round of measurements with whichever `peft` this interpreter imports; prints a JSON object of seconds by case.

Only public calls are made, so that the same file measures any release.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator

warnings.simplefilter("ignore")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

CASES: dict[str, Callable[[], dict[str, float]]] = {}


def case(function: Callable[[], dict[str, float]]) -> Callable[[], dict[str, float]]:
    CASES[function.__name__] = function
    return function


@contextlib.contextmanager
def timed(times: list[float]) -> Iterator[None]:
    start = time.perf_counter()
    yield
    times.append(time.perf_counter() - start)


def median_of(function: Callable[[], object], repeats: int, warmup: int = 1) -> float:
    """Median seconds of a call."""
    times: list[float] = []
    for _ in range(warmup):
        function()
    for _ in range(repeats):
        with timed(times):
            function()
    return statistics.median(times)


def median_on_fresh(make: Callable[[], object], function: Callable[[object], object], repeats: int) -> float:
    """Median seconds of a call that uses up what it is given; making that is not counted."""
    times: list[float] = []
    for _ in range(repeats + 1):
        subject = make()
        with timed(times):
            function(subject)
    return statistics.median(times[1:])


def stack(layers: int, hidden: int):
    import torch
    from torch import nn

    torch.manual_seed(0)
    return nn.Sequential(*[nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU()) for _ in range(layers)])


def config(**options):
    from peft import LoraConfig

    return LoraConfig(**{"r": 8, "target_modules": r".*\.0", **options})


@case
def importing() -> dict[str, float]:
    """`import peft` in a fresh process, beyond importing torch."""
    code = "import time, torch; t = time.perf_counter(); import peft; print(time.perf_counter() - t)"
    times = [float(subprocess.check_output([sys.executable, "-W", "ignore", "-c", code])) for _ in range(3)]
    return {"import peft": statistics.median(times)}


@case
def injecting() -> dict[str, float]:
    from peft import get_peft_model

    results = {}
    for layers, repeats in ((64, 5), (1000, 3), (4000, 1)):
        times: list[float] = []
        for _ in range(repeats + 1):
            model = stack(layers, 16)
            with timed(times):
                get_peft_model(model, config())
        results[f"get_peft_model, {layers} layers"] = statistics.median(times[1:])
    return results


@case
def switching() -> dict[str, float]:
    from peft import get_peft_model

    model = get_peft_model(stack(1000, 16), config())
    model.add_adapter("other", config())

    def there_and_back() -> None:
        model.set_adapter("other")
        model.set_adapter("default")

    def off_and_on() -> None:
        with model.disable_adapter():
            pass

    return {
        "set_adapter twice, 1000 layers": median_of(there_and_back, 5),
        "disable_adapter and back, 1000 layers": median_of(off_and_on, 5),
    }


@case
def combining() -> dict[str, float]:
    from peft import get_peft_model

    model = get_peft_model(stack(32, 256), config(init_lora_weights=False))
    model.add_adapter("other", config(init_lora_weights=False))
    results = {}
    for combination_type in ("linear", "svd", "ties", "ties_svd"):
        options = {"density": 0.5} if "ties" in combination_type else {}
        times: list[float] = []
        for _ in range(4):
            with timed(times):
                model.add_weighted_adapter(
                    ["default", "other"], [0.5, 0.7], "sum", combination_type=combination_type, **options
                )
            model.delete_adapter("sum")
        results[f"add_weighted_adapter {combination_type}, 32 layers of 256"] = statistics.median(times[1:])
    return results


@case
def loading() -> dict[str, float]:
    from peft import PeftModel, get_peft_model

    with tempfile.TemporaryDirectory() as folder:
        get_peft_model(stack(256, 16), config()).save_pretrained(folder)
        model = PeftModel.from_pretrained(stack(256, 16), folder)
        times: list[float] = []
        for number in range(2, 31):
            with timed(times):
                model.load_adapter(folder, f"number{number}")
        whole = median_on_fresh(lambda: stack(256, 16), lambda base: PeftModel.from_pretrained(base, folder), 5)
    second, thirtieth = statistics.median(times[1:4]), statistics.median(times[-3:])
    return {
        "PeftModel.from_pretrained, 256 layers": whole,
        "load_adapter, the 2nd of 30, 256 layers": second,
        "load_adapter, the 30th of 30, 256 layers": thirtieth,
    }


def training_step(model, x) -> Callable[[], None]:
    import torch

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-3, foreach=True) if parameters else None

    def run() -> None:
        model(x).square().mean().backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return run


def forward_of(model, x, **arguments) -> Callable[[], None]:
    import torch

    def run() -> None:
        with torch.no_grad():
            model(x, **arguments)

    return run


def in_turn(functions: list[Callable[[], None]], repeats: int, warmup: int = 3) -> list[float]:
    """Median seconds of each function; they take turns, so that a machine that slows down slows all."""
    times: list[list[float]] = [[] for _ in functions]
    for round_number in range(repeats + warmup):
        for position, run in enumerate(functions):
            with timed(times[position] if round_number >= warmup else []):
                run()
    return [statistics.median(sink) for sink in times]


def against_the_bare_model(hidden: int, layers: int, rows: int, repeats: int) -> dict[str, float]:
    """Seconds beyond the bare model, of a training step (gradient of the input alone, for the bare one) and a forward."""
    import torch

    from peft import get_peft_model

    x = torch.randn(rows, hidden)
    bare, wrapped = stack(layers, hidden).requires_grad_(False), get_peft_model(stack(layers, hidden), config())
    pairs = {
        "training step": [training_step(bare, x.clone().requires_grad_(True)), training_step(wrapped, x)],
        "forward": [forward_of(bare, x), forward_of(wrapped, x)],
    }
    results = {}
    for name, pair in pairs.items():
        without, with_adapter = in_turn(pair, repeats)
        results[f"{name}, hidden {hidden}: bare model"] = without
        results[f"{name}, hidden {hidden}: overhead"] = with_adapter - without
    return results


def dora_against_lora(hidden: int, layers: int, rows: int, repeats: int) -> dict[str, float]:
    """Seconds that DoRA takes beyond LoRA, of a training step and a forward."""
    import torch

    from peft import get_peft_model

    x = torch.randn(rows, hidden)
    lora, dora = (get_peft_model(stack(layers, hidden), config(use_dora=flag)) for flag in (False, True))
    step = in_turn([training_step(lora, x), training_step(dora, x)], repeats)
    forward = in_turn([forward_of(lora, x), forward_of(dora, x)], repeats)
    return {
        f"DoRA beyond LoRA, training step, hidden {hidden}": step[1] - step[0],
        f"DoRA beyond LoRA, forward, hidden {hidden}": forward[1] - forward[0],
    }


@case
def dora_at_64() -> dict[str, float]:
    return dora_against_lora(hidden=64, layers=16, rows=16, repeats=60)


@case
def dora_at_1024() -> dict[str, float]:
    return dora_against_lora(hidden=1024, layers=6, rows=256, repeats=15)


@case
def mixing() -> dict[str, float]:
    """A batch of 8 sequences in which each has an adapter of its own, and the same batch with one adapter."""
    import torch

    from peft import get_peft_model

    results = {}
    for hidden, layers, tokens, repeats in ((64, 16, 16, 40), (768, 8, 64, 15)):
        model = get_peft_model(stack(layers, hidden), config(init_lora_weights=False), adapter_name="a0")
        for number in range(1, 8):
            model.add_adapter(f"a{number}", config(init_lora_weights=False))
        model.eval()
        x = torch.randn(8, tokens, hidden)
        names = [f"a{number}" for number in range(8)]
        one, mixed = in_turn([forward_of(model, x), forward_of(model, x, adapter_names=names)], repeats)
        results[f"batch of 8 with one adapter, hidden {hidden}"] = one
        results[f"batch of 8 with 8 adapters, hidden {hidden}"] = mixed
    return results


@case
def merging() -> dict[str, float]:
    from peft import get_peft_model

    results = {}
    for layers, hidden in ((256, 64), (16, 1024)):
        model = get_peft_model(stack(layers, hidden), config(init_lora_weights=False))
        merge: list[float] = []
        unmerge: list[float] = []
        for round_number in range(6):
            with timed(merge if round_number else []):
                model.merge_adapter()
            with timed(unmerge if round_number else []):
                model.unmerge_adapter()
        results[f"merge_adapter, {layers} layers of {hidden}"] = statistics.median(merge)
        results[f"unmerge_adapter, {layers} layers of {hidden}"] = statistics.median(unmerge)
    return results


@case
def unloading() -> dict[str, float]:
    from peft import get_peft_model

    def seconds(layers: int, hidden: int, safe_merge: bool) -> float:
        def make():
            return get_peft_model(stack(layers, hidden), config(init_lora_weights=False))

        return median_on_fresh(make, lambda model: model.merge_and_unload(safe_merge=safe_merge), 4)

    return {
        f"merge_and_unload{', safe_merge' * safe_merge}, {layers} layers of {hidden}": seconds(
            layers, hidden, safe_merge
        )
        for layers, hidden in ((1000, 64), (16, 1024))
        for safe_merge in (False, True)
    }


@case
def saving() -> dict[str, float]:
    from peft import get_peft_model

    model = get_peft_model(stack(1000, 64), config())
    with tempfile.TemporaryDirectory() as folder:
        return {"save_pretrained, 1000 layers": median_of(lambda: model.save_pretrained(folder), 5)}


@case
def stepping_at_64() -> dict[str, float]:
    return against_the_bare_model(hidden=64, layers=32, rows=16, repeats=100)


@case
def stepping_at_1024() -> dict[str, float]:
    return against_the_bare_model(hidden=1024, layers=8, rows=128, repeats=30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=sorted(CASES), default=sorted(CASES))
    arguments = parser.parse_args()
    results: dict[str, float] = {}
    for name in arguments.only:
        results |= CASES[name]()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
