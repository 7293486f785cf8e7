"""How much is in memory at a time: of the base weights that are merged or decomposed, one layer's twice, not all."""

import gc

import pytest
import torch
from torch import nn

from peft import LoraConfig, PeftModel, get_peft_model, load_peft_weights
from peft.engine import state as engine_state
from peft.tuners.lora import layer as lora_layer
from peft.tuners.lora import olora as lora_olora

LAYERS, WIDTH = 6, 53  # of a size that no other test leaves behind
WEIGHT = WIDTH * WIDTH * 4


def stack():
    return nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)])


def adapted(r=2, **options):
    return get_peft_model(stack(), LoraConfig(r=r, target_modules=r"\d", init_lora_weights=False, **options))


def weights_in_memory():
    """Storages of at least a weight's size that some tensor is in, in weights."""
    tensors = [item for item in gc.get_objects() if type(item) in (torch.Tensor, nn.Parameter)]
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
    config = LoraConfig(r=2, target_modules=r"\d", init_lora_weights="olora")
    growth = growth_over_layers(
        monkeypatch, lora_olora, "orthonormal_factors", lambda: get_peft_model(stack(), config)
    )
    assert max(growth) <= 2


@pytest.fixture
def folder(tmp_path):
    """An adapter whose factors are as large as the weights."""
    adapted(r=WIDTH).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_what_a_file_has_becomes_the_parameters_without_a_copy(monkeypatch, folder, low_cpu_mem_usage):
    def load():
        net.append(PeftModel.from_pretrained(stack(), folder, low_cpu_mem_usage=low_cpu_mem_usage))
        net[0].load_adapter(folder, "other", low_cpu_mem_usage=low_cpu_mem_usage)

    net = []
    growth = growth_over_layers(monkeypatch, engine_state, "_store", load)
    assert max(growth[: 2 * LAYERS]) == 0
    assert {size - growth[2 * LAYERS] for size in growth[2 * LAYERS :]} == {0}
    for name, parameter in net[0].named_parameters():
        if "lora_" in name:
            assert torch.equal(
                parameter, load_peft_weights(folder)[name.replace(".other", "").replace(".default", "")]
            )


def test_parameters_made_of_one_file_of_torch_share_no_memory(folder):
    """Pickled tensors may be views of each other, or of something large."""
    saved = load_peft_weights(folder)
    first, second = [name for name in saved if ".0." in name]
    saved[second] = saved[first]
    large = torch.cat([saved[name] for name in saved if ".1." in name])
    saved |= {name: large[:WIDTH] for name in saved if ".1." in name}
    (folder / "adapter_model.safetensors").unlink()
    torch.save(saved, folder / "adapter_model.bin")
    model = PeftModel.from_pretrained(stack(), folder, is_trainable=True)
    storages = [parameter.untyped_storage() for name, parameter in model.named_parameters() if "lora_" in name]
    assert len({storage.data_ptr() for storage in storages}) == 2 * LAYERS
    assert {storage.nbytes() for storage in storages} == {WEIGHT}


def test_what_was_read_stays_when_the_file_is_written_over(folder):
    path = folder / "adapter_model.safetensors"
    state = load_peft_weights(folder, device="cpu")
    before = {name: value.clone() for name, value in state.items()}
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(bytes(path.stat().st_size // 2))
    assert all(torch.equal(value, before[name]) for name, value in state.items())
    assert not all(torch.equal(value, before[name]) for name, value in load_peft_weights(folder).items())
