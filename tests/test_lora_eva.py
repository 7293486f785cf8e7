"""EVA: an adapter's A from the principal components of its layers' inputs, and the decomposition that finds them."""

import copy
import warnings
from collections import Counter, namedtuple

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft import (
    EvaConfig,
    LoraConfig,
    PeftModel,
    get_eva_state_dict,
    get_peft_model,
    initialize_lora_eva_weights,
)
from peft.tuners.lora import eva
from peft.utils.incremental_pca import IncrementalPCA

PREFIX = "base_model.model."


class Net(nn.Module):
    """Two layers with the same inputs, and one with others."""

    def __init__(self, width=12):
        super().__init__()
        self.q, self.k, self.o = nn.Linear(width, 8), nn.Linear(width, 8), nn.Linear(8, 6)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return self.o(self.dropout(self.q(x) * self.k(x)))


def config(**options):
    settings = {key: options.pop(key) for key in list(options) if key in EvaConfig.__dataclass_fields__}
    options = {"r": 3, "lora_alpha": 6, "target_modules": ["q", "k", "o"], **options}
    return LoraConfig(init_lora_weights="eva", eva_config=EvaConfig(**settings), **options)


def batches(count=3, rows=40, width=12):
    """Inputs with four directions in which they vary much, each less than the one before."""
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(9))
    basis = torch.linalg.qr(mixing).Q
    sizes = torch.cat([torch.tensor([8.0, 4.0, 2.0, 1.0]), torch.full((width - 4,), 0.05)])
    return [
        torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * sizes @ basis
        for seed in range(count)
    ]


PLAIN = {
    "forward_fn": lambda model, x: model(x),
    "prepare_model_inputs_fn": None,
    "prepare_layer_inputs_fn": None,
    "show_progress_bar": False,
}


def components(model, data, peft_config=None, **options):
    return get_eva_state_dict(model, data, peft_config, **{**PLAIN, **options})


def adapted(net=None, low_cpu_mem_usage=True, **options):
    return get_peft_model(net or Net().eval(), config(**options), low_cpu_mem_usage=low_cpu_mem_usage)


def started(model, data=None, **options):
    initialize_lora_eva_weights(model, batches() if data is None else data, **{**PLAIN, **options})
    return model


def ranks(state):
    return {name.removeprefix(PREFIX): len(tensor) for name, tensor in state.items()}


def principal_components(data, count):
    rows = torch.cat(data)
    _, S, Vh = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    return Vh[:count], S[:count]


def alike(found, expected):
    """Whether rows agree but for their sign."""
    return torch.allclose(
        (found.double() * expected.double()).sum(1).abs(), torch.ones(len(found)).double(), atol=1e-3
    )


# -------------------------------------------------------------------------------------------------------- the components


def test_the_components_are_those_of_the_inputs():
    state = components(Net(), batches(), config(target_modules=["q"], r=4, rho=1))
    assert state.keys() == {"q"} and state["q"].shape == (4, 12)
    assert alike(state["q"], principal_components(batches(), 4)[0])


def test_whitening_divides_by_the_roots_of_the_singular_values():
    plain = components(Net(), batches(1), config(target_modules=["q"], tau=0))
    white = components(Net(), batches(1), config(target_modules=["q"], tau=0, whiten=True))
    sizes = plain["q"].norm(dim=1) / white["q"].norm(dim=1)
    seen_twice = principal_components(batches(1) * 2, 3)[1]  # a first batch has no component to be compared with
    assert torch.allclose(sizes.double(), seen_twice.sqrt().double(), rtol=1e-3)


def test_layers_with_the_same_inputs_share_their_components():
    state = components(Net(), batches(), config())
    fewest = min(len(state["q"]), len(state["k"]))
    assert torch.equal(state["q"][:fewest], state["k"][:fewest])
    assert len(state["q"]) >= len(state["k"])


def test_ranks_go_where_they_explain_most():
    class Apart(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.o = nn.Linear(12, 4), nn.Linear(12, 4)

        def forward(self, x):
            return self.q(x) + self.o(x * torch.tensor([100.0, *[0.0] * 11]))  # one direction explains everything here

    state = components(Apart(), batches(), config(target_modules=["q", "o"], r=2, rho=2))
    assert ranks(state) == {"q": 3, "o": 1}
    unmoved = components(Apart(), batches(), config(target_modules=["q", "o"], r=2, rho=1))
    assert ranks(unmoved) == {"q": 2, "o": 2}


def test_the_sum_of_the_ranks_stays():
    state = components(Net(), batches(), config(rank_pattern={"o": 5}))
    assert sum(ranks(state).values()) == 3 + 3 + 5
    assert set(ranks(state)) == {"q", "k", "o"}


def test_more_components_than_features_are_not_looked_for():
    state = components(Net(), batches(), config(target_modules=["o"], r=6, rho=3))
    assert ranks(state) == {"o": 6}


def test_a_peft_model_is_looked_at_without_its_adapter():
    net = Net().eval()
    expected = components(net, batches(), config())
    model = started(adapted(copy.deepcopy(net)))
    for layer in (model.base_model.model.q, model.base_model.model.o):
        layer.lora_B["default"].weight.data.normal_()
    assert torch.equal(components(model, batches())[f"{PREFIX}o"][:2], expected["o"][:2])


def test_all_linear_layers_are_looked_at_if_none_are_named():
    assert set(components(Net(), batches(), config(target_modules=None))) == {"q", "k", "o"}
    assert set(components(Net(), batches(), config(target_modules="all-linear"))) == {"q", "k", "o"}


def test_without_settings_the_defaults_are_used():
    net, plain = Net(), LoraConfig(r=3, target_modules=["q"])
    expected = components(net, batches(), config(target_modules=["q"]))
    assert torch.equal(components(net, batches(), plain)["q"], expected["q"])


def test_the_search_is_the_same_every_time_and_draws_no_random_numbers():
    net = Net()
    torch.manual_seed(1)
    first = components(net, batches(), config())
    after = torch.rand(1)
    second = components(net, batches(), config())
    assert all(torch.equal(first[name], second[name]) for name in first)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(1))


# --------------------------------------------------------------------------------------------------- which inputs count


def llama():
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            vocab_size=30,
            tie_word_embeddings=False,
        )
    ).eval()


def texts(labels=False):
    generator = torch.Generator().manual_seed(1)
    data = []
    for _ in range(2):
        ids = torch.randint(0, 30, (4, 9), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, 5:] = 0
        data.append({"input_ids": ids, "attention_mask": mask})
        if labels:
            data[-1]["labels"] = torch.where(torch.arange(9) < 3, -100, ids)
    return data


@pytest.mark.compat
def test_language_models_need_no_functions():
    model = get_peft_model(
        llama(), config(target_modules=["q_proj", "v_proj", "down_proj"], r=2), low_cpu_mem_usage=True
    )
    state = get_eva_state_dict(model, texts(), show_progress_bar=False)
    assert sum(ranks(state).values()) == 6
    assert {tensor.shape[1] for tensor in state.values()} == {16, 24}
    model.add_adapter("b", LoraConfig(target_modules=["q_proj"]))
    initialize_lora_eva_weights(model, texts(labels=True), show_progress_bar=False)
    assert model(**texts()[0]).logits.isfinite().all()


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, [[0, 1], [1, 0], [1, 2]]),
        ({"label_mask_value": 3}, [[0, 0], [1, 0], [1, 1], [1, 2]]),
        ({"use_label_mask": False}, [[0, 0], [0, 1], [1, 0], [1, 1], [1, 2]]),
    ],
)
def test_tokens_that_are_padding_or_have_no_label_do_not_count(options, expected):
    batch = {
        "input_ids": torch.tensor([[1, 2, 9], [4, 5, 6]]),
        "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]]),
        "labels": torch.tensor([[-100, 3, 3], [4, -100, 6]]),
    }
    if "label_mask_value" in options:
        expected = [[0, 0], [1, 0], [1, 1], [1, 2]]
    positions = eva.prepare_model_inputs_fn_language_modeling(batch, config(**options))
    assert positions.tolist() == expected
    x = torch.arange(12.0).view(2, 3, 2)
    for layer_input in (x, (x, None), [x]):
        rows = eva.prepare_layer_inputs_fn_language_modeling(layer_input, positions, "layer")
        assert torch.equal(rows, torch.stack([x[row, position] for row, position in expected]))


def test_without_a_mask_all_tokens_count():
    batch = {"input_ids": torch.ones(2, 3, dtype=torch.long)}
    assert len(eva.prepare_model_inputs_fn_language_modeling(batch, config())) == 6


def test_inputs_that_language_models_do_not_have_are_refused():
    with pytest.raises(TypeError, match="must be a dictionary, got a list"):
        eva.prepare_model_inputs_fn_language_modeling([1], config())
    with pytest.raises(ValueError, match=r"neither attention_mask nor input_ids, but \['pixels'\]"):
        eva.prepare_model_inputs_fn_language_modeling({"pixels": 1}, config())
    for wrong in ({"a": 1}, "text", None, ()):
        with pytest.raises(TypeError, match="layer is called with a .*, not with a tensor"):
            eva.prepare_layer_inputs_fn_language_modeling(wrong, torch.zeros(1, 2, dtype=torch.long), "layer")


def test_a_layer_can_have_a_function_of_its_own():
    seen = Counter()

    def half(layer_input, model_input, name):
        seen[name] += 1
        assert model_input is not None
        return layer_input[0][:20]

    functions = {f"{PREFIX}q": half}
    state = components(adapted(target_modules=["q", "o"]), batches(), prepare_layer_inputs_fn=functions)
    assert set(seen) == {f"{PREFIX}q"} and list(functions) == [f"{PREFIX}q"]
    assert alike(state[f"{PREFIX}q"][:2], principal_components([batch[:20] for batch in batches()], 2)[0])
    with pytest.raises(ValueError, match=r"names that no layer has: \['q'\]"):
        components(adapted(), batches(), prepare_layer_inputs_fn={"q": half})


def test_what_is_known_of_a_batch_is_a_copy_of_it():
    def spoil(model, x):
        model(x)
        x.zero_()

    seen = []

    def note(layer_input, model_input, name):
        seen.append(model_input.clone())
        return layer_input[0]

    data = batches()
    components(
        Net(), copy.deepcopy(data), config(target_modules=["q"]), forward_fn=spoil, prepare_layer_inputs_fn=note
    )
    assert torch.equal(seen[0], data[0])


def test_inputs_are_moved_in_any_shape():
    Point = namedtuple("Point", "x y")
    inputs = {
        "a": torch.ones(1),
        "b": [torch.ones(1), 3],
        "c": (1, torch.ones(2)),
        "d": "s",
        "e": Point(torch.ones(1), 2),
    }
    moved = eva.move_inputs_to_device(inputs, "meta")
    assert moved["a"].is_meta and moved["b"][0].is_meta and moved["c"][1].is_meta and moved["e"].x.is_meta
    assert (moved["b"][1], moved["c"][0], moved["d"], moved["e"].y) == (3, 1, "s", 2)
    assert isinstance(moved["c"], tuple) and isinstance(moved["e"], Point)
    assert not inputs["a"].is_meta


def test_where_a_model_is():
    half = nn.Sequential(nn.Linear(2, 2, device="meta"), nn.Linear(2, 2))
    assert eva.get_device_with_meta_params(half) == torch.device("cpu")
    with pytest.raises(ValueError, match="meta device; load its weights first"):
        eva.get_device_with_meta_params(half[0])


# -------------------------------------------------------------------------------------------------------------- the hooks


def test_equal_values_are_found():
    assert eva.find_equal_values({"a": 1, "b": 2, "c": 1, "d": 3, "e": 3}) == {1: ["a", "c"], 3: ["d", "e"]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_equal_tensors_have_the_same_hash(dtype):
    x = torch.arange(6).view(2, 3).to(dtype)
    assert eva.HashHook.hash_fn(x) == eva.HashHook.hash_fn(x.T.contiguous().T)
    assert eva.HashHook.hash_fn(x) != eva.HashHook.hash_fn(x + 1)
    hook, layer = eva.HashHook(name="layer"), nn.Linear(3, 3)
    for _ in range(2):
        hook(layer, (x,), None)
    assert hook.hashed_inputs == [eva.HashHook.hash_fn(x)] * 2


def test_components_that_stay_as_they_are_have_converged(capsys):
    hook, layer = eva.SVDHook(n_components=2, sim_thresh=0.9, name="layer"), nn.Linear(12, 1)
    hook(layer, (torch.randn(1, 12),), None)
    assert "Skipped a batch for layer: it has 1 tokens, fewer than 2 components" in capsys.readouterr().out
    assert not hook.updates
    for batch, converged in zip(batches(3, rows=400), ([False, False], [True, True], [True, True])):
        hook(layer, (batch,), None)
        assert hook.converged.tolist() == converged
    assert alike(hook.svd.components_, principal_components(batches(3, rows=400), 2)[0])
    hook(layer, (torch.eye(12) * 1000,), None)
    assert hook.converged.tolist() == [False, False]


def test_processes_put_their_inputs_together(monkeypatch):
    hook, rows = eva.HashHook(name="layer"), torch.arange(6.0).view(3, 2)
    assert hook.gather_layer_inputs(rows) is rows
    others = [rows, torch.ones(1, 2)]

    def all_gather(parts, tensor):
        for part, other in zip(parts, others):
            part.copy_(
                torch.tensor([len(other)]) if part.dim() == 1 else nn.functional.pad(other, (0, 0, 0, 3 - len(other)))
            )

    for name, value in (("is_initialized", lambda: True), ("get_world_size", lambda: 2), ("all_gather", all_gather)):
        monkeypatch.setattr(torch.distributed, name, value)
    assert torch.equal(hook.gather_layer_inputs(rows), torch.cat(others))
    assert eva.HashHook(name="layer", gather_distributed_inputs=False).gather_layer_inputs(rows) is rows


def test_the_model_is_brought_back_also_after_an_error():
    model = adapted()
    model.base_model.model.q.train()
    modes = [module.training for module in model.modules()]
    seen = []

    def fail(net, x):
        seen.append((net.training, torch.is_grad_enabled()))
        if len(seen) == 2:
            raise KeyError("data")
        return net(x)

    with pytest.raises(KeyError):
        components(model, batches(), forward_fn=fail)
    assert seen[0] == (False, False)
    assert modes == [module.training for module in model.modules()]
    assert not any(module._forward_hooks for module in model.modules())
    components(model, batches())
    assert modes == [module.training for module in model.modules()]


def test_a_search_says_what_it_lacks():
    with pytest.raises(ValueError, match="needs a peft_config, since the model has no adapter"):
        components(Net(), batches())
    with pytest.raises(ValueError, match="The dataloader is empty"):
        components(Net(), [], config())
    with pytest.raises(ValueError, match="finds no layer to look at: target_modules={'x'}"):
        components(Net(), batches(), config(target_modules=["x"]))
    with pytest.raises(ValueError, match=r"There is no adapter 'x'; known are \['default'\]"):
        components(adapted(), batches(), adapter_name="x")
    with pytest.raises(ValueError, match=r"No batch has as many tokens as EVA looks for components \(6 for q\)"):
        components(Net(), batches(rows=4), config())


def test_the_progress_can_be_shown(capsys):
    components(Net(), batches(), config(), show_progress_bar=True)
    assert "EVA: converged layers: 100%" in capsys.readouterr().err
    components(Net(), batches(), config())
    assert not capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ into the adapter


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_an_adapter_starts_with_the_components_as_a_and_b_zero(low_cpu_mem_usage):
    net = Net().eval()
    expected = net(batches()[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = adapted(net, low_cpu_mem_usage=low_cpu_mem_usage)
    state = components(model, batches())
    before = dict(state)
    initialize_lora_eva_weights(model, eva_state_dict=state)
    assert state.keys() == before.keys()
    assert not any(parameter.is_meta for parameter in model.parameters())
    for name in ("q", "k", "o"):
        layer = model.base_model.model.get_submodule(name)
        assert torch.equal(layer.lora_A["default"].weight, state[PREFIX + name].float())
        assert not layer.lora_B["default"].weight.any()
        assert layer.r["default"] == len(state[PREFIX + name]) and layer.scaling["default"] == 2
        assert layer.lora_A["default"].weight.requires_grad and layer.lora_B["default"].weight.requires_grad
    assert torch.allclose(model.eval()(batches()[0]), expected)


def test_wrapping_says_that_a_start_is_drawn_in_vain():
    with pytest.warns(UserWarning, match="low_cpu_mem_usage=True avoids drawing one"):
        layer = adapted(low_cpu_mem_usage=False).base_model.model.q
    assert layer.lora_A["default"].weight.any() and not layer.lora_B["default"].weight.any()


def state_of(ranks_by_name, prefix=PREFIX):
    widths = {"q": 12, "k": 12, "o": 8}
    return {prefix + name: torch.randn(rank, widths[name]) for name, rank in ranks_by_name.items()}


@pytest.mark.parametrize("adjust, alphas", [(True, {"q": 10.0, "o": 2.0}), (False, {})])
def test_the_configuration_says_what_has_changed(adjust, alphas):
    model = adapted(adjust_scaling_factors=adjust)
    initialize_lora_eva_weights(model, eva_state_dict=state_of({"q": 5, "k": 3, "o": 1}))
    settings = model.peft_config["default"]
    assert settings.target_modules == {"q", "k", "o"}
    assert settings.rank_pattern == {"q": 5, "o": 1} and settings.alpha_pattern == alphas
    scalings = {name: model.base_model.model.get_submodule(name).scaling["default"] for name in "qko"}
    assert scalings == ({"q": 2, "k": 2, "o": 2} if adjust else {"q": 6 / 5, "k": 2, "o": 6})


def test_patterns_that_were_there_are_brought_up_to_date():
    model = adapted(rank_pattern={"[qk]": 4}, alpha_pattern={"o": 3})
    initialize_lora_eva_weights(model, eva_state_dict=state_of({"q": 4, "k": 3, "o": 6}))
    settings = model.peft_config["default"]
    assert settings.rank_pattern == {"q": 4, "o": 6}
    assert settings.alpha_pattern == {"k": 4.5}
    assert model.base_model.model.o.lora_alpha["default"] == 6


def test_many_targets_are_written_down_as_suffixes():
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(12, 12)}) for _ in range(24))

    def state(rank_of):
        return {f"layers.{number}.q": torch.randn(rank_of(number), 12) for number in range(24)}

    model = adapted(Deep(), target_modules=["q"])
    initialize_lora_eva_weights(model, eva_state_dict=state(lambda number: 3))
    assert model.peft_config["default"].target_modules == {"q"}
    model = adapted(Deep(), target_modules=["q"])
    initialize_lora_eva_weights(model, eva_state_dict=state(lambda number: 3 if number else 0))
    assert model.peft_config["default"].target_modules == {f"layers.{number}.q" for number in range(1, 24)}
    assert len(model.base_model.targeted_module_names) == 23


def test_an_adapter_leaves_layers_that_get_no_rank():
    model = adapted()
    initialize_lora_eva_weights(model, eva_state_dict=state_of({"q": 6, "k": 3, "o": 0}))
    assert type(model.base_model.model.o) is nn.Linear
    assert model.peft_config["default"].target_modules == {"q", "k"}
    assert sorted(model.base_model.targeted_module_names) == ["k", "q"]
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == {
        f"{PREFIX}{layer}.lora_{factor}.default.weight" for layer in "qk" for factor in "AB"
    }
    model(batches()[0]).sum().backward()
    model.delete_adapter("default")
    model(batches()[0])


def test_a_layer_stays_for_its_other_adapter():
    model = adapted()
    model.add_adapter("b", LoraConfig(target_modules=["o"], r=2, init_lora_weights=False))
    initialize_lora_eva_weights(model, eva_state_dict=state_of({"q": 6, "k": 3, "o": 0}))
    layer = model.base_model.model.o
    assert list(layer.lora_A) == ["b"]
    x = torch.randn(2, 8)
    assert torch.equal(layer(x), layer.base_layer(x))  # the active adapter is not here, and the other is not active
    model.set_adapter("b")
    assert layer.lora_A["b"].weight.requires_grad
    assert not torch.allclose(layer(x), layer.base_layer(x))


def test_an_inactive_adapter_can_be_started():
    net = Net().eval()
    model = get_peft_model(net, LoraConfig(target_modules=["q"], r=2))
    model.add_adapter("b", config(), low_cpu_mem_usage=True)
    initialize_lora_eva_weights(model, eva_state_dict=state_of({"q": 4, "k": 3, "o": 2}), adapter_name="b")
    assert model.active_adapters == ["default"]
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {f"{PREFIX}q.lora_{factor}.default.weight" for factor in "AB"}


def test_a_started_adapter_is_saved_loaded_and_combined(tmp_path):
    net, x = Net().eval(), batches()[0]
    fresh = copy.deepcopy(net)
    model = adapted(net).eval()
    initialize_lora_eva_weights(model, eva_state_dict=state_of({"q": 6, "k": 3, "o": 0}))
    for name in "qk":
        model.base_model.model.get_submodule(name).lora_B["default"].weight.data.normal_()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh, tmp_path)
    assert torch.allclose(loaded(x), model(x))
    model.add_weighted_adapter(["default"], [1.0], "sum", combination_type="linear")
    model.set_adapter("sum")
    assert torch.allclose(loaded(x), model(x), rtol=1e-3)


def test_names_of_a_plain_model_do_as_well():
    model = adapted()
    state = components(Net().eval(), batches(), config())
    initialize_lora_eva_weights(model, eva_state_dict=state)
    assert torch.equal(model.base_model.model.q.lora_A["default"].weight, state["q"].float())


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_layers_without_components_start_as_usual(low_cpu_mem_usage):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.e, self.q = nn.Embedding(20, 12), nn.Linear(12, 8)
            self.conv, self.attention = nn.Conv1d(8, 4, 3), nn.MultiheadAttention(4, 2, batch_first=True)
            self.unused = nn.Linear(3, 3)

        def forward(self, ids):
            x = self.conv(self.q(self.e(ids)).mT).mT
            return self.attention(x, x, x)[0]

    net = Mixed().eval()
    targets = ["e", "q", "conv", "attention", "unused"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = adapted(net, low_cpu_mem_usage=low_cpu_mem_usage, target_modules=targets).eval()
    ids = torch.randint(0, 20, (4, 9))
    with pytest.warns(
        UserWarning, match=r"no components for \['e', 'conv', 'attention', .* and 1 others|no components for"
    ):
        started(model, [ids])
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert model.peft_config["default"].target_modules == set(targets)
    layers = model.base_model.model
    assert not layers.e.lora_embedding_A["default"].any() and layers.e.lora_embedding_B["default"].any()
    for layer in (layers.conv, layers.attention, layers.attention.base_layer.out_proj, layers.unused):
        assert layer.lora_A["default"].weight.any() and not layer.lora_B["default"].weight.any()
    model(ids)


def test_adapters_keep_their_dtype():
    net = Net().bfloat16().eval()
    model = get_peft_model(net, config(), low_cpu_mem_usage=True)
    initialize_lora_eva_weights(model, eva_state_dict=state_of({"q": 5, "k": 3, "o": 1}))
    dtypes = {parameter.dtype for name, parameter in model.named_parameters() if "lora_" in name}
    assert len(dtypes) == 1


def test_a_start_says_what_it_lacks():
    state = state_of({"q": 5, "k": 3, "o": 1})
    with pytest.raises(ValueError, match="needs a PeftModel with a LoRA adapter, got a Net"):
        initialize_lora_eva_weights(Net(), eva_state_dict=state)
    with pytest.raises(ValueError, match="is for init_lora_weights='eva'; 'default' has True"):
        initialize_lora_eva_weights(get_peft_model(Net(), LoraConfig(target_modules=["q"])), eva_state_dict=state)
    with pytest.raises(ValueError, match="needs a dataloader, or the eva_state_dict"):
        initialize_lora_eva_weights(adapted())
    with pytest.raises(ValueError, match="There is no adapter 'x'"):
        initialize_lora_eva_weights(adapted(), eva_state_dict=state, adapter_name="x")
    model = adapted()
    model.add_adapter("b", LoraConfig(target_modules=["q"]))
    model.base_model.set_adapter(["default", "b"])
    merged = adapted(low_cpu_mem_usage=True)
    initialize_lora_eva_weights(merged, eva_state_dict=state)
    merged.merge_adapter()
    with pytest.raises(ValueError, match=r"'default' is merged \(into q and 2 others\) and cannot start over"):
        initialize_lora_eva_weights(merged, eva_state_dict=state)
    with pytest.raises(ValueError, match=r"needs one active adapter, but \['default', 'b'\] are active"):
        initialize_lora_eva_weights(model, eva_state_dict=state)


def test_a_state_that_does_not_fit_changes_nothing():
    model = adapted(low_cpu_mem_usage=True)
    before = copy.deepcopy(model.peft_config["default"].to_dict())
    for wrong, message in (
        ({f"{PREFIX}x": torch.randn(2, 12)}, r"names that no layer has: \['x'\]"),
        (state_of({"q": 2}) | {f"{PREFIX}k": torch.randn(2, 11)}, r"has k of shape \(2, 11\), expected \(rank, 12\)"),
        ({f"{PREFIX}k": torch.randn(12)}, r"has k of shape \(12,\), expected \(rank, 12\)"),
    ):
        with pytest.raises(ValueError, match=message):
            initialize_lora_eva_weights(model, eva_state_dict=wrong)
    assert model.peft_config["default"].to_dict() == before
    assert model.base_model.model.q.lora_A["default"].weight.is_meta
    with pytest.warns(UserWarning, match=r"names that no layer has: \['x'\]"):
        initialize_lora_eva_weights(model, eva_state_dict=state_of({"q": 2, "k": 2, "o": 2}) | {"x": torch.ones(1)})


# ------------------------------------------------------------------------------------------- incremental decomposition


def cloud(rows=60, width=8, shift=2.0):
    return torch.randn(rows, width) * torch.arange(1.0, width + 1) + shift


@pytest.mark.parametrize("options", [{}, {"lowrank": True, "lowrank_q": 8, "lowrank_seed": 1}])
def test_batches_give_what_all_the_data_give(options):
    X = cloud()
    pca = IncrementalPCA(n_components=8, batch_size=20, **options).fit(X)
    centred = (X - X.mean(0)).double()
    _, S, Vh = torch.linalg.svd(centred, full_matrices=False)
    assert alike(pca.components_, Vh)
    assert torch.allclose(pca.singular_values_.double(), S, rtol=1e-4)
    assert torch.allclose(pca.explained_variance_.double(), S.square() / 59, rtol=1e-3)
    assert torch.allclose(pca.explained_variance_ratio_.double(), S.square() / S.square().sum(), rtol=1e-3)
    assert torch.allclose(pca.mean_, X.double().mean(0)) and torch.allclose(pca.var_, X.double().var(0, correction=0))
    assert pca.n_samples_seen_.item() == 60
    assert torch.allclose(pca.transform(X).double(), centred @ pca.components_.double().T, atol=1e-4)


def test_scikit_learn_agrees():
    decomposition = pytest.importorskip("sklearn.decomposition")
    X = cloud()
    theirs, ours = decomposition.IncrementalPCA(n_components=3), IncrementalPCA(n_components=3)
    for rows in (slice(0, 20), slice(20, 45), slice(45, 60)):
        theirs.partial_fit(X[rows].double().numpy())
        ours.partial_fit(X[rows].double())
    for name in ("singular_values_", "explained_variance_", "explained_variance_ratio_", "mean_", "var_"):
        assert torch.allclose(getattr(ours, name), torch.from_numpy(getattr(theirs, name)))
    assert ours.noise_variance_.item() == pytest.approx(theirs.noise_variance_)
    assert alike(ours.components_, torch.from_numpy(theirs.components_))


def test_the_largest_entry_of_a_component_is_positive():
    components = IncrementalPCA().fit(cloud()).components_
    assert components.shape == (8, 8)
    assert (components.gather(1, components.abs().argmax(1, keepdim=True)) > 0).all()


def test_data_stay_as_they_are_unless_told_otherwise():
    X = cloud()
    for kept in (True, False):
        given = X.clone()
        IncrementalPCA(n_components=2, copy=kept).partial_fit(given)
        assert torch.equal(given, X) == kept


def test_a_seed_draws_nothing_from_the_common_generator():
    X = cloud()
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    IncrementalPCA(n_components=2, lowrank=True, lowrank_seed=42).fit(X)
    assert torch.equal(torch.rand(1), expected)
    torch.manual_seed(1)
    IncrementalPCA(n_components=2, lowrank=True).fit(X)
    assert not torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("X", [torch.ones(5, 6, dtype=torch.long), torch.ones(5, 6).half(), [[1.0, 2.0, 3.0]] * 5])
def test_all_numbers_will_do(X):
    assert IncrementalPCA(n_components=2).fit(X).components_.dtype == torch.float32


def test_batches_are_cut_without_a_small_rest():
    cut = IncrementalPCA.gen_batches
    assert list(cut(10, 3)) == [slice(0, 3), slice(3, 6), slice(6, 9), slice(9, 10)]
    assert list(cut(10, 3, min_batch_size=2)) == [slice(0, 3), slice(3, 6), slice(6, 10)]
    assert list(cut(9, 3, min_batch_size=2)) == [slice(0, 3), slice(3, 6), slice(6, 9)]


def test_a_second_fit_starts_over():
    X, Y = cloud(), cloud(shift=-5)
    pca = IncrementalPCA(n_components=2).fit(X)
    assert torch.equal(pca.fit(Y).components_, IncrementalPCA(n_components=2).fit(Y).components_)


def test_data_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="lowrank=True needs n_components or lowrank_q"):
        IncrementalPCA(lowrank=True)
    with pytest.raises(ValueError, match="lowrank_q must be at least n_components=3, got 2"):
        IncrementalPCA(n_components=3, lowrank=True, lowrank_q=2)
    with pytest.raises(ValueError, match="n_components=9 is more than there are features: 8"):
        IncrementalPCA(n_components=9).fit(cloud())
    with pytest.raises(ValueError, match="n_components=3 is more than there are samples in the batch: 2"):
        IncrementalPCA(n_components=3).partial_fit(cloud(rows=2))
    with pytest.raises(ValueError, match=r"got the shape \(6,\)"):
        IncrementalPCA().fit(torch.ones(6))
    with pytest.raises(ValueError, match="got values that are not finite"):
        IncrementalPCA().fit(torch.full((6, 2), torch.nan))
    pca = IncrementalPCA(n_components=2).partial_fit(cloud())
    with pytest.raises(ValueError, match="This batch has 7 features, the ones before had 8"):
        pca.partial_fit(cloud(width=7))
