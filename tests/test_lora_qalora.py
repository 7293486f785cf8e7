"""QA-LoRA: A sees the means of groups of inputs. On a stand-in for the layers of GPTQ that ask for it."""

import pytest
import torch
from stand_ins import TorchLinear
from torch import nn

from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.engine.backends import dense_weight
from peft.tuners.lora.gptq import GPTQLoraLinear
from peft.tuners.lora.qalora import pooled
from peft.tuners.lora.variants import QALoraLinearVariant

pytestmark = pytest.mark.stand_in


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.packed = TorchLinear(nn.Linear(6, 8), group_size=3)
        self.other = nn.Linear(8, 3)

    def forward(self, x):
        return self.other(self.packed(x).tanh())


def config(**options):
    options = {
        "r": 2,
        "lora_alpha": 3,
        "target_modules": ["packed"],
        "use_qalora": True,
        "qalora_group_size": 3,
        **options,
    }
    return LoraConfig(**options)


def adapted(**options):
    model = get_peft_model(Net(), config(init_lora_weights=False, **options)).eval()
    return model, model.base_model.model.packed


def test_pooling():
    x = torch.tensor([[1.0, 3.0, 5.0, 5.0], [0.0, 1.0, 2.0, 6.0]])
    assert pooled(x, 2).tolist() == [[4, 10], [1, 8]]  # the means, times two groups
    assert pooled(x[:, None], 4).tolist() == [[[3.5]], [[2.25]]]
    assert torch.equal(pooled(x, 1), x * 4)


def test_the_term_by_hand():
    model, layer = adapted()
    x = torch.randn(5, 2, 6)
    means = torch.stack([x[..., :3].mean(-1), x[..., 3:].mean(-1)], -1) * 2
    term = means @ layer.lora_A["default"].weight.T @ layer.lora_B["default"].weight.T * 1.5
    torch.testing.assert_close(layer(x), layer.base_layer(x) + term)
    assert {name: tuple(value.shape) for name, value in get_peft_model_state_dict(model).items()} == {
        "base_model.model.packed.lora_A.weight": (2, 2),
        "base_model.model.packed.lora_B.weight": (8, 2),
    }


def test_it_starts_as_the_base_model_and_trains():
    base = Net()
    x = torch.randn(4, 6)
    expected = base(x)
    model = get_peft_model(base, config(lora_dropout=0.5))
    assert torch.equal(model(x), expected)
    A = model.base_model.model.packed.lora_A["default"]
    assert A.weight.abs().max() <= 2**-0.5 and (A.in_features, A.out_features) == (2, 2)
    model(x).sum().backward()
    assert model.base_model.model.packed.lora_B["default"].weight.grad.any()


def test_a_mixed_batch_and_a_reload(tmp_path):
    model, layer = adapted()
    model.add_adapter("plain", config(use_qalora=False, init_lora_weights=False))
    x = torch.randn(3, 6)
    mixed = model.eval()(x, adapter_names=["plain", "default", "__base__"])
    torch.testing.assert_close(mixed[1], model(x)[1])
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    loaded = PeftModel.from_pretrained(Net(), tmp_path)
    torch.testing.assert_close(loaded(x), model(x))
    model.set_adapter("plain")
    torch.testing.assert_close(mixed[0], model(x)[0])


def test_it_has_no_weight_to_merge():
    model, layer = adapted()
    before = layer.weight.clone()
    assert type(layer) is GPTQLoraLinear and layer.weight is layer.base_layer.qweight
    for attempt in (
        model.merge_adapter,
        model.merge_and_unload,
        lambda: layer.get_delta_weight("default"),
        lambda: QALoraLinearVariant.get_delta_weight(layer, "default"),
        lambda: QALoraLinearVariant.merge_safe(layer, "default", layer.weight),
        lambda: QALoraLinearVariant.merge_unsafe(layer, "default", layer.weight),
        lambda: QALoraLinearVariant.unmerge(layer, "default", layer.weight),
    ):
        with pytest.raises(NotImplementedError, match="packed: the adapter 'default' is a QALoRA.*no merged weight"):
            attempt()
    assert torch.equal(layer.weight, before) and not model.supports_lora_conversion()


@pytest.mark.parametrize("size", [4, 0])
def test_groups_that_do_not_fit_are_refused(size):
    with pytest.raises(ValueError, match=f"packed: its 6 inputs.*qalora_group_size={size} for the adapter 'default'"):
        adapted(qalora_group_size=size)


def test_a_group_for_each_scale_changes_the_zero_points_alone():
    model, layer = adapted()
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    # With a group of inputs for each group of the weight, an update adds one number to each of the group's weights: two
    # groups, whose mean of three inputs is taken times two, and s = 3/2.
    update = (1.5 * (B @ A) * 2 / 3).repeat_interleave(3, dim=1)
    x = torch.randn(4, 6)
    expected = x @ (dense_weight(layer.base_layer).float() + update).T + layer.base_layer.bias.float()
    torch.testing.assert_close(layer(x), expected)


def test_an_ordinary_model_has_no_use_for_it_and_says_so():
    ordinary = LoraConfig(r=2, target_modules=["0"], use_qalora=True)
    with pytest.warns(UserWarning, match="use_qalora is for layers that GPTQ has quantised"):
        model = get_peft_model(nn.Sequential(nn.Linear(8, 3)), ordinary)
    assert model.base_model.model[0].lora_A["default"].weight.shape == (2, 8)
