"""The life of a layer whose weight is quantised, the same for every weight backend and every method.

A backend's tests say how a linear layer is quantised (`Form`), and run each of `CHECKS` on all methods that adapt such layers;
these come from the registry. What is expected is always a second model: the same method on the dense weight that the
quantised one stands for.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from matrix import FIRST, SECOND, Base, Case, Net, adapter_parameters, names_of, output, same, trainable, variants
from torch import nn

import peft
from peft.engine.backends import dense_weight
from peft.engine.layer import AdapterLayer, MultiplicativeLayer
from peft.tuners.tuners_utils import BaseTunerLayer

IN, OUT = 64, 32


@dataclass(frozen=True)
class Form:
    """A form in which the weight of a linear layer is kept."""

    name: str
    backend_name: str
    quantise: Callable[[nn.Linear], nn.Module]
    """Gives a quantised layer with the weight and bias of a dense one, which it may use up."""
    tolerance: float = 1e-5
    """How far the layer's own forward is off that of the dense weight, relative to the largest output."""
    eval_tolerance: float | None = None
    """The same in eval mode, where it is another one: by activations that are quantised, too."""
    rounding: float = 0.25
    """How far merging may move an output, in the same measure."""
    no_training: str = ""
    """Why a layer cannot be trained through, if it cannot."""
    can_read: bool = True
    can_write: bool = True

    def __str__(self) -> str:
        return self.name

    @property
    def in_eval(self) -> float:
        return self.tolerance if self.eval_tolerance is None else self.eval_tolerance


def linear(weight: torch.Tensor | None = None, bias: torch.Tensor | None = None) -> nn.Linear:
    """A linear layer, the same at every call unless it is given another weight and bias."""
    layer = nn.Linear(IN, OUT)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(OUT, IN, generator=generator) / 8 if weight is None else weight)
        layer.bias.copy_(torch.randn(OUT, generator=generator) if bias is None else bias)
    return layer


def unpacked(model: nn.Module) -> nn.Module:
    """The model, in which bitsandbytes does not pack 4-bit codes for a kernel that only some CPUs have.

    What the tests see is the same on every CPU then; that kernel has tests of its own.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


class QuantizedNet(Net):
    """Remembers the dtype that the layer gave, and goes on in single precision."""

    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        result = self.layer(x, **kwargs)
        self.dtype = result.dtype
        return self.act(result.float())


@dataclass(frozen=True)
class QuantizedBase(Base):
    """A base layer of a form; not moved to a dtype, since a packed weight must not be."""

    @property
    def kind(self) -> str:
        return "linear"  # whatever class the layer has

    def make(self, dtype: torch.dtype = torch.float32) -> Net:
        torch.manual_seed(0)
        return self.net(self.make_layer()).eval()


def quantized_case(case: Case, form: Form, dtype: torch.dtype = torch.float32) -> Case:
    """A case's method on a layer of a form, quantised from a weight of that dtype."""
    return Case(
        case.variant, QuantizedBase("linear", lambda: form.quantise(linear().to(dtype)), (3, IN), QuantizedNet)
    )


def dense_case(quantized: Case) -> Case:
    """The same method on the dense weight that the layer of a case stands for."""
    layer = quantized.base.make_layer()
    weight = dense_weight(layer).detach().float()
    make = functools.partial(linear, weight, layer.bias.detach().float())
    return Case(quantized.variant, Base("linear", make, (3, IN)))


METHODS = [
    case
    for case in (Case(variant, Base("linear", linear, (3, IN))) for variant in variants())
    if case.adapts and issubclass(case.layer_class, AdapterLayer)
]
"""Every registered method that adapts linear layers; those that copy them have copies with dense weights."""


def needs_weight(case: Case) -> bool:
    """Whether the method's forward reads the base weight."""
    return issubclass(case.layer_class, MultiplicativeLayer) or case.variant.name == "LORA-dora"


def is_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    """Whether two outputs differ by no more than a part of the largest value."""
    return (actual - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1)


def in_training(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The output in training mode, where some methods draw random numbers."""
    torch.manual_seed(3)
    return output(model.train(), x)


def frozen_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor of a model that belongs to no adapter; of a tensor subclass, its parts."""
    own = names_of(model, FIRST, SECOND)
    found = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name not in own:
            found |= parts(name, tensor)
    return found


def parts(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    if hasattr(tensor, "__tensor_flatten__"):
        inner = {key: getattr(tensor, key) for key in tensor.__tensor_flatten__()[0]}
        return {f"{name}.{key}": part.detach().clone() for key, part in inner.items()}
    return {name: tensor.detach().clone()}


def all_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(same(value, second[name]) for name, value in first.items())


def layer_of(model: nn.Module) -> AdapterLayer:
    return next(module for module in model.modules() if isinstance(module, BaseTunerLayer))


def merged_quietly(model: nn.Module, *args: object) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_adapter(*args)


def as_dense(quantized: nn.Module, dense: nn.Module, adapter: str = FIRST) -> None:
    """Give the adapter of a dense model the values of the quantised model's, as a file would."""
    state = {
        name: value.clone() for name, value in peft.get_peft_model_state_dict(quantized, adapter_name=adapter).items()
    }
    loaded = peft.set_peft_model_state_dict(dense, state, adapter_name=adapter)
    assert loaded.unexpected_keys == []


# ---------------------------------------------------------------------------------------------------------------- checks


def the_backend_is_known(case: Case, form: Form) -> None:
    model = case.fresh()
    layer = layer_of(model)
    assert isinstance(layer, case.layer_class)
    assert layer.quantization_backend.backend_name == form.backend_name
    assert (layer.in_features, layer.out_features) == (IN, OUT)
    assert f"quantization_backend='{form.backend_name}'" in repr(layer)
    assert peft.get_model_status(model).quantization_backend == form.backend_name
    assert trainable(model) == names_of(model, FIRST)


def its_output_is_that_of_the_dense_weight(case: Case, form: Form) -> None:
    model, dense = case.one(), dense_case(case).fresh()
    as_dense(model, dense)
    expected = output(dense, case.x)
    assert not is_close(case.base_output, expected, 1e-3)
    assert is_close(output(model, case.x), expected, form.in_eval)
    assert is_close(in_training(model, case.x), in_training(dense, case.x), form.tolerance)


def a_step_of_training_changes_the_adapter_alone(case: Case, form: Form) -> None:
    if form.no_training:
        pytest.skip(form.no_training)
    model, dense = case.one(), dense_case(case).fresh()
    as_dense(model, dense)
    before, adapter = (
        frozen_state(model),
        {name: value.detach().clone() for name, value in adapter_parameters(model, FIRST)},
    )
    gradients = []
    for each in (model.train(), dense.train()):
        x = case.x.requires_grad_(True)
        torch.manual_seed(3)
        each(x).square().mean().backward()
        gradients.append({name: p.grad for name, p in adapter_parameters(each, FIRST)} | {"x": x.grad})
    for name, gradient in gradients[1].items():
        if gradient is not None:
            largest = gradient.abs().max()
            assert is_close(gradients[0][name] / largest, gradient / largest, 10 * form.tolerance), name
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    assert all_same(frozen_state(model), before)
    assert any(not same(value.detach(), adapter[name]) for name, value in adapter_parameters(model, FIRST))


def merging_quantises_again_and_unmerging_is_exact(case: Case, form: Form) -> None:
    model, dense = case.one(), dense_case(case).fresh()
    as_dense(model, dense)
    kept, result = frozen_state(model), output(model, case.x)
    kept = frozen_state(model)  # some layers move their scales at the first forward
    with case.declared("merge") as can_merge:
        if can_merge and form.can_write:
            with pytest.warns(peft.utils.warning.PeftWarning, match="rounds"):
                model.merge_adapter()
        elif can_merge:
            with pytest.raises(TypeError, match=f"layer.*{form.backend_name}"):
                model.merge_adapter()
        else:
            model.merge_adapter()
    if not (can_merge and form.can_write):
        assert all_same(frozen_state(model), kept)
        assert same(output(model, case.x), result)
        return
    dense.merge_adapter()
    expected = layer_of(dense).get_base_layer()
    again = form.quantise(linear(expected.weight.detach(), expected.bias.detach()))
    weight = layer_of(model).get_base_weight()
    ideal = layer_of(model).quantization_backend.get_base_weight(again)
    # The same codes, but for values in the middle between two of them.
    assert torch.isclose(weight.float(), ideal.float(), rtol=1e-3, atol=1e-5).float().mean() > 0.97
    assert type(layer_of(model).get_base_layer()) is type(case.base.make_layer())
    assert is_close(output(model, case.x), output(dense.get_base_model(), case.x), form.rounding)
    assert not same(output(model, case.x), case.base_output)
    model.unmerge_adapter()
    assert all_same(frozen_state(model), kept)
    assert same(output(model, case.x), result)


def merging_two_counts_from_the_original_weight(case: Case, form: Form) -> None:
    if not form.can_write or case.limit("merge") or case.limit("both at once"):
        pytest.skip("there is nothing to merge one after the other")
    model = case.two()
    kept, result = frozen_state(model), output(model, case.x)
    kept = frozen_state(model)
    merged_quietly(model, [FIRST])
    merged_quietly(model, [SECOND])
    assert layer_of(model).merged_adapters == [FIRST, SECOND]
    assert torch.equal(layer_of(model).unmerged_weight(), dense_case(case).base.make().layer.weight)
    twin = copy.deepcopy(model)
    for each in (model, twin):
        each.unmerge_adapter()
        assert all_same(frozen_state(each), kept)
        assert same(output(each, case.x), result)


def merging_for_good_leaves_the_quantised_layer(case: Case, form: Form) -> None:
    model = case.one()
    if case.limit("merge") or not form.can_write:
        pytest.skip("it cannot be merged")
    merged_quietly(model)
    expected = output(model, case.x)
    model.unmerge_adapter()
    plain = model.merge_and_unload()
    assert type(plain.layer) is type(case.base.make_layer())
    assert not any(isinstance(module, BaseTunerLayer) for module in plain.modules())
    assert same(output(plain, case.x), expected)


def unloading_gives_the_base_back(case: Case, form: Form) -> None:
    model = case.one()
    layer = layer_of(model).get_base_layer()
    plain = model.unload()
    assert plain.layer is layer
    assert same(output(plain, case.x), case.base_output)


def disabled_it_is_the_base_model(case: Case, form: Form) -> None:
    model = case.one()
    with model.disable_adapter():
        assert same(output(model, case.x), case.base_output)
        assert trainable(model) == set()
    assert not is_close(output(model, case.x), case.base_output, 1e-3)


def it_is_saved_and_loaded(case: Case, form: Form, tmp_path) -> None:
    model, dense = case.one(), dense_case(case).fresh()
    as_dense(model, dense)
    model.save_pretrained(tmp_path, selected_adapters=[FIRST])
    folder = tmp_path / FIRST
    for low_memory in (False, True):
        again = peft.PeftModel.from_pretrained(
            case.base.make(), folder, adapter_name=FIRST, low_cpu_mem_usage=low_memory
        )
        assert same(output(case.called(again), case.x), output(model, case.x))
    in_dense = peft.PeftModel.from_pretrained(dense_case(case).base.make(), folder, adapter_name=FIRST)
    assert same(output(case.called(in_dense), case.x), output(dense, case.x))


def each_of_two_adapters_gives_its_own_output(case: Case, form: Form) -> None:
    model = case.two()
    first = output(model, case.x)
    alone = case.one()
    as_dense(model, alone)
    assert same(first, output(alone, case.x))
    model.set_adapter(SECOND)
    assert trainable(model) == names_of(model, SECOND)
    second = output(model, case.x)
    assert not is_close(second, first, 1e-3)
    model.set_adapter(FIRST)
    model.delete_adapter(SECOND)
    assert same(output(model, case.x), first)


def a_mixed_batch_is_its_rows(case: Case, form: Form) -> None:
    model = case.two()
    with case.declared("mixed batch") as can_mix:
        mixed = output(model, case.x, adapter_names=[FIRST, "__base__", SECOND, FIRST])
    if not can_mix:
        return
    first = output(model, case.x)
    model.set_adapter(SECOND)
    second = output(model, case.x)
    expected = torch.stack([first[0], case.base_output[1], second[2], first[3]])
    assert is_close(mixed, expected, 2 * form.in_eval)


def in_half_precision_it_keeps_the_dtype_of_its_input(case: Case, form: Form) -> None:
    in_half = quantized_case(case, form, torch.bfloat16)
    half, dense = in_half.one(), dense_case(in_half).fresh()
    as_dense(half, dense)
    assert is_close(output(half, case.x.bfloat16()), output(dense, case.x), 0.1)
    assert half.dtype == torch.bfloat16
    model = case.one()
    expected = output(model, case.x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert is_close(output(model, case.x), expected, 0.1)


CHECKS = (
    the_backend_is_known,
    its_output_is_that_of_the_dense_weight,
    a_step_of_training_changes_the_adapter_alone,
    merging_quantises_again_and_unmerging_is_exact,
    merging_two_counts_from_the_original_weight,
    merging_for_good_leaves_the_quantised_layer,
    unloading_gives_the_base_back,
    disabled_it_is_the_base_model,
    it_is_saved_and_loaded,
    each_of_two_adapters_gives_its_own_output,
    a_mixed_batch_is_its_rows,
    in_half_precision_it_keeps_the_dtype_of_its_input,
)
"""What is to hold for every method on every form; `run` runs one of them."""


def run(check: Callable[..., None], method: Case, form: Form, tmp_path) -> None:
    if needs_weight(method) and not form.can_read:
        pytest.skip(f"{method.variant} computes with the base weight, which {form.backend_name} does not give")
    case = quantized_case(method, form)
    check(*([case, form, tmp_path] if check is it_is_saved_and_loaded else [case, form]))
