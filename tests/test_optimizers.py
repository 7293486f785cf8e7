"""LoRA+, LoRA-FA and Riemannian preconditioning: what each does with the factors of LoRA in a step."""

import copy
import sys
import types
import warnings

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from peft import LoraConfig, get_peft_model
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer, create_riemannian_optimizer
from peft.optimizers.lorafa import LoraFAOptimizer, paired, projected
from peft.optimizers.riemannian import precondition


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(10, 6)
        self.first = nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8)
        self.last = nn.Linear(8, 4)

    def forward(self, x):
        return self.last(self.norm(self.first(self.emb(x))).relu())


TOKENS = torch.arange(20).view(4, 5) % 10


def adapted(**options):
    torch.manual_seed(0)
    config = {"r": 3, "lora_alpha": 6, "target_modules": ["first", "last"], "init_lora_weights": False}
    return get_peft_model(Net(), LoraConfig(**{**config, **options}))


def loss(model):
    return model(TOKENS).square().mean()


def losses(model, optimizer, steps=8):
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        found.append(loss(model))
        found[-1].backward()
        optimizer.step()
    return [value.item() for value in found]


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(before, model):
    return {name for name, tensor in model.state_dict().items() if not torch.equal(before[name], tensor)}


def factors(model, layer, adapter="default"):
    module = model.get_base_model().get_submodule(layer)
    return module.lora_A[adapter].weight, module.lora_B[adapter].weight


def groups(model, optimizer):
    names = {id(parameter): name.removeprefix("base_model.model.") for name, parameter in model.named_parameters()}
    return [
        (group["lr"], group["weight_decay"], [names[id(parameter)] for parameter in group["params"]])
        for group in optimizer.param_groups
    ]


CREATE = {
    "loraplus": lambda model: create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=4.0),
    "lorafa": lambda model: create_lorafa_optimizer(model, 3, 6, 2e-2),
    "riemannian": lambda model: create_riemannian_optimizer(model, torch.optim.AdamW, lr=1e-2),
}
TARGETS = {
    "linear": {},
    "dora": {"use_dora": True},
    "bias of B": {"lora_bias": True},
    "copies and biases": {"modules_to_save": ["norm"], "bias": "lora_only"},
    "embedding": {"target_modules": ["emb", "first"], "init_lora_weights": True},
}


@pytest.mark.parametrize("options", TARGETS.values(), ids=TARGETS.keys())
@pytest.mark.parametrize("create", CREATE.values(), ids=CREATE.keys())
def test_training_decreases_the_loss_and_changes_what_trains(create, options):
    model = adapted(**options)
    optimizer = create(model)
    assert isinstance(optimizer, torch.optim.Optimizer)
    before, training = state(model), {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = losses(model, optimizer)
    assert found[-1] < 0.95 * found[0]
    assert changed(before, model) == training


@pytest.mark.parametrize("create", CREATE.values(), ids=CREATE.keys())
def test_a_saved_state_is_gone_on_from(create):
    model = adapted()
    optimizer = create(model)
    losses(model, optimizer, 3)
    other = copy.deepcopy(model)
    fresh = create(other)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert losses(other, fresh) == losses(model, optimizer)


# --------------------------------------------------------------------------------------------------------------- LoRA+


def loraplus(model, cls=torch.optim.AdamW, **options):
    return create_loraplus_optimizer(model, cls, lr=0.01, loraplus_lr_ratio=16, **options)


def test_loraplus_lets_b_learn_faster():
    model = adapted()
    optimizer = loraplus(model, weight_decay=0.5, loraplus_weight_decay=0.1)
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults["lr"] == 0.01
    assert optimizer.defaults["weight_decay"] == 0.5
    assert groups(model, optimizer) == [
        (0.01, 0.1, ["first.lora_A.default.weight", "last.lora_A.default.weight"]),
        (1e-6, 0.1, []),
        (0.16, 0.1, ["first.lora_B.default.weight", "last.lora_B.default.weight"]),
        (0.16, 0.0, []),
    ]


def test_loraplus_moves_each_factor_by_its_own_rate():
    model = adapted()
    optimizer = loraplus(model, torch.optim.SGD)
    before = state(model)
    loss(model).backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = 0.16 if "lora_B" in name else 0.01
            assert_close(parameter.detach(), before[name] - rate * parameter.grad)


def test_loraplus_biases_norms_and_embeddings_have_rates_of_their_own():
    model = adapted(target_modules=["emb", "first"], bias="lora_only", modules_to_save=["norm", "last"])
    assert groups(model, loraplus(model, loraplus_weight_decay=0.1, loraplus_lr_embedding=0.5)) == [
        (0.01, 0.1, ["first.lora_A.default.weight", "last.modules_to_save.default.weight"]),
        (0.5, 0.1, ["emb.lora_embedding_A.default", "emb.lora_embedding_B.default"]),
        (0.16, 0.1, ["first.lora_B.default.weight"]),
        (
            0.16,
            0.0,
            [
                "first.base_layer.bias",
                *(f"{name}.modules_to_save.default.{kind}" for name, kind in [("norm", "weight"), ("norm", "bias")]),
                "last.modules_to_save.default.bias",
            ],
        ),
    ]


def test_loraplus_takes_what_trains_only():
    model = adapted()
    model.add_adapter("other", LoraConfig(target_modules=["first"]))
    names = [name for _, _, names in groups(model, loraplus(model)) for name in names]
    assert len(names) == 4
    assert not any("other" in name for name in names)


@pytest.mark.parametrize("name", ["Adam8bit", "AdamW8bit", "PagedAdam8bit", "PagedAdamW8bit", "AdamW"])
def test_loraplus_keeps_the_state_of_embeddings_in_32_bits(name, monkeypatch):
    noted = []
    manager = types.SimpleNamespace(register_module_override=lambda *args: noted.append(args))
    owner = types.SimpleNamespace(get_instance=lambda: manager)
    package = types.ModuleType("bitsandbytes")
    package.optim = types.SimpleNamespace(GlobalOptimManager=owner)
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    model = adapted()
    loraplus(model, type(name, (torch.optim.AdamW,), {}))
    embedding = model.get_base_model().emb
    assert noted == ([] if name == "AdamW" else [(embedding, "weight", {"optim_bits": 32})])


# -------------------------------------------------------------------------------------------------------------- LoRA-FA


class Pair(nn.Module):
    """The two factors of one layer under the names that they have in a model."""

    def __init__(self):
        super().__init__()
        self.lora_A = nn.ParameterDict({"default": torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])})
        self.lora_B = nn.ParameterDict({"default": torch.tensor([[1.0, -1.0]])})
        self.head = nn.Parameter(torch.tensor([3.0]))
        self.lora_A.default.requires_grad_(False)


def group_of(model, **entries):
    names, parameters = zip(*model.named_parameters())
    return {"params": list(parameters), "names": list(names), **entries}


def test_lorafa_worked_example():
    """A·Aᵀ = diag(4, 1), s = 2, ∇B = (1, 2): the gradient is ¼·(¼, 2)."""
    model = Pair()
    optimizer = LoraFAOptimizer(
        [group_of(model, scaling_factors=[None, 2.0, 2.0])], lr=0.1, betas=(0.5, 0.75), eps=0.0, weight_decay=0.5
    )
    model.lora_B.default.grad = torch.tensor([[1.0, 2.0]])
    model.head.grad = torch.tensor([4.0])
    assert optimizer.step() is None
    first = optimizer.state["lora"]
    assert first["step"] == 1
    assert first["exp_avg_B"].tolist() == [[0.5 * 0.0625, 0.5 * 0.5]]
    assert first["exp_avg_sq_B"].tolist() == [[0.25 * 0.0625**2, 0.25 * 0.5**2]]
    assert optimizer.state["head"]["exp_avg"].tolist() == [2.0]
    assert optimizer.state["head"]["exp_avg_sq"].tolist() == [4.0]
    # Corrected for their start, the means are g and g², so that each weight moves by lr; then a share of lr/2 is taken.
    assert_close(model.lora_B.default.detach(), torch.tensor([[0.9, -1.1]]) * 0.95)
    assert_close(model.head.detach(), torch.tensor([2.9]) * 0.95)
    assert model.lora_A.default.tolist() == [[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]]


def test_lorafa_without_correcting_the_start():
    model = Pair()
    optimizer = LoraFAOptimizer(
        [group_of(model, scaling_factors=[1.0] * 3)], lr=0.1, betas=(0.5, 0.75), eps=0.5, correct_bias=False
    )
    model.head.grad = torch.tensor([4.0])
    optimizer.step()
    assert_close(model.head.detach(), torch.tensor([3.0 - 0.1 * 2.0 / (2.0 + 0.5)]))
    assert list(optimizer.state) == ["head"]


def test_lorafa_rounds_the_product_to_bfloat16():
    A, gradient = torch.randn(3, 5), torch.randn(4, 3)
    P = torch.linalg.pinv(A @ A.T + 1e-8 * torch.eye(3))
    expected = (0.25 * (gradient.bfloat16() @ P.bfloat16())).float()
    assert torch.equal(projected(gradient, A, 2.0), expected)
    precise = projected(gradient.double(), A.double(), 2.0)
    assert_close(precise, 0.25 * gradient.double() @ torch.linalg.inv(A.double() @ A.double().T))
    half = projected(gradient.bfloat16(), A.bfloat16(), 2.0)
    assert half.dtype == torch.bfloat16
    assert_close(half.double(), precise, rtol=0.1, atol=0.1)


def test_lorafa_gradient_is_the_best_that_b_can_do():
    """s·(B's step)·A is the gradient of the whole weight, as far as the rows of A reach."""
    A, of_weight, s = torch.randn(3, 5).double(), torch.randn(4, 5).double(), 2.0
    moved = s * projected(s * of_weight @ A.T, A, s) @ A
    onto_rows = torch.linalg.pinv(A) @ A
    assert_close(moved, of_weight @ onto_rows, rtol=1e-6, atol=1e-6)


def test_lorafa_projects_the_window_of_a_convolution_and_each_group_by_itself():
    A, gradient = torch.randn(4, 3, 2, 2).double(), torch.randn(6, 2, 1, 1).double()
    found = projected(gradient, A, 1.0)
    assert found.shape == gradient.shape
    assert_close(found[:3], projected(gradient[:3], A[:2], 1.0))
    assert_close(found[3:, :, 0, 0], projected(gradient[3:, :, 0, 0], A[2:].flatten(1), 1.0))


def test_lorafa_makes_one_group_of_everything():
    model = adapted(rank_pattern={"last": 2}, modules_to_save=["norm"])
    optimizer = create_lorafa_optimizer(model, r=3, lora_alpha=6, lr=0.1, weight_decay=0.2)
    assert type(optimizer) is LoraFAOptimizer
    (group,) = optimizer.param_groups
    assert dict(zip(group["names"], group["params"])) == dict(model.named_parameters())
    factors_of = {"first": 2.0, "last": 3.0}
    expected = [next((s for n, s in factors_of.items() if f"{n}.lora_" in name), None) for name in group["names"]]
    assert group["scaling_factors"] == expected
    assert expected.count(2.0) == expected.count(3.0) == 2
    rest = {key: value for key, value in group.items() if key not in ("params", "names", "scaling_factors")}
    assert rest == {
        "lr": 0.1,
        "scaling_factor": 2.0,
        "betas": (0.9, 0.999),
        "eps": 1e-6,
        "weight_decay": 0.2,
        "correct_bias": True,
    }


def test_lorafa_states_are_kept_by_name():
    model = adapted(modules_to_save=["norm"])
    optimizer = create_lorafa_optimizer(model, 3, 6, 0.1)
    losses(model, optimizer, 2)
    prefix = "base_model.model"
    assert {key: (entry["step"], sorted(entry)[:2]) for key, entry in optimizer.state.items()} == {
        f"{prefix}.first.lora": (2, ["exp_avg_B", "exp_avg_sq_B"]),
        f"{prefix}.norm.modules_to_save.default.weight": (2, ["exp_avg", "exp_avg_sq"]),
        f"{prefix}.norm.modules_to_save.default.bias": (2, ["exp_avg", "exp_avg_sq"]),
        f"{prefix}.last.lora": (2, ["exp_avg_B", "exp_avg_sq_B"]),
    }


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}, {"target_modules": ["emb", "first"]}])
def test_lorafa_pairs_by_name_whatever_else_an_adapter_has(options):
    model = adapted(**options)
    optimizer = create_lorafa_optimizer(model, 3, 6, 0.1)
    A, B = factors(model, "first")
    loss(model).backward()
    # The first mean after one step is a tenth of the gradient that was followed.
    expected = 0.1 * projected(B.grad, A, 2.0)
    beside = {
        name: 0.1 * parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and ".lora_B.default.weight" not in name
    }
    assert beside
    optimizer.step()
    assert_close(optimizer.state["base_model.model.first.lora"]["exp_avg_B"], expected)
    for name, mean in beside.items():
        assert_close(optimizer.state[name]["exp_avg"], mean)


def test_lorafa_gives_adapters_of_one_layer_states_of_their_own():
    names = [f"m.lora_{factor}.{adapter}.weight" for adapter in "ab" for factor in "AB"]
    assert paired([*names, "n.lora_A.a", "n.lora_B.a", "n.lora_B.b", "poly_lora_B.a", "m.lora_B.a.bias"]) == {
        "m.lora_B.a.weight": ("m.lora_A.a.weight", "m.lora_B.a.weight"),
        "m.lora_B.b.weight": ("m.lora_A.b.weight", "m.lora_B.b.weight"),
        "n.lora_B.a": ("n.lora_A.a", "n.lora"),
    }
    model = adapted()
    model.add_adapter("other", LoraConfig(target_modules=["first"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    optimizer = create_lorafa_optimizer(model, 3, 6, 0.1)
    before = state(model)
    losses(model, optimizer, 1)
    assert changed(before, model) == {name for name in before if "lora_B" in name}


@pytest.mark.parametrize("layer", [lambda: nn.Conv2d(4, 6, 3, groups=2), lambda: Conv1D(6, 4)], ids=["conv", "Conv1D"])
def test_lorafa_on_other_layers(layer):
    base = nn.Sequential(layer())
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    optimizer = create_lorafa_optimizer(model, 2, 8, 0.05)
    x = torch.randn(4, 4, 5, 5) if isinstance(base[0].get_base_layer(), nn.Conv2d) else torch.randn(3, 4)
    found = []
    for _ in range(5):
        optimizer.zero_grad()
        found.append(model(x).square().mean())
        found[-1].backward()
        optimizer.step()
    assert found[-1] < found[0]


def test_lorafa_freezes_a_through_all_that_follows():
    model = adapted()
    model.add_adapter("other", LoraConfig(target_modules=["first"]))
    create_lorafa_optimizer(model, 3, 6, 0.1)

    def training():
        return {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    expected = {f"base_model.model.{layer}.lora_B.default.weight" for layer in ("first", "last")}
    assert training() == expected
    with model.disable_adapter():
        assert training() == set()
    assert training() == expected
    model.set_adapter("other")
    assert training() == {"base_model.model.first.lora_B.other.weight"}
    model.set_adapter("default")
    model.set_requires_grad("default")
    assert training() == expected
    model.delete_adapter("default")
    model.add_adapter("default", LoraConfig(target_modules=["first"]))
    model.set_adapter("default")
    assert training() == {f"base_model.model.first.lora_{factor}.default.weight" for factor in "AB"}


def test_lorafa_leaves_what_the_user_froze():
    model = adapted()
    _, B = factors(model, "last")
    B.requires_grad_(False)
    optimizer = create_lorafa_optimizer(model, 3, 6, 0.1)
    assert not B.requires_grad
    before = state(model)
    losses(model, optimizer, 2)
    assert changed(before, model) == {"base_model.model.first.lora_B.default.weight"}


@pytest.mark.parametrize("use_rslora, scaling", [(False, 2.0), (True, 6 / 3**0.5)])
def test_lorafa_takes_rslora_from_the_configurations(use_rslora, scaling):
    model = adapted(use_rslora=use_rslora)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        group = create_lorafa_optimizer(model, 3, 6, 0.1).param_groups[0]
    assert group["scaling_factor"] == pytest.approx(scaling)
    assert group["scaling_factors"][-1] == pytest.approx(scaling)
    with pytest.warns(FutureWarning, match="use_rslora is taken from"):
        assert create_lorafa_optimizer(model, 3, 6, 0.1, use_rslora=use_rslora).param_groups[0].keys() == group.keys()
    with pytest.raises(ValueError, match=rf"use_rslora={not use_rslora} .*\['default'\]"):
        create_lorafa_optimizer(model, 3, 6, 0.1, use_rslora=not use_rslora)


def test_lorafa_groups_of_older_checkpoints():
    model, other = adapted(), adapted()
    new, old = (create_lorafa_optimizer(m, 3, 6, 0.1) for m in (model, other))
    del old.param_groups[0]["scaling_factors"]
    with pytest.warns(FutureWarning, match="scaling_factors") as warned:
        assert losses(other, old) == losses(model, new)
    assert len(warned) == 1
    del old.param_groups[0]["scaling_factor"]
    with pytest.raises(KeyError, match="scaling_factors"):
        old.step()
    with pytest.raises(KeyError, match="names"):
        LoraFAOptimizer(model.parameters()).step()


def test_lorafa_takes_a_closure():
    model = adapted()
    optimizer = create_lorafa_optimizer(model, 3, 6, 0.1)
    before = state(model)

    def closure():
        value = loss(model)
        value.backward()
        return value

    assert optimizer.step(closure) > 0
    assert changed(before, model) == {name for name in before if "lora_B" in name}


@pytest.mark.parametrize(
    "options, problem",
    [
        ({"lr": -1.0}, "lr.*-1"),
        ({"eps": -1.0}, "eps.*-1"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"betas": (-0.1, 0.9)}, "betas"),
    ],
)
def test_lorafa_refuses_rates_that_make_no_sense(options, problem):
    with pytest.raises(ValueError, match=problem):
        LoraFAOptimizer(Pair().parameters(), **options)


# ----------------------------------------------------------------------------------------------------------- Riemannian


def test_riemannian_worked_example():
    """BᵀB + reg = diag(2, 5) and A·Aᵀ + reg = diag(4, 1)·(1 + …): each gradient is divided by the other's diagonal."""
    A = nn.Parameter(torch.tensor([[1.0, 0.0, 0.0], [0.0, 3.0, 0.0]]))
    B = nn.Parameter(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    A.grad, B.grad = torch.ones(2, 3), torch.ones(2, 2)
    precondition(A, B, reg=1.0)
    assert_close(A.grad, torch.tensor([[1 / 2] * 3, [1 / 5] * 3]))
    assert_close(B.grad, torch.tensor([[1 / 2, 1 / 10]] * 2))


def test_riemannian_steps_like_the_optimizer_it_derives_from():
    model = adapted(modules_to_save=["norm"])
    optimizer = create_riemannian_optimizer(model, torch.optim.SGD, lr=0.1, reg=0.5, momentum=0.9)
    assert isinstance(optimizer, torch.optim.SGD)
    assert type(optimizer).__name__ == "RiemannianSGD"
    assert optimizer.defaults["momentum"] == 0.9
    (group,) = optimizer.param_groups
    assert len(group["params"]) == 6
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    loss(model).backward()
    gradients = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    optimizer.step()
    eye = 0.5 * torch.eye(3)
    for name, parameter in model.named_parameters():
        if name not in gradients:
            assert torch.equal(parameter, before[name])
            continue
        gradient = gradients[name]
        if "lora_A" in name:
            B = before[name.replace("lora_A", "lora_B")]
            gradient = torch.linalg.inv(B.T @ B + eye) @ gradient
        elif "lora_B" in name:
            A = before[name.replace("lora_B", "lora_A")]
            gradient = gradient @ torch.linalg.inv(A @ A.T + eye)
        assert_close(parameter.detach(), before[name] - 0.1 * gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("factor", ["A", "B"])
def test_riemannian_leaves_out_a_gradient_that_is_missing(factor):
    A, B = nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.randn(4, 2))
    with_gradient = A if factor == "A" else B
    with_gradient.grad = torch.ones_like(with_gradient)
    precondition(A, B, 0.1)
    assert (A.grad is None) != (B.grad is None)
    assert not torch.equal(with_gradient.grad, torch.ones_like(with_gradient))


def test_riemannian_keeps_the_dtype_of_gradients():
    A, B = nn.Parameter(torch.randn(2, 3).bfloat16()), nn.Parameter(torch.randn(4, 2).bfloat16())
    A.grad, B.grad = torch.ones_like(A), torch.ones_like(B)
    gradients = A.grad, B.grad
    precondition(A, B, 0.1)
    assert A.grad is gradients[0] and B.grad is gradients[1]
    assert A.grad.dtype == B.grad.dtype == torch.bfloat16


def test_riemannian_does_not_care_how_the_product_is_divided():
    """With A·c and B/c, one step of gradient descent moves the product B·A by the same."""
    torch.manual_seed(1)
    a, b, target = torch.randn(2, 4).double(), torch.randn(3, 2).double(), torch.randn(3, 4).double()
    moves = []
    for c in (1.0, 5.0):
        A, B = nn.Parameter(a * c), nn.Parameter(b / c)
        (B @ A - target).square().sum().backward()
        precondition(A, B, 0.0)
        moves.append(B.grad @ A + B @ A.grad)
    assert_close(moves[0], moves[1])


@pytest.mark.parametrize("targets, frozen", [(["emb"], ""), (["first"], "lora_A"), (["first"], "lora_B")])
def test_riemannian_needs_a_pair(targets, frozen):
    model = adapted(target_modules=targets)
    for name, parameter in model.named_parameters():
        if frozen and frozen in name:
            parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable pair of matrices lora_A and lora_B"):
        create_riemannian_optimizer(model, torch.optim.SGD, lr=0.1)


def test_riemannian_leaves_out_convolutions():
    class Convolved(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.linear = nn.Conv2d(2, 3, 2), nn.Linear(3, 2)

    model = get_peft_model(Convolved(), LoraConfig(target_modules=["conv", "linear"], init_lora_weights=False))
    optimizer = create_riemannian_optimizer(model, torch.optim.SGD, lr=1.0)
    before = state(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        if "lora" in name:
            assert torch.equal(parameter, before[name] - 1.0) == ("conv" in name)


def test_riemannian_refuses_closures():
    model = adapted()
    optimizer = create_riemannian_optimizer(model, torch.optim.AdamW, lr=0.1)
    with pytest.raises(ValueError, match="RiemannianAdamW.step takes no closure"):
        optimizer.step(lambda: loss(model))
    with pytest.raises(ValueError, match="LBFGS.step needs a closure"):
        create_riemannian_optimizer(model, torch.optim.LBFGS, lr=0.1)


@pytest.mark.parametrize("optimizer_cls", [nn.Linear, torch.optim.SGD([nn.Parameter(torch.ones(1))]), "SGD"])
def test_riemannian_refuses_what_is_no_class_of_optimizers(optimizer_cls):
    with pytest.raises(TypeError, match="torch.optim.Optimizer"):
        create_riemannian_optimizer(adapted(), optimizer_cls, lr=0.1)
