"""VeLoRA: LoRA whose A keeps its input compressed until the backward pass."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from peft import LoraConfig, PeftModel, VeloraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora.velora import VeloraConvFunction, VeloraFunction, VeloraLinearVariant, sub_tokens, unit

LAYERS = {
    "linear": (lambda: nn.Linear(10, 6), (3, 5, 10)),
    "conv1d_transformers": (lambda: Conv1D(6, 10), (3, 5, 10)),
    "conv1d": (lambda: nn.Conv1d(10, 6, 3, padding=1, padding_mode="circular"), (3, 10, 7)),
    "conv2d": (lambda: nn.Conv2d(10, 6, (3, 2), stride=2, dilation=2), (2, 10, 7, 7)),
    "conv2d unbatched": (lambda: nn.Conv2d(10, 6, 3), (10, 5, 5)),
    "conv2d grouped": (lambda: nn.Conv2d(10, 6, 3, groups=2), (2, 10, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(10, 6, 2), (2, 10, 3, 3, 3)),
}


class Net(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def adapted(layer=None, options=None, **config):
    """A model in training mode, with a direction taken from the inputs unless other options say otherwise."""
    config = {"r": 2, "lora_alpha": 3, "target_modules": ["layer"], "init_lora_weights": False, **config}
    velora = VeloraConfig(**{"num_groups": 4, **(options or {})})
    return get_peft_model(Net(layer or nn.Linear(10, 6)), LoraConfig(velora_config=velora, **config)).train()


def layer_of(model):
    return model.base_model.model.layer


def direction_of(model):
    return layer_of(model).lora_velora_embed["default"]


# ------------------------------------------------------------------------------------------------------ the mathematics


def test_worked_example():
    # Two sub-tokens of two features: x = [1, 2 | 3, 5], e = [0.6, 0.8], so c = [2.2, 5.8].
    x = torch.tensor([[1.0, 2.0, 3.0, 5.0]], requires_grad=True)
    W = torch.tensor([[1.0, 1.0, 1.0, 1.0]], requires_grad=True)
    y = VeloraFunction.apply(x, W, None, torch.tensor([0.6, 0.8]), 2, 2.0)
    (3 * y).sum().backward()
    assert y.item() == 11.0
    assert x.grad.tolist() == [[3.0, 3.0, 3.0, 3.0]]
    torch.testing.assert_close(W.grad, 3 * 2.0 * torch.tensor([[2.2 * 0.6, 2.2 * 0.8, 5.8 * 0.6, 5.8 * 0.8]]))


def test_gradient_of_A_is_that_for_the_reconstructed_input_and_the_others_are_exact():
    x, W, b = torch.randn(2, 5, 10), torch.randn(3, 10), torch.randn(3)
    e, G = unit(torch.randn(3)), torch.randn(2, 5, 3)
    x, W, b = (tensor.requires_grad_() for tensor in (x, W, b))
    y = VeloraFunction.apply(x, W, b, e, 4, 1.5)
    torch.testing.assert_close(y, F.linear(x, W, b))
    grads = torch.autograd.grad(y, (x, W, b), G)
    rebuilt = 1.5 * ((sub_tokens(x, 4, 3) @ e).unsqueeze(-1) * e).flatten(1)[:, :10]  # two features were padding
    expected = (G @ W, G.flatten(0, 1).T @ rebuilt, G.sum((0, 1)))
    for grad, value in zip(grads, expected):
        torch.testing.assert_close(grad, value)


@pytest.mark.parametrize("name", [name for name in LAYERS if name.startswith("conv") and "_" not in name])
def test_gradient_of_a_convolution_is_that_for_the_reconstructed_input(name):
    build, shape = LAYERS[name]
    convolution = build()
    A = type(convolution)(
        10, 2, convolution.kernel_size, padding=convolution.padding, padding_mode=convolution.padding_mode, bias=False
    )
    x, e = torch.randn(shape, requires_grad=True), unit(torch.randn(3))
    channels = 1 - A.weight.dim()
    y = VeloraConvFunction.apply(x, A.weight, e, 4, 1.5, A._conv_forward)
    torch.testing.assert_close(y, A(x))
    G = torch.randn_like(y)
    grads = torch.autograd.grad(y, (x, A.weight), G)
    pixels = x.detach().movedim(channels, -1)
    rebuilt = 1.5 * ((sub_tokens(pixels, 4, 3) @ e).unsqueeze(-1) * e).flatten(1)[:, :10]
    rebuilt = rebuilt.view(pixels.shape).movedim(-1, channels)
    torch.testing.assert_close(grads[0], torch.autograd.grad(A(x), x, G)[0])
    torch.testing.assert_close(grads[1], torch.autograd.grad(A(rebuilt), A.weight, G)[0])


def test_one_group_per_feature_and_scale_one_keep_everything():
    model, x = adapted(options={"num_groups": 10}), torch.randn(4, 10).abs()
    plain = get_peft_model(Net(nn.Linear(10, 6)), LoraConfig(r=2, target_modules=["layer"]))
    plain.load_state_dict(model.state_dict(), strict=False)
    layer_of(plain).scaling["default"] = layer_of(model).scaling["default"]
    for each in (model, plain):
        each(x).square().sum().backward()
    torch.testing.assert_close(layer_of(model).lora_A.default.weight.grad, layer_of(plain).lora_A.default.weight.grad)


def test_zero_has_all_ones_for_a_direction():
    torch.testing.assert_close(unit(torch.zeros(4)), torch.full((4,), 0.5))


def test_there_is_no_second_derivative():
    x, W = torch.randn(2, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    y = VeloraFunction.apply(x, W, None, torch.tensor([0.6, 0.8]), 2, 1.0)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# ---------------------------------------------------------------------------------------------------------- the direction


def test_batch_average_follows_the_inputs():
    model, x = adapted(), torch.randn(3, 5, 10)
    assert direction_of(model).tolist() == [0, 0, 0]
    for batch in (x, x + 1):
        model(batch)
        mean = F.pad(batch, (0, 2)).reshape(-1, 3).mean(0)
        torch.testing.assert_close(direction_of(model), mean / mean.norm())


def test_batch_average_once_keeps_the_first():
    model, x = adapted(options={"init_type": "batch_average_once"}), torch.randn(3, 10)
    model(x)
    first = direction_of(model).clone()
    model(x + 1)
    assert first.norm() > 0 and torch.equal(direction_of(model), first)


def test_random_is_a_unit_vector_from_the_start():
    model = adapted(options={"init_type": "random"})
    before = direction_of(model).clone()
    model(torch.randn(3, 10))
    torch.testing.assert_close(before.norm(), torch.tensor(1.0))
    assert torch.equal(direction_of(model), before)


def test_the_direction_is_taken_from_what_dropout_leaves():
    model, x = adapted(lora_dropout=0.5), torch.rand(50, 10)
    torch.manual_seed(1)
    model(x)
    torch.manual_seed(1)
    mean = F.pad(F.dropout(x, 0.5), (0, 2)).reshape(-1, 3).mean(0)
    torch.testing.assert_close(direction_of(model), mean / mean.norm())


@pytest.mark.parametrize("how", ["eval", "no_grad", "frozen", "empty"])
def test_the_direction_stays_where_nothing_is_learnt(how):
    model, x = adapted(), torch.randn(3, 10)
    if how == "eval":
        model.eval()
    if how == "frozen":
        model.set_adapter("default", inference_mode=True)
    with torch.set_grad_enabled(how != "no_grad"):
        assert model(x[:0] if how == "empty" else x).isfinite().all()
    assert direction_of(model).tolist() == [0, 0, 0]


def test_two_calls_before_the_backward_pass_keep_a_direction_each():
    model, x = adapted(), torch.randn(2, 3, 10)
    (model(x[0]).sum() + model(x[1]).sum()).backward()
    both = layer_of(model).lora_A.default.weight.grad.clone()
    model.zero_grad()
    for each in x:
        model(each).sum().backward()
    torch.testing.assert_close(layer_of(model).lora_A.default.weight.grad, both)


# ------------------------------------------------------------------------------------------------------- as an adapter


@pytest.mark.parametrize("name", LAYERS)
def test_output_and_gradient_of_the_input_are_those_of_plain_lora(name):
    build, shape = LAYERS[name]
    model, x = adapted(build(), lora_alpha=4), torch.randn(shape, requires_grad=True)
    plain = get_peft_model(
        Net(build()), LoraConfig(r=2, lora_alpha=4, target_modules=["layer"], init_lora_weights=False)
    )
    plain.load_state_dict(model.state_dict(), strict=False)
    outputs = [each.train()(x) for each in (model, plain)]
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*(torch.autograd.grad(output.square().sum(), x)[0] for output in outputs))


@pytest.mark.parametrize("name", [name for name in LAYERS if "grouped" not in name])
def test_merged_output_is_the_output(name):
    build, shape = LAYERS[name]
    model, x = adapted(build()), torch.randn(shape)
    model(x)
    weight, expected = layer_of(model).weight.clone(), model.eval()(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected)
    model.unmerge_adapter()
    assert torch.equal(layer_of(model).weight, weight)


def test_saved_tensors_are_as_many_numbers_as_there_are_sub_tokens():
    def saved(model, x):
        kept = []
        parameters = {parameter.data_ptr() for parameter in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            model(x)
        return sum(tensor.numel() for tensor in kept if tensor.data_ptr() not in parameters)

    x = torch.randn(100, 512)
    velora = adapted(nn.Linear(512, 8), {"num_groups": 16})
    plain = get_peft_model(Net(nn.Linear(512, 8)), LoraConfig(r=2, target_modules=["layer"]))
    assert saved(plain, x) == 100 * 512 + 100 * 2  # the inputs of A and of B
    assert saved(velora, x) == 100 * 16 + 512 // 16 + 100 * 2


def test_a_convolution_keeps_less_too():
    kept = []
    model, x = adapted(nn.Conv2d(64, 8, 1), {"num_groups": 4}), torch.randn(2, 64, 9, 9)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        model(x)
    assert x.shape not in kept and (2 * 9 * 9, 4) in kept


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("init_type", ["batch_average", "batch_average_once", "random"])
def test_gradient_checkpointing_changes_nothing(init_type, use_reentrant):
    model, x = adapted(options={"init_type": init_type}, lora_dropout=0.2), torch.randn(3, 10, requires_grad=True)
    other = copy.deepcopy(model)
    torch.manual_seed(1)
    model(x).square().sum().backward()
    torch.manual_seed(1)
    checkpoint(other, x, use_reentrant=use_reentrant).square().sum().backward()
    torch.testing.assert_close(direction_of(other), direction_of(model))
    for factor in ("lora_A", "lora_B"):
        grads = [getattr(layer_of(each), factor).default.weight.grad for each in (model, other)]
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("name", ["linear", "conv2d"])
@pytest.mark.parametrize("mode", ["bfloat16", "autocast"])
def test_half_precision(mode, name):
    build, shape = LAYERS[name]
    model = adapted(build())
    exact, x = copy.deepcopy(model), torch.randn(shape, requires_grad=True)
    if mode == "bfloat16":
        model = model.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        output = model(x if mode == "autocast" else x.bfloat16())
    assert output.dtype == torch.bfloat16
    output.float().square().sum().backward()
    exact(x).square().sum().backward()
    weight, expected = (layer_of(each).lora_A.default.weight for each in (model, exact))
    assert weight.grad.dtype == weight.dtype
    scale = expected.grad.abs().max()
    torch.testing.assert_close(weight.grad.float() / scale, expected.grad / scale, rtol=0, atol=0.05)


def test_what_is_saved_and_how_it_loads(tmp_path):
    model, x = adapted(), torch.randn(3, 10)
    model(x)
    shapes = {key: tuple(value.shape) for key, value in get_peft_model_state_dict(model).items()}
    prefix = "base_model.model.layer."
    assert shapes == {
        f"{prefix}lora_A.weight": (2, 10),
        f"{prefix}lora_B.weight": (6, 2),
        f"{prefix}lora_velora_embed": (3,),
    }
    model.save_pretrained(tmp_path)
    base = Net(nn.Linear(10, 6))
    base.layer.load_state_dict(layer_of(model).get_base_layer().state_dict())
    loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(direction_of(loaded), direction_of(model))
    torch.testing.assert_close(loaded(x), model.eval()(x))
    assert loaded.peft_config["default"].velora_config == VeloraConfig(num_groups=4)


@pytest.mark.parametrize("init_type", ["batch_average", "batch_average_once", "random"])
def test_training_goes_on_from_a_file_as_it_would_have(init_type, tmp_path):
    def step(model, x):
        model.train()(x).square().sum().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.01 * parameter.grad
                    parameter.grad = None

    model, x = adapted(options={"init_type": init_type}), torch.randn(2, 3, 10)
    base = copy.deepcopy(layer_of(model).get_base_layer())
    step(model, x[0])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Net(base), tmp_path, is_trainable=True)
    for each in (model, loaded):
        step(each, x[1])
    for key, value in get_peft_model_state_dict(model).items():
        torch.testing.assert_close(get_peft_model_state_dict(loaded)[key], value)


def test_a_deleted_adapter_leaves_nothing():
    model = adapted()
    layer = layer_of(model)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["layer"]))
    model.delete_adapter("default")
    kept = {name: list(getattr(layer, name)) for name in VeloraLinearVariant.containers}
    assert kept == dict.fromkeys(VeloraLinearVariant.containers, [])
    assert not [name for name in model.state_dict() if "velora" in name]


def test_two_adapters_have_directions_of_their_own():
    model, x = adapted(), torch.randn(3, 10)
    other = LoraConfig(r=2, target_modules=["layer"], velora_config={"num_groups": 2, "init_type": "random"})
    model.add_adapter("other", other)
    model.base_model.set_adapter(["default", "other"])
    model(x).sum().backward()
    directions = layer_of(model).lora_velora_embed
    assert [len(directions[name]) for name in ("default", "other")] == [3, 5]
    assert all(layer_of(model).lora_A[name].weight.grad is not None for name in ("default", "other"))


def test_it_is_not_for_embeddings():
    with pytest.raises(ValueError, match="layer does not support velora_config"):
        adapted(nn.Embedding(5, 6))


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("num_groups", 0, "num_groups of VeloraConfig must be positive, got 0"),
        ("scale", -1.0, "scale of VeloraConfig must be positive, got -1.0"),
        ("init_type", "mean", "init_type must be one of .*batch_average_once.*got 'mean'"),
    ],
)
def test_options_are_checked(option, value, message):
    with pytest.raises(ValueError, match=message):
        VeloraConfig(**{option: value})
