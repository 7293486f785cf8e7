"""`convert_to_lora` and `save_as_lora`: adapters of other methods as LoRA adapters."""

import json

import matrix
import pytest
import torch
from matrix import BASES, FIRST, output
from torch import nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from peft import (
    FourierFTConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    convert_to_lora,
    get_peft_model,
    inject_adapter_in_model,
    save_as_lora,
    set_peft_model_state_dict,
)
from peft.engine.layer import AdditiveLayer
from peft.tuners.lora.conversion import rank_for_energy
from peft.tuners.tuners_utils import BaseTunerLayer

ADAPTED = matrix.cases(BASES)
ALREADY_LORA = pytest.mark.filterwarnings("ignore:.*is a LoRA adapter already")


class Mlp(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8, dtype=dtype), nn.Linear(8, 8, dtype=dtype)
        self.head = nn.Linear(8, 3, dtype=dtype)

    def forward(self, x):
        return self.head(self.second(self.first(x)))


class Nested(nn.Module):
    """Layers of which one has the last part of another's name."""

    def __init__(self):
        super().__init__()
        self.layer, self.block = nn.Linear(6, 6), nn.Module()
        self.block.layer = nn.Linear(6, 6)

    def forward(self, x):
        return self.block.layer(self.layer(x))


def make(cls, **options):
    torch.manual_seed(0)
    return cls(**options)


@torch.no_grad()
def fill(model, adapter="default"):
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if f".{adapter}" in name:
            parameter.copy_(torch.randn_like(parameter.float()) * 0.3)
    return model.eval()


def lokr(base=None, **options):
    options = {"target_modules": ["first", "second"], "r": 2, **options}
    return fill(get_peft_model(make(Mlp) if base is None else base, LoKrConfig(**options)))


def loaded(base, config, state, **options):
    model = get_peft_model(base, config, **options)
    assert set_peft_model_state_dict(model, state).unexpected_keys == []
    return model.eval()


# ----------------------------------------------------------------------------------------- every method, every layer


@ALREADY_LORA
@pytest.mark.parametrize("case", ADAPTED, ids=str)
def test_at_full_rank_the_converted_adapter_does_the_same(case):
    model = case.one().eval()
    layer = model.base_model.model.layer
    assert model.supports_lora_conversion(FIRST) == layer.supports_lora_conversion(FIRST)
    if not layer.supports_lora_conversion(FIRST):
        variant = getattr(layer, "lora_variant", {}).get(FIRST)
        refuses = variant is not None and not variant.supports_lora_conversion()
        assert not isinstance(layer, AdditiveLayer) or "groups" in case.base.name or refuses
        with pytest.raises(
            TypeError, match=f"'{FIRST}' of 'layer' cannot be converted to LoRA: {type(layer).__name__}"
        ):
            convert_to_lora(model, 2, FIRST)
        return
    config, state = convert_to_lora(model, 1.0, FIRST)
    assert all(name.startswith("base_model.model.layer.") for name in state)
    converted = loaded(case.base.make(), config, state)
    assert_close(output(converted, case.x), output(model, case.x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "names"),
    {
        nn.Linear(6, 8): {"lora_A.weight": (2, 6), "lora_B.weight": (8, 2)},
        Conv1D(8, 6): {"lora_A.weight": (2, 6), "lora_B.weight": (8, 2)},
        nn.Embedding(10, 8): {"lora_embedding_A": (2, 10), "lora_embedding_B": (8, 2)},
        nn.Conv1d(6, 8, 3): {"lora_A.weight": (2, 6, 3), "lora_B.weight": (8, 2, 1)},
        nn.Conv2d(6, 8, (3, 2)): {"lora_A.weight": (2, 6, 3, 2), "lora_B.weight": (8, 2, 1, 1)},
        nn.Conv3d(6, 8, 2): {"lora_A.weight": (2, 6, 2, 2, 2), "lora_B.weight": (8, 2, 1, 1, 1)},
    }.items(),
    ids=lambda value: repr(value)[:12],
)
def test_names_and_shapes(layer, names):
    model = fill(get_peft_model(nn.Sequential(layer), FourierFTConfig(target_modules=["0"], n_frequency=10)))
    config, state = convert_to_lora(model, 2)
    assert {name: tuple(value.shape) for name, value in state.items()} == {
        f"base_model.model.0.{name}": shape for name, shape in names.items()
    }
    assert (config.r, config.lora_alpha, config.target_modules) == (2, 2, {"0"})
    assert config.fan_in_fan_out is isinstance(layer, Conv1D)


@ALREADY_LORA
def test_an_attention_layer_is_converted_with_its_projection():
    base = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2, batch_first=True)})
    model = fill(get_peft_model(base, LoraConfig(target_modules=["attention"], r=2)))
    config, state = convert_to_lora(model, 0.9)
    ranks = {name: len(value) for name, value in state.items() if "lora_A" in name}
    assert ranks == {
        "base_model.model.attention.lora_A.weight": 2,
        "base_model.model.attention.base_layer.out_proj.lora_A.weight": 2,
    }
    assert config.target_modules == {"attention"} and config.rank_pattern == {"attention": 2}


@ALREADY_LORA
def test_factors_of_one_target_are_padded_to_one_rank():
    base = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2, batch_first=True)})
    model = fill(get_peft_model(base, LoraConfig(target_modules=["attention"], r=2)))
    attention = model.base_model.model["attention"]
    attention.base_layer.out_proj.lora_B["default"].weight.data.zero_()
    config, state = convert_to_lora(model, 1.0)
    A = state["base_model.model.attention.base_layer.out_proj.lora_A.weight"]
    assert config.rank_pattern == {"attention": 2} and A.shape == (2, 8) and A.eq(0).all()


# ------------------------------------------------------------------------------------------------------------ the rank


def test_a_fixed_rank_is_the_best_approximation_of_that_rank():
    model = lokr()
    config, state = convert_to_lora(model, 3)
    assert (config.r, config.lora_alpha, config.rank_pattern, config.alpha_pattern) == (3, 3, {}, {})
    layer = model.base_model.model.second
    product = state["base_model.model.second.lora_B.weight"] @ state["base_model.model.second.lora_A.weight"]
    delta = layer.get_delta_weight("default")
    assert_close(torch.linalg.matrix_norm(delta - product), torch.linalg.svdvals(delta)[3:].norm())


def test_energy_decides_the_rank_of_each_layer():
    values = torch.tensor([3.0, 2.0, 1.0, 0.0])  # squares 9, 4, 1 of 14
    found = {share: rank_for_energy(values, share) for share in (0.1, 9 / 14, 0.65, 13 / 14, 0.93, 1.0)}
    assert found == {0.1: 1, 9 / 14: 1, 0.65: 2, 13 / 14: 2, 0.93: 3, 1.0: 3}
    assert rank_for_energy(torch.zeros(3), 0.5) == 0


def test_ranks_that_energy_has_chosen_stand_in_the_patterns():
    model = lokr()
    model.base_model.model.first.lokr_w2.default.data[:, 1:] = 0
    config, state = convert_to_lora(model, 0.5)
    ranks = {name.split(".")[2]: len(value) for name, value in state.items() if "lora_A" in name}
    assert (config.r, config.lora_alpha) == (1, 1)
    assert config.rank_pattern == config.alpha_pattern == {name: rank for name, rank in ranks.items() if rank != 1}
    again = loaded(make(Mlp), config, state)
    for name, rank in ranks.items():
        layer = getattr(again.base_model.model, name)
        assert layer.r["default"] == rank and layer.scaling["default"] == 1


def test_all_the_energy_gives_the_rank_of_the_update():
    model = get_peft_model(make(Mlp), LoHaConfig(target_modules=["first"], r=1))
    config, _ = convert_to_lora(fill(model), 0.99999)
    assert config.rank_pattern == {}  # the Hadamard product of two matrices of rank 1 has rank 1


def test_layers_that_change_nothing_are_excluded():
    model = lokr()
    model.base_model.model.first.lokr_w1.default.data.zero_()
    config, state = convert_to_lora(model, 0.9)
    assert config.exclude_modules == {"first"}
    assert not any(".first." in name for name in state)
    again = loaded(make(Mlp), config, state)
    assert not isinstance(again.base_model.model.first, BaseTunerLayer)
    _, state = convert_to_lora(model, 4)  # a fixed rank is what it says
    assert len(state["base_model.model.first.lora_A.weight"]) == 4


@pytest.mark.parametrize(("excluded", "expected"), [("he.*", "(?:he.*)|first"), (["head"], {"head", "first"})])
def test_what_was_excluded_stays_excluded(excluded, expected):
    model = lokr(exclude_modules=excluded)
    model.base_model.model.first.lokr_w1.default.data.zero_()
    assert convert_to_lora(model, 0.9)[0].exclude_modules == expected


def test_a_layer_is_told_from_one_whose_name_ends_in_its_own():
    model = fill(get_peft_model(make(Nested), LoKrConfig(target_modules=["layer"], r=6, decompose_both=True)))
    model.base_model.model.block.layer.lokr_w2.default.data[:, 1:] = 0
    config, state = convert_to_lora(model, 0.999)
    ranks = {name.removeprefix("base_model.model."): len(value) for name, value in state.items() if "lora_A" in name}
    assert ranks["layer.lora_A.weight"] != ranks["block.layer.lora_A.weight"]
    assert {"^layer", "block.layer"} >= set(config.rank_pattern) >= {"^layer"}
    loaded(make(Nested), config, state)


def test_a_layer_without_effect_is_kept_if_its_name_would_exclude_another():
    model = fill(get_peft_model(make(Nested), LoKrConfig(target_modules=["layer"], r=6)))
    model.base_model.model.layer.lokr_w1.default.data.zero_()
    config, state = convert_to_lora(model, 1.0)
    assert config.exclude_modules is None
    x = torch.randn(2, 6)
    assert_close(output(loaded(make(Nested), config, state), x), output(model, x), rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------- the config


def test_the_configuration_selects_what_the_sources_did():
    blocks = nn.ModuleList(nn.ModuleDict({"query": nn.Linear(4, 4)}) for _ in range(3))
    base = nn.ModuleDict({"model": nn.ModuleDict({"layers": blocks})})
    source = LoKrConfig(target_modules=["query"], layers_to_transform=[0, 2], layers_pattern="layers", r=2)
    model = fill(get_peft_model(base, source))
    model.peft_config["default"].base_model_name_or_path = "some/base"
    model.peft_config["default"].revision = "main"
    config, _ = convert_to_lora(model, 2)
    assert config.layers_to_transform == [0, 2] and config.layers_pattern == "layers"
    assert config.base_model_name_or_path == "some/base" and config.revision == "main"
    assert config.target_modules == {"query", "model.layers.0.query", "model.layers.2.query"}


def test_targets_by_expression_get_their_ranks_by_pattern():
    config, state = convert_to_lora(lokr(target_modules="first|sec.*"), 2)
    assert config.target_modules == "first|sec.*"
    assert config.rank_pattern == config.alpha_pattern == {"first": 2, "second": 2}
    assert len(state) == 4


def test_modules_that_train_in_full_are_kept():
    model = lokr(target_modules=["first"], modules_to_save=["head"])
    config, state = convert_to_lora(model, 6)
    assert config.modules_to_save == ["head"]
    assert {name for name in state if "head" in name} == {"base_model.model.head.weight", "base_model.model.head.bias"}
    x = torch.randn(3, 6)
    again = loaded(make(Mlp), config, state)
    assert_close(output(again, x), output(model, x), rtol=1e-4, atol=1e-5)
    assert again.base_model.model.head.modules_to_save["default"].weight.requires_grad


@ALREADY_LORA
def test_trained_rows_of_an_embedding_are_kept():
    def base():
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 6))

    source = LoraConfig(target_modules=["1"], trainable_token_indices={"0": [2, 4]}, r=2)
    model = fill(get_peft_model(base(), source))
    config, state = convert_to_lora(model, 6)
    assert config.trainable_token_indices == {"0": [2, 4]}
    assert "base_model.model.0.token_adapter.trainable_tokens_delta" in state
    ids = torch.arange(9)[None]
    assert_close(output(loaded(base(), config, state), ids), output(model, ids), rtol=1e-4, atol=1e-5)


def test_an_injected_model_is_converted_like_a_wrapped_one():
    base = inject_adapter_in_model(LoKrConfig(target_modules=["first"], r=2), make(Mlp))
    fill(base)
    config, state = convert_to_lora(base, 6)
    assert set(state) == {"base_model.model.first.lora_A.weight", "base_model.model.first.lora_B.weight"}
    x = torch.randn(2, 6)
    assert_close(output(loaded(make(Mlp), config, state), x), output(base, x), rtol=1e-4, atol=1e-5)
    injected = inject_adapter_in_model(config, make(Mlp))
    set_peft_model_state_dict(injected, state)
    assert_close(output(injected, x), output(base, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", [6, 1.0])
def test_a_model_without_any_configuration_gets_its_layers_as_targets_and_scaling_1(rank):
    base = inject_adapter_in_model(LoKrConfig(target_modules=["first"], r=2), make(Mlp))
    fill(base)
    del base.peft_config
    config, state = convert_to_lora(base, rank)
    assert config.target_modules == {"first"}
    x = torch.randn(2, 6)
    again = loaded(make(Mlp), config, state)
    assert again.base_model.model.first.scaling["default"] == 1
    assert_close(output(again, x), output(base, x), rtol=1e-4, atol=1e-5)


def test_one_of_several_adapters_is_converted():
    model = get_peft_model(make(Mlp), LoKrConfig(target_modules=["first"], r=2))
    model.add_adapter("other", LoKrConfig(target_modules=["second"], r=2))
    fill(model, "other")
    config, state = convert_to_lora(model, 8, adapter_name="other")
    assert {name.split(".")[2] for name in state} == {"second"} and config.target_modules == {"second"}


def test_an_adapter_of_a_mixed_model_is_named_as_alone():
    model = get_peft_model(make(Mlp), LoKrConfig(target_modules=["first"], r=2), mixed=True)
    model.add_adapter("other", LoHaConfig(target_modules=["first"], r=2))
    fill(model)
    _, state = convert_to_lora(model, 6)
    assert set(state) == {"base_model.model.first.lora_A.weight", "base_model.model.first.lora_B.weight"}


def test_the_model_does_not_change():
    model = lokr()
    before, x = matrix.state(model), torch.randn(2, 6)
    expected = output(model, x)
    convert_to_lora(model, 4)
    assert matrix.changed(before, matrix.state(model)) == set()
    assert torch.equal(output(model, x), expected)


def test_merged_adapters_are_converted_too():
    model = lokr()
    _, expected = convert_to_lora(model, 6)
    model.merge_adapter()
    _, state = convert_to_lora(model, 6)
    assert all(torch.equal(state[name], expected[name]) for name in expected)


@ALREADY_LORA
def test_dora_is_converted_with_its_magnitudes_also_when_merged():
    model = fill(get_peft_model(make(Mlp), LoraConfig(target_modules=["first"], r=2, use_dora=True)))
    x = torch.randn(2, 6)
    expected = output(model, x)
    for step in (lambda: None, model.merge_adapter):
        step()
        config, state = convert_to_lora(model, 6)
        assert not config.use_dora
        assert_close(output(loaded(make(Mlp), config, state), x), expected, rtol=1e-4, atol=1e-5)


def test_a_methods_own_factors_are_taken_whatever_the_rank(monkeypatch):
    model = lokr(target_modules=["first"])
    A, B = torch.randn(3, 6), torch.randn(8, 3)
    layer_cls = type(model.base_model.model.first)
    monkeypatch.setattr(layer_cls, "exact_factors", lambda self, adapter: (A, B))
    config, state = convert_to_lora(model, 100)
    assert torch.equal(state["base_model.model.first.lora_A.weight"], A)
    assert (config.r, config.rank_pattern) == (100, {"first": 3})


def test_half_precision_stays_half_precision():
    model = fill(
        get_peft_model(
            make(Mlp, dtype=torch.bfloat16),
            LoKrConfig(target_modules=["first"], r=2),
            autocast_adapter_dtype=False,
        )
    )
    _, state = convert_to_lora(model, 4)
    assert {value.dtype for value in state.values()} == {torch.bfloat16}


def test_the_decomposition_can_be_compiled():
    model = lokr()
    _, plain = convert_to_lora(model, 4)
    _, compiled = convert_to_lora(model, 4, compile_kwargs={"backend": "eager"})
    assert all(torch.equal(plain[name], compiled[name]) for name in plain)


def test_a_progress_bar_is_shown_if_asked_for(capsys):
    convert_to_lora(lokr(), 4, progressbar=True)
    assert "Converting to LoRA" in capsys.readouterr().err
    convert_to_lora(lokr(), 4)
    assert capsys.readouterr().err == ""


def test_a_lora_adapter_is_converted_with_a_warning():
    model = fill(get_peft_model(make(Mlp), LoraConfig(target_modules=["first"], r=4, lora_alpha=9)))
    with pytest.warns(UserWarning, match="'default' is a LoRA adapter already"):
        _, state = convert_to_lora(model, 4)
    product = state["base_model.model.first.lora_B.weight"] @ state["base_model.model.first.lora_A.weight"]
    assert_close(product, model.base_model.model.first.get_delta_weight("default"))


# ---------------------------------------------------------------------------------------------------------------- files


def test_a_saved_conversion_is_loaded_like_any_lora_adapter(tmp_path):
    model, x = lokr(target_modules=["first"], modules_to_save=["head"]), torch.randn(2, 6)
    save_as_lora(tmp_path / "new" / "folder", model, 6)
    folder = tmp_path / "new" / "folder"
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    saved = json.loads((folder / "adapter_config.json").read_text())
    assert saved["peft_type"] == "LORA" and saved["inference_mode"] is True and saved["r"] == 6
    assert saved["auto_mapping"]["base_model_class"] == "Mlp"
    again = PeftModel.from_pretrained(make(Mlp), folder)
    assert_close(output(again, x), output(model, x), rtol=1e-4, atol=1e-5)


def test_a_file_is_not_overwritten_by_a_folder(tmp_path):
    path = tmp_path / "file"
    path.write_text("kept")
    with pytest.raises(ValueError, match="is a file; an adapter is saved to a folder"):
        save_as_lora(path, lokr(), 2)
    assert path.read_text() == "kept"


def test_nothing_is_written_if_nothing_can_be_converted(tmp_path):
    with pytest.raises(ValueError, match="rank=9 does not fit 'first'"):
        save_as_lora(tmp_path / "folder", lokr(), 9)
    assert not (tmp_path / "folder").exists()


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("rank", "error", "match"),
    [
        (0, ValueError, "at least 1, got 0"),
        (-2, ValueError, "at least 1, got -2"),
        (0.0, ValueError, r"lies in \(0, 1\], got 0.0"),
        (1.5, ValueError, r"lies in \(0, 1\], got 1.5.*int for a fixed rank"),
        (float("nan"), ValueError, r"lies in \(0, 1\]"),
        (True, TypeError, "an int or a float, got True"),
        ("4", TypeError, "an int or a float, got '4'"),
        (7, ValueError, "rank=7 does not fit 'first': its update is a 8 x 6 matrix.*at most 6"),
    ],
)
def test_ranks_that_make_no_sense(rank, error, match):
    with pytest.raises(error, match=match):
        convert_to_lora(lokr(), rank)


def test_an_unknown_adapter():
    with pytest.raises(ValueError, match=r"no adapter 'defualt'; known are \['default'\].* 'default'"):
        convert_to_lora(lokr(), 2, adapter_name="defualt")


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (LoraConfig(target_modules=["first"], bias="all"), r"bias='all'.*bias='none'"),
        (LoraConfig(target_modules=["first"], lora_bias=True), r"lora_bias=True.*lora_bias=False"),
    ],
    ids=["bias", "lora_bias"],
)
@ALREADY_LORA
def test_adapters_that_train_biases(config, match):
    with pytest.raises(ValueError, match=match):
        convert_to_lora(get_peft_model(make(Mlp), config), 2)


def test_methods_without_an_update_of_their_own():
    model = get_peft_model(make(Mlp), IA3Config(target_modules=["first"], feedforward_modules=[]))
    with pytest.raises(
        TypeError, match="'default' of 'first' cannot be converted to LoRA: Linear adds no fixed update"
    ):
        convert_to_lora(model, 2)


@ALREADY_LORA
def test_bare_parameters():
    config = LoraConfig(target_modules=[], target_parameters=["first.weight"])
    model = get_peft_model(make(Mlp), config)
    with pytest.raises(TypeError, match="'default' of 'first' cannot be converted to LoRA: ParamWrapper"):
        convert_to_lora(model, 2)


def test_models_without_adapter_layers():
    with pytest.raises(TypeError, match="The Mlp has no layer with an adapter 'default'"):
        convert_to_lora(make(Mlp), 2)


@pytest.mark.compat
def test_prompt_learning():
    from transformers import LlamaConfig, LlamaForCausalLM

    small = LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    model = get_peft_model(LlamaForCausalLM(small), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(TypeError, match="'default' of 'prompt_encoder' cannot be converted to LoRA"):
        convert_to_lora(model, 2)


def test_an_adapter_that_changes_nothing():
    model = get_peft_model(make(Mlp), LoKrConfig(target_modules=["first"], r=2))
    with pytest.raises(ValueError, match="'default' changes no weight"):
        convert_to_lora(model, 0.9)
