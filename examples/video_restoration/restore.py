"""Restore the held-out frames in a process of its own, from nothing but the files that `run.py` saved."""

import argparse
from pathlib import Path

import torch
from data import carphone_pairs, split
from diffusers import CogVideoXTransformer3DModel
from model import ADAPTER, restore
from safetensors.torch import save_file


def load_model(folder: Path) -> CogVideoXTransformer3DModel:
    """Rebuild the base from its saved weights and put the saved adapter on it."""
    model = CogVideoXTransformer3DModel.from_pretrained(folder / "base")
    # diffusers looks for a pickle in a local folder unless told what to read, and by default for keys that begin
    # with `transformer.`, as pipelines write them; a model's own file has no such prefix. The configuration is in the
    # file's metadata: diffusers hands it to peft with the weights, the copy of the output layer among them.
    model.load_lora_adapter(folder / "adapter", prefix=None, adapter_name=ADAPTER, use_safetensors=True)
    return model


def main() -> None:
    """Read the arguments, restore, save the frames."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the folder that run.py writes to")
    parser.add_argument("--frames", type=int, required=True, help="how many of the held-out frames")
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = load_model(arguments.out)
    held_out = {damage: split(pairs)[1][: arguments.frames] for damage, pairs in carphone_pairs().items()}
    save_file(
        {damage: restore(model, pairs.damaged) for damage, pairs in held_out.items()},
        arguments.out / "restored.safetensors",
    )


if __name__ == "__main__":
    main()
