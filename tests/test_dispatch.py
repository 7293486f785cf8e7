"""Adapters on models whose weights accelerate keeps on the CPU or on disk until they are used."""

import copy

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from peft import HRAConfig, LoHaConfig, LoraConfig, OFTConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.dispatch import redispatch

pytestmark = pytest.mark.compat

IDS = torch.tensor([[1, 2, 3, 4]])
DISK_MAP = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "disk",
}


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    llama().save_pretrained(folder)
    return folder


def offloaded(where, on_disk, tmp_path):
    if where == "cpu":
        model = cpu_offload(llama(), execution_device="cpu")
        model.hf_device_map = {"": "cpu"}
        return model
    return LlamaForCausalLM.from_pretrained(on_disk, device_map=DISK_MAP, offload_folder=tmp_path / "offload").eval()


CONFIGS = {
    "lora": {},
    "dora": {"use_dora": True},
    "copies": {"modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": [1, 2]},
}


def saved(folder, base, config):
    """Saves an adapter with weights of its own and gives back its output."""
    model = get_peft_model(base, config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model


def lora(name):
    return LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, **CONFIGS[name])


@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("name", CONFIGS)
def test_an_adapter_on_an_offloaded_model(name, where, on_disk, tmp_path):
    expected = saved(tmp_path / "adapter", llama(), lora(name))(IDS).logits
    model = PeftModel.from_pretrained(offloaded(where, on_disk, tmp_path), tmp_path / "adapter")
    torch.testing.assert_close(model(IDS).logits, expected)
    assert not any(tensor.is_meta for tensor in get_peft_model_state_dict(model).values())
    assert any(parameter.is_meta for parameter in model.parameters())
    with model.disable_adapter():
        torch.testing.assert_close(model(IDS).logits, llama()(IDS).logits)
    model.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(llama(), tmp_path / "again")
    torch.testing.assert_close(again(IDS).logits, expected)
    torch.testing.assert_close(model.merge_and_unload()(IDS).logits, expected)


@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("name", CONFIGS)
def test_spreading_the_model_anew(name, where, on_disk, tmp_path):
    expected = saved(tmp_path / "adapter", llama(), lora(name))(IDS).logits
    base = offloaded(where, on_disk, tmp_path)
    model = PeftModel.from_pretrained(base, tmp_path / "adapter", device_map="auto")
    torch.testing.assert_close(model(IDS).logits, expected)
    assert not any(parameter.is_meta for parameter in model.parameters())
    redispatch(model, {"device_map": DISK_MAP, "offload_folder": str(tmp_path / "other")})
    torch.testing.assert_close(model(IDS).logits, expected)
    names = {name for name, parameter in model.named_parameters() if parameter.is_meta}
    assert names and all("layers.1." in name or "lm_head" in name for name in names)
    assert not any(tensor.is_meta for tensor in get_peft_model_state_dict(model).values())
    assert base.hf_device_map == DISK_MAP


def test_without_options_the_model_stays_as_it_is(on_disk, tmp_path):
    saved(tmp_path / "adapter", llama(), lora("lora"))
    model = PeftModel.from_pretrained(offloaded("disk", on_disk, tmp_path), tmp_path / "adapter")
    hooks = {name: module.__dict__.get("_hf_hook") for name, module in model.named_modules()}
    redispatch(model, {})
    assert {name: module.__dict__.get("_hf_hook") for name, module in model.named_modules()} == hooks


def test_going_to_disk_needs_a_folder(tmp_path):
    model = get_peft_model(cpu_offload(llama(), execution_device="cpu"), lora("lora"))
    with pytest.raises(ValueError, match="offload_folder"):
        redispatch(model, {"device_map": DISK_MAP})


def test_weights_on_disk_that_are_not_safetensors_are_not_found_again(tmp_path):
    base = dispatch_model(llama(), DISK_MAP, offload_dir=tmp_path)
    model = get_peft_model(base, lora("lora")).eval()
    expected = model(IDS).logits
    with pytest.raises(ValueError, match="safetensors"):
        redispatch(model, {"device_map": "auto"})
    torch.testing.assert_close(model(IDS).logits, expected)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.lin(x))


@pytest.mark.parametrize(
    "config",
    [
        HRAConfig(target_modules=["lin"], r=2),
        OFTConfig(target_modules=["lin"], oft_block_size=4),
        LoHaConfig(target_modules=["lin"]),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_other_methods(config, tmp_path):
    base, x = Net().eval(), torch.randn(3, 8)
    expected = saved(tmp_path, copy.deepcopy(base), config)(x)
    model = PeftModel.from_pretrained(cpu_offload(base, execution_device="cpu"), tmp_path)
    torch.testing.assert_close(model(x), expected)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), expected)


def test_experts(tmp_path):
    config = MixtralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
    )
    base = MixtralForCausalLM(config).eval()
    options = {"target_modules": [], "target_parameters": ["experts.down_proj", "gate.weight"]}
    expected = saved(tmp_path, copy.deepcopy(base), LoraConfig(init_lora_weights=False, **options))(IDS).logits
    model = PeftModel.from_pretrained(cpu_offload(base, execution_device="cpu"), tmp_path)
    torch.testing.assert_close(model(IDS).logits, expected)


def test_training_an_adapter_on_an_offloaded_model(tmp_path):
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    plain, spread = (
        get_peft_model(llama(), config),
        get_peft_model(cpu_offload(llama(), execution_device="cpu"), config),
    )
    with torch.no_grad():
        for (_, source), (_, target) in zip(plain.named_parameters(), spread.named_parameters()):
            if source.requires_grad:
                target.copy_(source)
    for model in (plain, spread):
        model(input_ids=IDS, labels=IDS).loss.backward()
    for (name, first), (_, second) in zip(plain.named_parameters(), spread.named_parameters()):
        if first.requires_grad:
            torch.testing.assert_close(first.grad, second.grad, msg=name)
