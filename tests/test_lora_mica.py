"""MiCA: only A trains, from zero, on what the base weight uses least."""

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora.mica import minor_directions


class Net(nn.Module):
    """An embedding, a linear layer and one that is left alone."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(1)
        self.table = nn.Embedding(9, 6)
        self.first = nn.Linear(6, 8)
        self.other = nn.Linear(8, 3)
        self.to(dtype)

    def forward(self, ids):
        return self.other(self.first(self.table(ids)).tanh())


KINDS = {
    "linear": (lambda: nn.Linear(6, 8), lambda: torch.randn(3, 6)),
    "conv1d_transformers": (lambda: Conv1D(8, 6), lambda: torch.randn(3, 2, 6)),
    "embedding": (lambda: nn.Embedding(7, 5), lambda: torch.tensor([[0, 3, 6], [1, 1, 2]])),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), lambda: torch.randn(2, 4, 5)),
    "conv2d": (lambda: nn.Conv2d(3, 6, 2, padding_mode="circular", padding=1), lambda: torch.randn(2, 3, 4, 4)),
    "conv3d": (lambda: nn.Conv3d(2, 6, 2), lambda: torch.randn(2, 2, 3, 3, 3)),
}

TRAINS = {"base_model.model.table.lora_embedding_A.default", "base_model.model.first.lora_A.default.weight"}


def config(**options):
    return LoraConfig(
        **{"r": 2, "lora_alpha": 3, "target_modules": ["table", "first"], "init_lora_weights": "mica", **options}
    )


def adapted(model=None, **options):
    return get_peft_model(Net() if model is None else model, config(**options)).eval()


def moved(model):
    """The adapter as after some training."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_A" in name or "lora_embedding_A" in name:
                value.normal_()
    return model


def matrix(layer):
    weight = layer.weight.detach()
    return weight.T if isinstance(layer, (Conv1D, nn.Embedding)) else weight.flatten(1)


def ids_of():
    return torch.tensor([[0, 3, 8], [1, 1, 2], [4, 5, 6]])


def out(model, x=None, **kwargs):
    with torch.no_grad():
        return model(ids_of() if x is None else x, **kwargs)


def training(model):
    return {name for name, value in model.named_parameters() if value.requires_grad}


# ------------------------------------------------------------------------------------------------------- the mathematics


def test_the_minor_directions_of_a_diagonal_matrix():
    weight = torch.diag(torch.tensor([3.0, 1.0, 2.0]))
    assert minor_directions(weight, 2).abs().tolist() == [[0, 0], [0, 1], [1, 0]]  # of 2, then of 1
    assert minor_directions(weight, 3).shape == (3, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer(kind):
    make, inputs = KINDS[kind]
    base, x = make(), inputs()
    before, weight = out(base, x), base.weight.detach().clone()
    model = adapted(nn.Sequential(base), target_modules=["0"])
    layer = model.base_model.model[0]
    A, B = layer.factors("default")
    U, S, _ = torch.linalg.svd(matrix(base), full_matrices=False)
    torch.testing.assert_close(B.flatten(1), U[:, -2:])
    torch.testing.assert_close((matrix(base).T @ B.flatten(1)).norm(dim=0), S[-2:])
    assert not A.any() and A.requires_grad and not B.requires_grad
    assert torch.equal(base.weight, weight)
    assert torch.equal(out(model, x), before)
    torch.testing.assert_close(out(moved(model), x), base(x) + layer.term(x, "default"))
    expected = out(model, x)
    assert not torch.allclose(expected, before)
    model.merge_adapter()
    torch.testing.assert_close(out(model, x), expected, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(base.weight, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(dtype):
    model = get_peft_model(Net(dtype), config(), autocast_adapter_dtype=False)
    factors = [*model.base_model.model.first.factors("default"), *model.base_model.model.table.factors("default")]
    assert {factor.dtype for factor in factors} == {dtype}
    upcast = get_peft_model(Net(dtype), config()).base_model.model.first.factors("default")
    assert {factor.dtype for factor in upcast} == {torch.float32} and not upcast[1].requires_grad


def test_the_name_may_have_capitals():
    assert training(adapted(init_lora_weights="MiCA")) == TRAINS


def test_starting_over_by_hand():
    model = moved(adapted())
    for layer in (model.base_model.model.table, model.base_model.model.first):
        A, B = layer.factors("default")
        before = B.clone()
        B.data.zero_()
        layer.mica_init("default")
        assert not A.any() and torch.equal(B, before)


# --------------------------------------------------------------------------------------------------- B stays as it starts


def test_b_stays_frozen_in_all_steps_of_its_life():
    model = adapted()
    assert training(model) == TRAINS
    model.set_requires_grad("default", False)
    assert training(model) == set()
    model.set_requires_grad("default", True)
    assert training(model) == TRAINS
    model.set_adapter("default")
    assert training(model) == TRAINS
    with model.disable_adapter():
        assert training(model) == set()
    assert training(model) == TRAINS
    model.base_model.disable_adapter_layers()
    model.base_model.enable_adapter_layers()
    assert training(model) == TRAINS
    assert training(copy.deepcopy(model)) == TRAINS
    model.add_adapter("plain", config(init_lora_weights=True))
    model.set_adapter("plain")
    plain = {name.replace("default", "plain") for name in TRAINS}
    assert training(model) == plain | {name.replace("_A", "_B") for name in plain}
    model.set_adapter("default")
    assert training(model) == TRAINS
    model.merge_adapter()
    model.unmerge_adapter()
    assert training(model) == TRAINS
    model.delete_adapter("default")
    model.add_adapter("default", config(init_lora_weights=True))
    model.set_adapter("default")
    assert training(model) == TRAINS | {name.replace("_A", "_B") for name in TRAINS}


def test_a_step_changes_a_alone():
    model = adapted().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(2):
        model(ids_of()).square().sum().backward()
        optimizer.step()
    assert {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])} == TRAINS


def test_saving_and_loading(tmp_path):
    model = moved(adapted())
    assert len(get_peft_model_state_dict(model)) == 4
    model.save_pretrained(tmp_path)
    for options in ({}, {"low_cpu_mem_usage": True}, {"is_trainable": True}):
        loaded = PeftModel.from_pretrained(Net(), tmp_path, **options)
        torch.testing.assert_close(out(loaded), out(model))
        assert training(loaded) == (TRAINS if options.get("is_trainable") else set())
    loaded.load_adapter(tmp_path, "b", is_trainable=True)
    loaded.set_adapter("b")
    assert training(loaded) == {name.replace("default", "b") for name in TRAINS}


def test_a_mixed_batch_is_row_for_row_what_its_adapters_give():
    model = moved(adapted())
    model.add_adapter("wide", config(r=4))
    model.add_adapter("plain", config(init_lora_weights=False))
    moved(model).eval()
    names = ["wide", "plain", "default"]
    mixed = out(model, adapter_names=names)
    for row, name in enumerate(names):
        model.set_adapter(name)
        torch.testing.assert_close(mixed[row], out(model)[row])
    with model.disable_adapter():
        base = out(model)
    torch.testing.assert_close(out(model, adapter_names=["__base__", "wide", "plain"])[0], base[0])


def test_it_compiles_as_one_graph():
    model = moved(adapted(target_modules=["first"]))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(ids_of()), model(ids_of()))


def test_it_can_become_a_plain_adapter():
    assert adapted().supports_lora_conversion()


# -------------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(("target", "rank"), [("table", 6), ("first", 6)])
def test_a_rank_beyond_the_base_weights_is_refused(target, rank):
    adapted(r=rank, target_modules=[target])
    with pytest.raises(ValueError, match=f"{target}: MiCA.*r=7 for the adapter 'default', but there are {rank}"):
        adapted(r=rank + 1, target_modules=[target])


def test_other_dtypes_are_refused_before_anything_is_changed():
    model = Net(torch.float64)
    with pytest.raises(TypeError, match="table: MiCA.*'default'.*float32, float16 or bfloat16, got float64"):
        get_peft_model(model, config())
    assert type(model.table) is nn.Embedding and model.table.weight.requires_grad


def test_other_variants_and_other_layers_are_refused():
    with pytest.raises(ValueError, match="table does not support mica with use_dora"):
        adapted(use_dora=True)
    with pytest.raises(ValueError, match="0 does not support mica"):
        adapted(nn.Sequential(nn.MultiheadAttention(4, 2)), target_modules=["0"])


@pytest.mark.compat
def test_sharing_factors_with_an_embedding_is_refused():
    small = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    with pytest.raises(ValueError, match="lm_head is to share the factors of the embedding.*ensure_weight_tying"):
        adapted(LlamaForCausalLM(small), target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True)


def test_a_base_weight_without_values_leaves_b_random():
    with torch.device("meta"):
        base = Net()
    with pytest.warns(UserWarning, match="table: MiCA decomposes the base weight.*meta device, so B is random"):
        model = get_peft_model(base, config(target_modules=["table"]))
    A, B = model.base_model.model.table.factors("default")
    assert not A.any() and B.any() and not B.requires_grad
    assert get_peft_model(base, config(target_modules=["first"]), low_cpu_mem_usage=True)
