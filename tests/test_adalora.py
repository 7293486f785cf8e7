"""AdaLoRA: W' = W + (s/ρ)·B·(A ⊙ E), whose ranks are pruned during training by a budget."""

import copy
import json
import warnings

import pytest
import torch
from stand_ins import TorchLinear
from torch import nn
from torch.testing import assert_close
from transformers import BertConfig, BertForSequenceClassification
from transformers.pytorch_utils import Conv1D

import peft
from peft import AdaLoraConfig, AdaLoraModel, LoraConfig, PeftModel, get_peft_model
from peft.tuners.adalora import AdaLoraLayer, RankAllocator, SVDConv2d, SVDLinear, SVDQuantLinear
from peft.tuners.adalora.allocation import FACTORS, orthogonality_losses
from peft.tuners.lora import LoraLayer


class Net(nn.Module):
    """One layer to adapt, and one that is left alone."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.other = nn.Linear(2, 2)

    def forward(self, x):
        return self.layer(x)


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.last(self.first(x).tanh())


X = torch.linspace(-1, 1, 30).view(5, 6)


def config(**options):
    defaults = {"target_modules": ["layer"], "init_r": 2, "target_r": 1, "total_step": 10}
    return AdaLoraConfig(**{**defaults, **options})


def adapted(layer, **options):
    return get_peft_model(Net(layer), config(**options))


def mlp(seed=0, **options):
    torch.manual_seed(seed)
    return get_peft_model(
        Mlp(), config(**{"target_modules": ["first", "last"], "init_r": 4, "target_r": 2, **options})
    )


def layer_of(model, name="layer"):
    return model.get_base_model().get_submodule(name)


def output(model, x=X):
    with torch.no_grad():
        return model(x)


def set_factors(layer, A, E, B, adapter="default"):
    with torch.no_grad():
        for name, value in zip(FACTORS, (A, E, B)):
            layer._modules[name][adapter].copy_(torch.tensor(value))


def perturb(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))


def train(model, steps, first=0, allocate=True, lr=0.5):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    found = []
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss = (model(X) - X[:, :4].sin()).square().mean()
        loss.backward()
        optimizer.step()
        if allocate:
            model.base_model.update_and_allocate(step)
        found.append(loss.item())
    return found


# ------------------------------------------------------------------------------------------------------- the mathematics


def test_worked_example():
    """A ⊙ E = [[2, 0], [0, 6]], its product with B is [[2, 6], [0, 6], [4, 0]]; s = 4 and ρ = 2 + 1e-5 double it, nearly."""
    model = adapted(nn.Linear(2, 3, bias=False), lora_alpha=4)
    layer = layer_of(model)
    layer.base_layer.weight.data.fill_(1.0)
    set_factors(layer, A=[[1.0, 0.0], [0.0, 2.0]], E=[[2.0], [3.0]], B=[[1.0, 1.0], [0.0, 1.0], [2.0, 0.0]])
    expected = torch.tensor([[2.0, 6.0], [0.0, 6.0], [4.0, 0.0]]) * (4 / (2 + 1e-5))
    assert_close(layer.get_delta_weight("default"), expected)
    assert_close(output(model, torch.tensor([[1.0, 10.0]])), 11 + torch.tensor([[1.0, 10.0]]) @ expected.T)


def test_transformers_conv1d_has_the_update_transposed():
    model = adapted(Conv1D(3, 2), lora_alpha=4, fan_in_fan_out=True)
    layer = layer_of(model)
    set_factors(layer, A=[[1.0, 0.0], [0.0, 2.0]], E=[[2.0], [3.0]], B=[[1.0, 1.0], [0.0, 1.0], [2.0, 0.0]])
    expected = torch.tensor([[2.0, 0.0, 4.0], [6.0, 6.0, 0.0]]) * (4 / (2 + 1e-5))
    assert_close(layer.get_delta_weight("default"), expected)


def test_a_convolution_has_its_window_in_a():
    model = adapted(nn.Conv2d(2, 3, (1, 2), bias=False), lora_alpha=2)
    layer = layer_of(model)
    A = torch.arange(8.0).view(2, 4)
    set_factors(layer, A=A.tolist(), E=[[1.0], [1.0]], B=[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    rows = torch.stack([A[0], A[1], A[0] + A[1]]).view(3, 2, 1, 2)
    assert_close(layer.get_delta_weight("default"), rows * (2 / (2 + 1e-5)))


LAYERS = {
    "linear": (lambda: nn.Linear(6, 8), "SVDLinear", (6,), 8),
    "conv1d_transformers": (lambda: Conv1D(8, 6), "SVDLinear", (6,), 8),
    "embedding": (lambda: nn.Embedding(10, 8), "SVDEmbedding", (10,), 8),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3), "SVDConv1d", (6 * 3,), 8),
    "conv2d": (lambda: nn.Conv2d(6, 8, (3, 2)), "SVDConv2d", (6 * 6,), 8),
    "conv2d in groups": (lambda: nn.Conv2d(6, 8, 3, groups=2), "SVDConv2d", (3 * 9,), 8),
    "conv3d": (lambda: nn.Conv3d(6, 8, 2), "SVDConv3d", (6 * 8,), 8),
}


@pytest.mark.parametrize("make, cls, fan_in, fan_out", LAYERS.values(), ids=LAYERS.keys())
def test_tensors_of_every_kind_of_layer(make, cls, fan_in, fan_out):
    model = adapted(make(), init_r=3)
    layer = layer_of(model)
    assert type(layer).__name__ == cls
    assert repr(layer).startswith(f"adalora.{cls}(")
    shapes = {"lora_A": (3, *fan_in), "lora_E": (3, 1), "lora_B": (fan_out, 3)}
    prefix = "base_model.model.layer"
    saved = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    assert {name: tuple(value.shape) for name, value in saved.items()} == {
        f"{prefix}.{name}": shape for name, shape in shapes.items()
    }
    training = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert training == {f"{prefix}.{name}.default" for name in shapes}
    ranknum = model.get_parameter(f"{prefix}.ranknum.default")
    assert ranknum.tolist() == [3.0]
    assert not ranknum.requires_grad


def test_what_else_is_public_of_a_layer():
    layer = layer_of(adapted(nn.Linear(6, 8), init_r=3, lora_alpha=5))
    assert isinstance(layer, AdaLoraLayer) and isinstance(layer, LoraLayer)
    assert AdaLoraLayer.adapter_layer_names == ("lora_A", "lora_B", "lora_E", "lora_embedding_A", "lora_embedding_B")
    assert AdaLoraLayer.other_param_names == ("r", "lora_alpha", "scaling", "lora_dropout", "ranknum")
    assert (layer.r, layer.lora_alpha, dict(layer.scaling)) == ({"default": 3}, {"default": 5}, {"default": 5})
    assert layer.supports_lora_conversion()


@pytest.mark.parametrize("lora_alpha, scaling", [(8, 8), (1, 1), (0, 3.0), (-2, 3.0)])
def test_scaling_is_alpha_or_else_the_initial_rank(lora_alpha, scaling):
    assert layer_of(adapted(nn.Linear(6, 8), init_r=3, lora_alpha=lora_alpha)).scaling["default"] == scaling
    pruned = {"layer.lora_E": [True, False, False]}
    layer = layer_of(adapted(nn.Linear(6, 8), init_r=3, lora_alpha=lora_alpha, rank_pattern=pruned))
    assert layer.scaling["default"] == scaling


def test_it_starts_as_the_base_model():
    base = Mlp()
    model = get_peft_model(copy.deepcopy(base), config(target_modules=["first", "last"], init_r=64))
    assert torch.equal(output(model), base(X))
    layer = layer_of(model, "first")
    assert not layer.lora_E["default"].any()
    for factor in (layer.lora_A["default"], layer.lora_B["default"]):
        assert 0.015 < factor.std() < 0.025


def test_it_can_start_at_random():
    layer = layer_of(adapted(nn.Linear(60, 80), init_r=50, init_lora_weights=False))
    for name in FACTORS:
        assert 0.7 < layer._modules[name]["default"].std() < 1.3


def test_a_rank_of_zero():
    model = mlp(init_r=0)
    assert {layer.r["default"] for layer in (layer_of(model, "first"), layer_of(model, "last"))} == {0}
    assert torch.equal(output(model), output(model.unload()))


@pytest.mark.parametrize(
    "layer, x",
    [
        (nn.Linear(6, 8), torch.randn(3, 6)),
        (Conv1D(8, 6), torch.randn(3, 6)),
        (nn.Embedding(6, 8), torch.tensor([[1, 5]])),
        (nn.Conv1d(4, 8, 3), torch.randn(2, 4, 7)),
        (nn.Conv2d(4, 8, 3, groups=2, padding=1), torch.randn(2, 4, 5, 5)),
        (nn.Conv2d(4, 8, 3, stride=2, padding_mode="circular", padding=1), torch.randn(2, 4, 5, 5)),
        (nn.Conv3d(4, 8, 2), torch.randn(2, 4, 3, 3, 3)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_layer_of_which_every_rank_was_pruned_gives_what_its_base_gives(layer, x, tmp_path):
    pattern = {"layer.lora_E": [False] * 4}
    model = adapted(copy.deepcopy(layer), init_r=4, init_lora_weights=False, rank_pattern=pattern)
    model.save_pretrained(tmp_path)
    for pruned in (model, PeftModel.from_pretrained(Net(layer), tmp_path, is_trainable=True)):
        assert {tuple(layer_of(pruned).lora_A["default"].shape)[0], layer_of(pruned).r["default"]} == {0}
        found = pruned.train()(x)
        assert torch.equal(found, layer(x))
        found.sum().backward()
        assert layer_of(pruned).lora_E["default"].grad.shape == (0, 1)
        assert torch.equal(pruned.merge_and_unload()(x), layer(x))


def test_dropout_is_of_the_input_of_a():
    model = adapted(nn.Linear(6, 8), lora_dropout=0.5, init_lora_weights=False)
    layer = layer_of(model)
    expected = output(model.eval())
    torch.manual_seed(3)
    found = output(model.train())
    torch.manual_seed(3)
    dropped = nn.functional.dropout(X, 0.5)
    assert_close(found, layer.base_layer(X) + dropped @ layer.get_delta_weight("default").T)
    assert not torch.allclose(found, expected)


def test_entries_of_a_table_are_not_dropped():
    model = adapted(nn.Embedding(10, 8), lora_dropout=0.5, init_lora_weights=False).train()
    ids = torch.arange(10)
    assert torch.equal(output(model, ids), output(model.eval(), ids))


# ------------------------------------------------------------------------------------------------------------- the budget


def test_budget_falls_as_a_cubic():
    model = get_peft_model(
        nn.Sequential(*(nn.Linear(4, 4) for _ in range(4))),
        config(target_modules=list("0123"), init_r=4, target_r=2, tinit=2, tfinal=3, total_step=10),
    )
    allocator = model.base_model.rankallocator
    assert (allocator.init_bgt, allocator.target_bgt) == (16, 8)
    assert [allocator.budget_schedule(step)[0] for step in range(11)] == [16, 16, 16, 12, 9, 8, 8, 8, 8, 8, 8]
    assert [allocator.budget_schedule(step)[1] for step in range(11)] == [False] * 3 + [True] * 8
    allocator.set_total_step(20)
    assert model.peft_config["default"].total_step == 20
    assert allocator.budget_schedule(3)[0] == 14


def test_triplets_are_chosen_every_few_steps():
    model = mlp(deltaT=3, tfinal=2, total_step=12)
    chosen = [step for step in range(13) if model.base_model.rankallocator.budget_schedule(step)[1]]
    assert chosen == [3, 6, 9, 11, 12]


def test_sensitivity_is_smoothed_and_so_is_its_uncertainty():
    model = adapted(nn.Linear(1, 1), init_r=1, beta1=0.75, beta2=0.5)
    layer, allocator = layer_of(model), model.base_model.rankallocator
    set_factors(layer, A=[[2.0]], E=[[-3.0]], B=[[1.0]])
    key = "layer.lora_E.default"
    for gradient, sensitivity, mean, doubt in [(4.0, 12.0, 3.0, 4.5), (0.0, 0.0, 2.25, 3.375)]:
        for name in FACTORS:
            layer._modules[name]["default"].grad = torch.tensor([[gradient]])
        allocator.update_ipt(model.get_base_model())
        assert allocator.ipt[key].item() == sensitivity
        assert allocator.exp_avg_ipt[key].item() == mean
        assert allocator.exp_avg_unc[key].item() == doubt
    assert set(allocator.ipt) == {f"layer.{name}.default" for name in FACTORS}
    layer.lora_E["default"].grad = None  # not used in this step: its sensitivity is 0
    allocator.update_ipt(model.get_base_model())
    assert allocator.exp_avg_ipt[key].item() == 0.75 * 2.25
    allocator.reset_ipt()
    assert allocator.ipt == allocator.exp_avg_ipt == allocator.exp_avg_unc == {}


def scored(model, **scores):
    """The model's allocator, with these scores of the triplets by layer."""
    allocator = model.base_model.rankallocator
    for name, layer in {"first": layer_of(model, "first"), "last": layer_of(model, "last")}.items():
        for factor in FACTORS:
            key = f"{name}.{factor}.default"
            ones = torch.ones_like(layer._modules[factor]["default"])
            allocator.exp_avg_ipt[key] = ones * 0.5
            allocator.exp_avg_unc[key] = ones * 0.0
        allocator.exp_avg_unc[f"{name}.lora_E.default"] = torch.tensor(scores[name]).view(-1, 1) * 2.0
        layer.lora_E["default"].data.fill_(7.0)
    return allocator


def test_the_least_important_triplets_are_pruned():
    model = mlp()
    allocator = scored(model, first=[5.0, 1.0, 8.0, 2.0], last=[3.0, 4.0, 7.0, 6.0])
    pattern = allocator.mask_to_budget(model.get_base_model(), 5)
    assert pattern == {
        "first.lora_E.default": [True, False, True, False],
        "last.lora_E.default": [False, True, True, True],
    }
    assert layer_of(model, "first").lora_E["default"].view(-1).tolist() == [7, 0, 7, 0]
    assert layer_of(model, "last").lora_E["default"].view(-1).tolist() == [0, 7, 7, 7]


def test_a_triplet_counts_by_all_its_parts():
    model = mlp()
    allocator = scored(model, first=[1.0] * 4, last=[1.0] * 4)
    # The mean over a row of A, and over a column of B.
    allocator.exp_avg_unc["first.lora_A.default"][1] = torch.tensor([6.0, 0, 0, 0, 0, 0])
    allocator.exp_avg_unc["last.lora_B.default"][:, 3] = torch.tensor([0, 0, 4.0, 0])
    pattern = allocator.mask_to_budget(model.get_base_model(), 2)
    assert pattern == {
        "first.lora_E.default": [False, True, False, False],
        "last.lora_E.default": [False, False, False, True],
    }


@pytest.mark.parametrize("budget", [8, 9, 100])
def test_nothing_is_pruned_within_the_budget(budget):
    model = mlp()
    allocator = scored(model, first=[0.0] * 4, last=[0.0] * 4)
    pattern = allocator.mask_to_budget(model.get_base_model(), budget)
    assert set(map(tuple, pattern.values())) == {(True,) * 4}
    assert layer_of(model, "first").lora_E["default"].all()


def test_what_is_not_a_number_prunes_nothing():
    model = mlp()
    allocator = scored(model, first=[float("nan")] * 4, last=[1.0, float("nan"), 1.0, 2.0])
    pattern = allocator.mask_to_budget(model.get_base_model(), 2)
    assert set(map(tuple, pattern.values())) == {(True,) * 4}
    assert layer_of(model, "first").lora_E["default"].all()


def test_a_pattern_is_applied_by_either_name():
    model = mlp()
    allocator = scored(model, first=[1.0] * 4, last=[1.0] * 4)
    pattern = {"first.lora_E": [False, True, True, True], "last.lora_E.default": [True, True, False, False]}
    allocator.mask_using_rank_pattern(model.get_base_model(), pattern)
    assert layer_of(model, "first").lora_E["default"].view(-1).tolist() == [0, 7, 7, 7]
    assert layer_of(model, "last").lora_E["default"].view(-1).tolist() == [7, 7, 0, 0]
    allocator.mask_using_rank_pattern(model.get_base_model(), None)
    assert layer_of(model, "first").lora_E["default"].view(-1).tolist() == [0, 7, 7, 7]
    with pytest.raises(ValueError, match="first has 3 entries, and the adapter 'default' started with rank 4"):
        allocator.mask_using_rank_pattern(model.get_base_model(), {"first.lora_E": [True] * 3})


def kept(model):
    pattern = model.peft_config["default"].rank_pattern
    return None if pattern is None else sum(map(sum, pattern.values()))


def nonzero(model):
    return sum(int(layer_of(model, name).lora_E["default"].count_nonzero()) for name in ("first", "last"))


def test_training_spends_the_budget():
    model = mlp(tinit=2, tfinal=3, total_step=12, orth_reg_weight=0.1)
    losses = train(model, 3)
    assert kept(model) is None
    budgets = []
    for step in range(3, 10):
        losses += train(model, 1, first=step)
        budgets.append(kept(model))
        assert nonzero(model) == kept(model)
    assert budgets == [model.base_model.rankallocator.budget_schedule(step)[0] for step in range(3, 10)]
    assert budgets[0] > budgets[-1] == 4
    assert model.base_model.rankallocator.exp_avg_ipt == {}
    pattern = copy.deepcopy(model.peft_config["default"].rank_pattern)
    assert set(pattern) == {"first.lora_E", "last.lora_E"}
    losses += train(model, 3, first=10)
    assert model.peft_config["default"].rank_pattern == pattern
    assert nonzero(model) == 4
    assert losses[-1] < losses[0]


def test_the_target_can_be_the_initial_rank():
    model = mlp(init_r=2, target_r=2, total_step=6, tfinal=1)
    train(model, 6)
    assert kept(model) == nonzero(model) == 4


def test_the_last_choice_needs_importances():
    model = mlp(total_step=6)
    train(model, 1, first=6)  # as after an interruption: there is nothing to choose by
    assert kept(model) is None
    assert nonzero(model) == 8


# --------------------------------------------------------------------------------------------------------- the penalty


def test_penalty_is_the_distance_from_orthogonality():
    layer = layer_of(adapted(nn.Linear(2, 3)))
    set_factors(layer, A=[[1.0, 0.0], [0.0, 2.0]], E=[[0.0], [0.0]], B=[[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    assert [loss.item() for loss in orthogonality_losses(layer, "default")] == [3.0, 0.0]


IDS, LABELS = torch.arange(10).view(2, 5), torch.tensor([0, 1])


def bert(**options):
    torch.manual_seed(0)
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    base = BertForSequenceClassification(BertConfig(**size, vocab_size=12)).eval()
    options = {"target_modules": ["query", "value"], "init_r": 3, "task_type": "SEQ_CLS", **options}
    return base, get_peft_model(copy.deepcopy(base), config(**options)).eval()


def loss_of(model, **options):
    return model(input_ids=IDS, labels=LABELS, **options).loss


@pytest.mark.compat
def test_the_loss_has_the_penalty():
    base, model = bert(orth_reg_weight=0.3)
    layers = [module for module in model.modules() if isinstance(module, AdaLoraLayer)]
    assert len(layers) == 2
    penalties = []
    for layer in layers:
        A, B = layer.lora_A["default"], layer.lora_B["default"]
        penalties += [(A @ A.T - torch.eye(3)).norm(), (B.T @ B - torch.eye(3)).norm()]
    expected = loss_of(base) + 0.3 * sum(penalties) / 4
    for mode in (True, False):
        model.train(mode)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        found = loss_of(model)
        assert_close(found, expected)
    found.backward()
    assert layers[0].lora_A["default"].grad.abs().sum() > 0


@pytest.mark.compat
@pytest.mark.parametrize("options", [{"task_type": None}, {"inference_mode": True}], ids=str)
def test_there_is_no_penalty_where_nothing_is_asked_to_train(options):
    base, model = bert(**options)
    assert_close(loss_of(model), loss_of(base))


@pytest.mark.compat
def test_there_is_no_penalty_on_what_is_not_used():
    base, model = bert()
    assert loss_of(model) > loss_of(base) + 0.1
    with model.disable_adapter():
        assert torch.equal(loss_of(model), loss_of(base))
        assert not loss_of(model).requires_grad or model.training
    assert model(input_ids=IDS).loss is None
    assert torch.is_tensor(model(input_ids=IDS, return_dict=False)[0])


# ------------------------------------------------------------------------------------------------------- several adapters


def test_one_adapter_is_made_to_train():
    model = mlp()
    before = dict(model.named_parameters())
    with pytest.raises(ValueError, match=r"\['default', 'other'\].*inference_mode=True"):
        model.add_adapter("other", config(target_modules=["first"]))
    assert list(model.peft_config) == ["default"]
    assert dict(model.named_parameters()).keys() == before.keys()
    model.add_adapter("other", config(target_modules=["first"], inference_mode=True))
    assert model.base_model.trainable_adapter_name == "default"


def test_pruning_follows_the_adapter_that_trains():
    model = mlp()
    model.add_adapter("other", config(target_modules=["first"], init_r=3, inference_mode=True))
    first = model.base_model.rankallocator
    assert first.init_bgt == 8
    model.set_adapter("other")
    assert model.base_model.trainable_adapter_name == "other"
    assert model.base_model.rankallocator.init_bgt == 3
    train(model, 4)
    assert model.peft_config["default"].rank_pattern is None
    assert list(model.peft_config["other"].rank_pattern) == ["first.lora_E"]
    model.set_adapter("default")
    assert model.base_model.rankallocator is first
    model.set_adapter("other", inference_mode=True)
    assert model.base_model.trainable_adapter_name == "default"
    model.delete_adapter("default")
    assert model.base_model.trainable_adapter_name is None
    assert model.base_model.rankallocator is None


def test_a_mixed_batch_with_pruned_ranks():
    model = mlp(init_lora_weights=False)
    pattern = {"first.lora_E": [True, False, False, True], "last.lora_E": [False] * 4}
    model.add_adapter(
        "other",
        config(target_modules=["first", "last"], inference_mode=True, init_lora_weights=False, rank_pattern=pattern),
    )
    model.eval()
    rows = ["other", "__base__", "default", "other", "default"]
    found = model(X, adapter_names=rows)
    for row, name in enumerate(rows):
        if name == "__base__":
            with model.disable_adapter():
                assert_close(found[row], model(X)[row])
        else:
            model.set_adapter(name)
            assert_close(found[row], model(X)[row])


def test_beside_adapters_of_other_methods():
    torch.manual_seed(0)
    model = get_peft_model(Mlp(), LoraConfig(target_modules=["first"], init_lora_weights=False), "lora", mixed=True)
    pattern = {"first.lora_E": [True, False, True, False], "last.lora_E": [True] * 4}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.add_adapter(
            "ada", config(target_modules=["first", "last"], init_lora_weights=False, rank_pattern=pattern)
        )
    first = model.base_model.model.first
    assert isinstance(first, SVDLinear) and isinstance(first.base_layer, LoraLayer)
    assert not isinstance(first.base_layer, AdaLoraLayer)
    assert (first.r, layer_of_mixed(model, "last").r) == ({"ada": 2}, {"ada": 4})
    base = first.get_base_layer()
    model.set_adapter(["lora", "ada"])
    both = output(model)
    hidden = (
        X @ (base.weight + first.get_delta_weight("ada") + first.base_layer.get_delta_weight("lora")).T + base.bias
    )
    last = layer_of_mixed(model, "last")
    weight = last.base_layer.weight + last.get_delta_weight("ada")
    assert_close(both, hidden.tanh() @ weight.T + last.base_layer.bias)
    state = peft.get_peft_model_state_dict(model, adapter_name="ada")
    assert state["base_model.model.first.lora_E"].shape == (2, 1)
    assert_close(output(model.merge_and_unload()), both)


def layer_of_mixed(model, name):
    return model.base_model.model.get_submodule(name)


# ------------------------------------------------------------------------------------------------------------------- files


@pytest.fixture
def trained():
    model = mlp(tfinal=1, total_step=5)
    perturb(model)
    train(model, 6, lr=0.01)
    return model.eval()


def test_pruned_ranks_are_not_saved(trained, tmp_path):
    pattern = copy.deepcopy(trained.peft_config["default"].rank_pattern)
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    trained.save_pretrained(tmp_path)
    assert trained.peft_config["default"].rank_pattern == pattern
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())
    assert json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"] == pattern
    state = peft.load_peft_weights(tmp_path)
    for name in ("first", "last"):
        ranks, rows = sum(pattern[f"{name}.lora_E"]), torch.tensor(pattern[f"{name}.lora_E"])
        assert 0 < ranks < 4
        layer, prefix = layer_of(trained, name), f"base_model.model.{name}"
        assert torch.equal(state[f"{prefix}.lora_A"], layer.lora_A["default"][rows])
        assert torch.equal(state[f"{prefix}.lora_E"], layer.lora_E["default"][rows])
        assert torch.equal(state[f"{prefix}.lora_B"], layer.lora_B["default"][:, rows])


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("name", ["default", "other"])
def test_pruned_adapters_are_loaded(trained, tmp_path, name, low_cpu_mem_usage):
    trained.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(
        Mlp(), tmp_path, adapter_name=name, low_cpu_mem_usage=low_cpu_mem_usage, is_trainable=True
    )
    assert_close(output(loaded), output(trained))
    assert not [key for key, value in loaded.state_dict().items() if value.is_meta]
    pattern = trained.peft_config["default"].rank_pattern
    for layer_name in ("first", "last"):
        layer = layer_of(loaded, layer_name)
        assert layer.r == {name: sum(pattern[f"{layer_name}.lora_E"])}
        assert layer.lora_A[name].shape[0] == layer.r[name]
        assert layer.ranknum[name].tolist() == [4.0]
        assert layer.lora_A[name].requires_grad
    again = peft.get_peft_model_state_dict(loaded, adapter_name=name)
    assert all(torch.equal(value, again[key]) for key, value in peft.load_peft_weights(tmp_path).items())


def test_an_adapter_of_which_nothing_is_left(tmp_path):
    model = mlp(init_lora_weights=False)
    model.peft_config["default"].rank_pattern = {"first.lora_E": [False] * 4, "last.lora_E": [True] * 4}
    model.base_model.rankallocator.mask_using_rank_pattern(
        model.get_base_model(), model.peft_config["default"].rank_pattern
    )
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Mlp(), tmp_path)
    assert layer_of(loaded, "first").lora_A["default"].shape == (0, 6)
    assert_close(output(loaded), output(model))
    loaded.merge_adapter()
    assert_close(output(loaded), output(model))


def test_a_pruned_state_goes_back_into_the_whole_adapter(trained):
    expected, state = output(trained), peft.get_peft_model_state_dict(trained)
    perturb(trained)
    result = peft.set_peft_model_state_dict(trained, state)
    assert not [key for key in result.missing_keys if "lora_" in key]
    assert layer_of(trained, "first").lora_A["default"].shape == (4, 6)
    assert_close(output(trained), expected)
    trained.peft_config["default"].rank_pattern = None
    with pytest.raises(RuntimeError, match="first.lora_A.*size mismatch|size mismatch.*first.lora_A"):
        peft.set_peft_model_state_dict(trained, state)


def test_a_reloaded_adapter_can_be_pruned_further(trained, tmp_path):
    trained.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Mlp(), tmp_path, is_trainable=True)
    before = copy.deepcopy(loaded.peft_config["default"].rank_pattern)
    present = sum(map(sum, before.values()))
    assert loaded.base_model.rankallocator.init_bgt == 8
    loaded.peft_config["default"].target_r = 1
    loaded.base_model.rankallocator.target_bgt = 2
    train(loaded, 6, lr=0.01)
    after = loaded.peft_config["default"].rank_pattern
    assert kept(loaded) == nonzero(loaded) == 2 < present
    # In terms of the ranks that it started with, of which it still has some.
    for key, ranks in after.items():
        assert len(ranks) == 4
        assert not any(keep and not had for keep, had in zip(ranks, before[key]))
    loaded.save_pretrained(tmp_path / "again")
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(Mlp(), tmp_path / "again")
    assert_close(output(again), output(loaded))
    assert sum(layer_of(again, name).r["default"] for name in ("first", "last")) == 2
    assert {layer_of(again, name).ranknum["default"].item() for name in ("first", "last")} == {4.0}


def test_an_adapter_that_was_not_pruned_is_saved_whole(tmp_path):
    model = mlp(init_lora_weights=False)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"] is None
    torch.manual_seed(0)
    assert torch.equal(output(PeftModel.from_pretrained(Mlp(), tmp_path)), output(model))


def test_pruned_ranks_can_be_taken_out(trained):
    expected, pattern = output(trained), trained.peft_config["default"].rank_pattern
    saved = peft.get_peft_model_state_dict(trained)
    trained.base_model.resize_modules_by_rank_pattern(pattern, "default")
    layer = layer_of(trained, "first")
    assert layer.r["default"] == len(layer.lora_A["default"]) == sum(pattern["first.lora_E"])
    assert layer.lora_A["default"].requires_grad
    assert_close(output(trained), expected)
    again = peft.get_peft_model_state_dict(trained)
    assert again.keys() == saved.keys()
    assert all(torch.equal(again[key], saved[key]) for key in saved)
    trained.base_model.resize_modules_by_rank_pattern({"first.lora_E": [False] * 4}, "default")
    assert layer.lora_A["default"].shape == (0, 6)


@pytest.mark.parametrize("suffix", ["", ".default"])
def test_a_state_dict_can_be_resized(suffix):
    model = mlp(init_lora_weights=False)
    prefix = "base_model.model.first"
    state = {f"{prefix}.{name}{suffix}": layer_of(model, "first")._modules[name]["default"] for name in FACTORS}
    pattern = {"first.lora_E": [True, False, False, False]}
    cut = model.base_model.resize_state_dict_by_rank_pattern(pattern, state, "default")
    assert {key: tuple(value.shape) for key, value in cut.items()} == {
        f"{prefix}.lora_A{suffix}": (1, 6),
        f"{prefix}.lora_E{suffix}": (1, 1),
        f"{prefix}.lora_B{suffix}": (8, 1),
    }


def test_copies_of_a_trained_model_go_on_by_themselves(trained):
    twin = copy.deepcopy(trained)
    assert twin.base_model.rankallocator is not trained.base_model.rankallocator
    assert twin.base_model.rankallocator.peft_config is twin.peft_config["default"]
    before = copy.deepcopy(trained.peft_config["default"].rank_pattern)
    twin.base_model.rankallocator.target_bgt = 2
    train(twin, 6, lr=0.01)
    assert kept(twin) == 2
    assert trained.peft_config["default"].rank_pattern == before


# ---------------------------------------------------------------------------------------------------------- configuration


def test_defaults_of_the_configuration():
    found = AdaLoraConfig(total_step=1)
    assert found.peft_type == "ADALORA"
    assert (found.target_r, found.init_r, found.tinit, found.tfinal, found.deltaT) == (8, 12, 0, 0, 1)
    assert (found.beta1, found.beta2, found.orth_reg_weight, found.rank_pattern) == (0.85, 0.85, 0.5, None)


@pytest.mark.parametrize(
    "options, problem",
    [
        ({"total_step": None}, "total_step.*None"),
        ({"total_step": 0}, "total_step.*0"),
        ({"orth_reg_weight": -0.1}, "orth_reg_weight.*-0.1"),
        ({"tinit": 4, "tfinal": 6}, "tinit=4 is not before .* 10 - 6"),
        ({"use_dora": True}, "use_dora"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "loftq_config"),
        ({"target_modules": "layer", "layers_to_transform": [0]}, "layers_to_transform"),
        ({"layers_pattern": "h"}, "layers_pattern='h'"),
    ],
    ids=str,
)
def test_options_that_make_no_sense(options, problem):
    with pytest.raises(ValueError, match=problem):
        config(**options)


@pytest.mark.parametrize(
    "options, problem",
    [
        ({"r": 4}, "r=4 has no effect.*init_r=2"),
        ({"use_rslora": True}, "no effect on AdaLoRA: use_rslora=True"),
        ({"alpha_pattern": {"x": 1}}, r"no effect on AdaLoRA: alpha_pattern=\{'x': 1\}"),
        ({"init_lora_weights": "gaussian"}, "no effect on AdaLoRA: init_lora_weights='gaussian'"),
    ],
    ids=str,
)
def test_options_without_effect_are_named(options, problem):
    with pytest.warns(UserWarning, match=problem):
        config(**options)


@pytest.mark.parametrize("beta", ["beta1", "beta2"])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_betas_are_between_0_and_1(beta, value):
    base = Mlp()
    with pytest.raises(AssertionError, match=f"{beta} .*{value}"):
        get_peft_model(base, config(target_modules=["first"], **{beta: value}))
    assert isinstance(base.first, nn.Linear)
    get_peft_model(base, config(target_modules=["first"], inference_mode=True, **{beta: value}))
    with pytest.raises(AssertionError, match=beta):
        RankAllocator(base, config(**{beta: value}), "default")


def test_errors_of_the_layer():
    with pytest.raises(ValueError, match="rank of SVDLinear must not be negative, got r=-1 for the adapter 'default'"):
        adapted(nn.Linear(2, 2), init_r=-1)
    with pytest.raises(ValueError, match="MultiheadAttention"):
        adapted(nn.MultiheadAttention(4, 2))


def test_errors_of_training():
    model = mlp()
    with pytest.raises(TypeError, match="'default' has a gradient"):
        model.base_model.update_and_allocate(1)
    model = mlp(inference_mode=True)
    with pytest.raises(ValueError, match=r"\['default'\] were made for inference"):
        model.base_model.update_and_allocate(1)


def test_what_is_not_supported():
    model = mlp()
    with pytest.raises(TypeError, match="convert_to_lora"):
        model.add_weighted_adapter(["default"], [1.0], "new")

    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Module()
            self.inner.table = nn.Parameter(torch.ones(2, 2))

    with pytest.raises(ValueError, match="'table' of 'inner'"):
        get_peft_model(Bare(), AdaLoraConfig(total_step=2, target_modules=[], target_parameters=["inner.table"]))


def test_tied_adapters_are_refused_by_a_warning():
    model = AdaLoraModel(Mlp(), config(target_modules=["first"]), "default")
    with pytest.warns(UserWarning, match="AdaLoraModel cannot keep adapters of tied modules tied"):
        model._add_targets_to_tie(config(), ["first"])


@pytest.mark.stand_in
def test_a_layer_of_gptq():
    base = TorchLinear(torch.nn.Linear(6, 8), group_size=3)
    layer = SVDQuantLinear(base, "default", config(init_lora_weights=False), r=2, lora_alpha=4)
    x = torch.randn(5, 6)
    found = layer(x)
    assert_close(found, layer.base_layer(x) + x @ layer.get_delta_weight("default").T)
    found.sum().backward()
    assert layer.lora_E["default"].grad is not None
    with pytest.raises(NotImplementedError, match="its weight is kept by gptq, which can only be read"):
        layer.merge(adapter_names=["default"])


def test_public_names():
    assert issubclass(SVDConv2d, AdaLoraLayer)
    assert peft.PEFT_TYPE_TO_TUNER_MAPPING["ADALORA"] is AdaLoraModel
    assert peft.PEFT_TYPE_TO_MIXED_MODEL_MAPPING["ADALORA"] is AdaLoraModel
    assert peft.PEFT_TYPE_TO_PREFIX_MAPPING["ADALORA"] == "lora_"
