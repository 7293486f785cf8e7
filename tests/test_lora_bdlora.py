"""BD-LoRA: one factor of an adapter is block-diagonal, chosen by the module's name."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft import BdLoraConfig, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora.bdlora import apply_blocks, block_diagonal_factor
from peft.tuners.lora.variants import BlockDiagonalLinear
from peft.utils.hotswap import prepare_model_for_compiled_hotswap


class Net(nn.Module):
    """Two layers whose adapters have a block-diagonal A and B, and one in neither list."""

    def __init__(self, conv1d=False):
        super().__init__()
        torch.manual_seed(1)
        self.up_proj = Conv1D(8, 6) if conv1d else nn.Linear(6, 8)
        self.down_proj = Conv1D(10, 8) if conv1d else nn.Linear(8, 10)
        self.head = nn.Linear(10, 3)

    def forward(self, x):
        return self.head(self.down_proj(self.up_proj(x).tanh()).tanh())


BLOCKS = {"target_modules_bd_a": ["up"], "target_modules_bd_b": ["down_proj"], "nblocks": 2}


def config(blocks=(), **options):
    options = {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["up_proj", "down_proj"],
        "init_lora_weights": False,
        **options,
    }
    return LoraConfig(**{"use_bdlora": BdLoraConfig(**{**BLOCKS, **dict(blocks)}), **options})


def adapted(model=None, blocks=(), **options):
    model = get_peft_model(Net() if model is None else model, config(blocks, **options)).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name and value.ndim == 2:
                value.normal_()
    return model


def x_of(rows=4):
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(3))


def out(model, x=None, **kwargs):
    with torch.no_grad():
        return model(x_of() if x is None else x, **kwargs)


# ------------------------------------------------------------------------------------------------- a block-diagonal layer


def test_worked_example():
    layer = BlockDiagonalLinear(4, 2, nblocks=2)
    layer.weight.data = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert layer.weight_as_blockdiagonal_matrix().tolist() == [[1, 2, 0, 0], [0, 0, 3, 4]]
    assert layer(torch.tensor([1.0, 1.0, 1.0, -1.0])).tolist() == [3, -1]


@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 6), (0, 6)])
@pytest.mark.parametrize("nblocks", [1, 2, 3])
def test_blocks_are_the_dense_matrix(shape, nblocks):
    layer = BlockDiagonalLinear(6, 12, nblocks)
    x = torch.randn(shape)
    torch.testing.assert_close(layer(x), x @ layer.weight_as_blockdiagonal_matrix().T)
    assert torch.equal(apply_blocks(x, layer.weight, nblocks), layer(x))
    assert layer.weight.shape == (12, 6 // nblocks)


def test_its_start_and_options():
    layer = BlockDiagonalLinear(12, 66, 3, dtype=torch.float64)
    assert layer.weight.dtype == torch.float64 and 1.0 < layer.weight.abs().max() <= (6 / 4) ** 0.5
    assert not BlockDiagonalLinear(4, 4, 2, init_zero=True).weight.any()
    assert BlockDiagonalLinear(4, 4, 2, device="meta").weight.is_meta
    assert repr(layer) == "BlockDiagonalLinear(in_features=12, out_features=66, nblocks=3)"


@pytest.mark.parametrize("sizes", [(5, 4, 2), (4, 5, 2), (4, 4, 0)])
def test_features_that_cannot_be_divided_are_refused(sizes):
    with pytest.raises(
        ValueError, match="{} inputs and {} outputs cannot be divided among {} equal blocks".format(*sizes)
    ):
        BlockDiagonalLinear(*sizes)


# ---------------------------------------------------------------------------------------------------- which factor it is


@pytest.mark.parametrize(
    ("name", "factor"), [("layers.0.up_proj", "A"), ("layers.0.down_proj", "B"), ("up", "A"), ("down_proj.x", "B")]
)
def test_an_entry_matches_a_part_of_the_name(name, factor):
    assert block_diagonal_factor(BdLoraConfig(**BLOCKS), name) == factor


def test_a_name_in_no_list():
    with pytest.raises(ValueError, match=r"head matches neither.*\['up'\].*\['down_proj'\].*match_strict=False"):
        block_diagonal_factor(BdLoraConfig(**BLOCKS), "head")
    assert block_diagonal_factor(BdLoraConfig(**BLOCKS, match_strict=False), "head") is None
    with pytest.raises(ValueError, match="target_modules_bd_a=None"):
        block_diagonal_factor(BdLoraConfig(), "head")


def test_a_name_in_both_lists():
    with pytest.raises(ValueError, match=r"up_down_proj matches \['up'\] in target_modules_bd_a and \['down_proj'\]"):
        block_diagonal_factor(BdLoraConfig(**BLOCKS), "up_down_proj")
    with pytest.raises(ValueError, match=r"\['x'\] are in target_modules_bd_a and in target_modules_bd_b"):
        BdLoraConfig(target_modules_bd_a=["x", "y"], target_modules_bd_b=["x"])


# ------------------------------------------------------------------------------------------------------------ an adapter


@pytest.mark.parametrize("conv1d", [False, True], ids=["linear", "conv1d"])
def test_a_model_with_both(conv1d):
    model = adapted(Net(conv1d))
    up, down = model.base_model.model.up_proj, model.base_model.model.down_proj
    assert {name: tuple(value.shape) for name, value in get_peft_model_state_dict(model).items()} == {
        "base_model.model.up_proj.lora_A.weight": (4, 3),
        "base_model.model.up_proj.lora_B.weight": (8, 4),
        "base_model.model.down_proj.lora_A.weight": (4, 8),
        "base_model.model.down_proj.lora_B.weight": (10, 2),
    }
    A = up.lora_A["default"].weight_as_blockdiagonal_matrix()
    delta = 1.5 * up.lora_B["default"].weight @ A
    torch.testing.assert_close(up.delta_weight("default"), delta)
    torch.testing.assert_close(up.get_delta_weight("default"), delta.T if conv1d else delta)
    B = down.lora_B["default"].weight_as_blockdiagonal_matrix()
    torch.testing.assert_close(down.delta_weight("default"), 1.5 * B @ down.lora_A["default"].weight)
    torch.testing.assert_close(out(up), out(up.base_layer) + x_of() @ delta.T)


@pytest.mark.parametrize("conv1d", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("safe", [False, True])
def test_merging(conv1d, safe):
    model = adapted(Net(conv1d))
    expected, before = out(model), model.base_model.model.up_proj.weight.detach().clone()
    model.merge_adapter(safe_merge=safe)
    torch.testing.assert_close(out(model), expected)
    model.unmerge_adapter()
    assert torch.equal(model.base_model.model.up_proj.weight, before) and torch.equal(out(model), expected)
    torch.testing.assert_close(out(model.merge_and_unload()), expected)


def test_it_starts_as_the_base_model():
    base = Net()
    expected = out(base)
    model = get_peft_model(base, config(init_lora_weights=True))
    assert torch.equal(out(model), expected)
    assert model.base_model.model.up_proj.lora_A["default"].weight.std() > 0.3
    assert not model.base_model.model.down_proj.lora_B["default"].weight.any()
    assert sum(value.requires_grad for value in model.parameters()) == 4
    model.train()(x_of()).sum().backward()
    assert model.base_model.model.down_proj.lora_B["default"].weight.grad.any()


def test_a_target_in_no_list_gets_a_plain_adapter_or_is_refused():
    targets = {"target_modules": ["up_proj", "head"]}
    with pytest.raises(ValueError, match="head matches neither"):
        adapted(**targets)
    model = adapted(blocks={"match_strict": False}, **targets)
    layer = model.base_model.model.head
    assert type(layer.lora_A["default"]) is type(layer.lora_B["default"]) is nn.Linear
    expected = out(model)
    model.merge_adapter()
    torch.testing.assert_close(out(model), expected)


@pytest.mark.parametrize(
    ("options", "blocks", "pattern"),
    [
        ({"r": 3}, {}, "up_proj: A of the adapter 'default' is to have 2 blocks.*r=3 and 6 inputs"),
        ({}, {"nblocks": 4}, "up_proj: A.*4 blocks.*r=4 and 6 inputs"),
        ({"target_modules": ["down_proj"]}, {"nblocks": 4}, "down_proj: B.*4 blocks.*r=4 and 10 outputs"),
        ({}, {"nblocks": 0}, "up_proj: A.*0 blocks"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(options, blocks, pattern):
    model = Net()
    with pytest.raises(ValueError, match=pattern):
        get_peft_model(model, config(blocks, **options))
    assert type(model.up_proj) is nn.Linear and model.up_proj.weight.requires_grad


def test_a_second_adapter_that_is_refused_leaves_nothing():
    model = adapted()
    expected = out(model)
    with pytest.raises(ValueError, match="'b' is to have 2 blocks"):
        model.add_adapter("b", config(r=3))
    assert list(model.peft_config) == ["default"] and set(model.base_model.model.up_proj.lora_A) == {"default"}
    assert torch.equal(out(model), expected)


@pytest.mark.parametrize("base", [nn.Embedding(4, 4), nn.Conv1d(4, 4, 1)], ids=["embedding", "conv1d"])
def test_other_layers_are_refused(base):
    with pytest.raises(ValueError, match="up does not support use_bdlora"):
        get_peft_model(nn.ModuleDict({"up": base}), config(target_modules=["up"]))


def test_a_block_diagonal_b_has_no_bias():
    with pytest.warns(UserWarning, match="down_proj: B of the adapter 'default' is block-diagonal and has no bias"):
        model = adapted(lora_bias=True)
    up = model.base_model.model.up_proj.lora_B["default"]
    nn.init.normal_(up.bias)
    assert "bias" not in dict(model.base_model.model.down_proj.lora_B["default"].named_parameters())
    expected = out(model)
    model.merge_adapter()
    torch.testing.assert_close(out(model), expected)


def test_dtypes():
    model = get_peft_model(Net().bfloat16(), config(), autocast_adapter_dtype=False)
    layer = model.base_model.model.up_proj
    assert layer.lora_A["default"].weight.dtype == torch.bfloat16
    assert layer.get_delta_weight("default").dtype == torch.bfloat16
    assert (
        get_peft_model(Net().bfloat16(), config()).base_model.model.up_proj.lora_A["default"].weight.dtype
        == torch.float32
    )


def test_saving_and_loading(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Net(), tmp_path)
    assert isinstance(loaded.peft_config["default"].use_bdlora, BdLoraConfig)
    torch.testing.assert_close(out(loaded), out(model))
    assert not any(value.is_meta or value.requires_grad for value in loaded.parameters())
    lazy = get_peft_model(Net(), config(), low_cpu_mem_usage=True)
    assert lazy.base_model.model.up_proj.lora_A["default"].weight.is_meta
    assert lazy.base_model.model.down_proj.lora_B["default"].weight.is_meta


def test_a_mixed_batch_of_several_block_sizes():
    model = adapted()
    model.add_adapter("finer", config({"target_modules_bd_a": ["down"], "target_modules_bd_b": ["up"]}, r=2))
    model.add_adapter("plain", config(use_bdlora=None))
    x, names = x_of(), ["finer", "__base__", "default", "plain"]
    mixed = out(model.eval(), x, adapter_names=names)
    for row in (0, 2, 3):
        model.set_adapter(names[row])
        torch.testing.assert_close(mixed[row], out(model, x)[row])
    with model.disable_adapter():
        torch.testing.assert_close(mixed[1], out(model, x)[1])


def test_several_active_ones_add_up():
    model = adapted()
    model.add_adapter("b", config(r=2))
    layer = model.base_model.model.up_proj
    model.base_model.set_adapter(["default", "b"])
    expected = layer.base_layer(x_of()) + layer.term(x_of(), "default") + layer.term(x_of(), "b")
    torch.testing.assert_close(layer(x_of()), expected)


def test_it_compiles_as_one_graph():
    model = adapted()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x_of()), model(x_of()))


def test_it_cannot_be_prepared_for_hotswapping_larger_ranks():
    with pytest.raises(
        ValueError, match="'default' of rank 4, a BdLoraLinearVariant.*cannot be padded to target_rank=8"
    ):
        prepare_model_for_compiled_hotswap(adapted(), target_rank=8)


def test_it_can_become_a_plain_adapter():
    assert adapted().supports_lora_conversion()
