"""How much is in memory at a time: of the base weights that are merged or decomposed, one layer's twice, not all."""

import gc

import pytest
import torch
from torch import nn

from peft import LoraConfig, get_peft_model
from peft.tuners.lora import layer as lora_layer
from peft.tuners.lora import olora as lora_olora

LAYERS, WIDTH = 6, 53  # of a size that no other test leaves behind
WEIGHT = WIDTH * WIDTH * 4


def adapted(**options):
    net = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)])
    return get_peft_model(net, LoraConfig(r=2, target_modules=r"\d", init_lora_weights=False, **options))


def weights_in_memory():
    """Storages of at least a weight's size that some tensor is in, in weights."""
    tensors = [item for item in gc.get_objects() if issubclass(type(item), torch.Tensor)]
    dense = [item for item in tensors if item.layout is torch.strided and item.device.type == "cpu"]
    sizes = {item.untyped_storage().data_ptr(): item.untyped_storage().nbytes() for item in dense}
    return sum(size // WEIGHT for size in sizes.values() if size % WEIGHT == 0)


def growth_over_layers(monkeypatch, owner, name, run):
    """How many weights more are in memory at each call of a function than at its first."""
    seen, function = [], getattr(owner, name)

    def spy(*args, **kwargs):
        seen.append(weights_in_memory())
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, spy)
    run()
    assert len(seen) >= LAYERS
    return [count - seen[0] for count in seen]


@pytest.mark.parametrize("safe_merge", [False, True])
def test_merging_and_unloading_needs_one_weight_twice(monkeypatch, safe_merge):
    model = adapted()
    growth = growth_over_layers(
        monkeypatch, lora_layer.Linear, "with_delta", lambda: model.merge_and_unload(safe_merge=safe_merge)
    )
    assert max(growth) <= 2


def test_olora_keeps_nothing_but_the_factors_of_a_decomposition(monkeypatch):
    net = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)])
    config = LoraConfig(r=2, target_modules=r"\d", init_lora_weights="olora")
    growth = growth_over_layers(monkeypatch, lora_olora, "orthonormal_factors", lambda: get_peft_model(net, config))
    assert max(growth) <= 2
