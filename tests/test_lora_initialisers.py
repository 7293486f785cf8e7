"""How a LoRA adapter starts: the initialisers that need the base weight only, and what they leave of it."""

import copy
import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import peft
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora.base_weight import base_matrices
from peft.tuners.lora.initialisers import INITIALISERS, changes_base, find_initialiser
from peft.tuners.lora.mutated_init import FACTOR
from peft.tuners.lora.olora import orthonormal_factors
from peft.tuners.lora.orthogonal import disjoint_factors
from peft.tuners.lora.pissa import principal_factors


class Net(nn.Module):
    """One layer to adapt, and one that is left alone."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.other = nn.Linear(2, 2)

    def forward(self, x):
        return self.layer(x)


class AttentionNet(Net):
    def forward(self, x):
        return self.layer(x, x, x)[0]


class Experts(nn.Module):
    """Three experts in one parameter, and a plain matrix."""

    def __init__(self, is_transposed=False):
        super().__init__()
        self.is_transposed = is_transposed
        self.stack = nn.Parameter(torch.randn(3, 12, 8) if is_transposed else torch.randn(3, 8, 12))
        self.matrix = nn.Parameter(torch.randn(8, 12))

    def forward(self, x):
        stack = self.stack.mT if self.is_transposed else self.stack
        return torch.einsum("eoi,bi->beo", stack, x) + (x @ self.matrix.T).unsqueeze(1)


LAYERS = {
    "linear": (lambda: nn.Linear(12, 8), (3, 12)),
    "linear, tall": (lambda: nn.Linear(8, 20), (3, 8)),
    "transformers Conv1D": (lambda: Conv1D(8, 12), (2, 3, 12)),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3, padding=1, padding_mode="circular"), (2, 6, 9)),
    "conv2d": (lambda: nn.Conv2d(6, 8, (3, 2), padding=1, stride=2, dilation=2), (2, 6, 9, 9)),
    "conv3d": (lambda: nn.Conv3d(6, 8, (3, 2, 2)), (2, 6, 5, 4, 4)),
    "multihead attention": (lambda: nn.MultiheadAttention(8, 2, batch_first=True), (2, 3, 8)),
    "parameter": (Experts, (2, 12)),
    "experts": (Experts, (2, 12)),
    "transposed experts": (lambda: Experts(is_transposed=True), (2, 12)),
}
PARAMETERS = {"parameter": "layer.matrix", "experts": "layer.stack", "transposed experts": "layer.stack"}
CHANGING = ("pissa", "pissa_niter_8", "olora")
METHODS = (*CHANGING, "orthogonal")


def case(name):
    build, shape = LAYERS[name]
    net = AttentionNet if "attention" in name else Net
    return net(build()).eval(), torch.randn(shape)


def config(init, layer="linear", **options):
    where = {"target_parameters": [PARAMETERS[layer]]} if layer in PARAMETERS else {"target_modules": ["layer"]}
    return LoraConfig(
        **{"r": 4, "lora_alpha": 6, "init_lora_weights": init, **where, **options}, fan_in_fan_out="Conv1D" in layer
    )


def adapted(net, init, layer="linear", **options):
    return get_peft_model(net, config(init, layer, **options)).eval()


def tuner_layer(model):
    return model.base_model.model.layer


def factors(layer, adapter="default"):
    return layer.lora_A[adapter].weight.data, layer.lora_B[adapter].weight.data


def base_state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_state(model, state):
    after = model.state_dict()
    return after.keys() == state.keys() and all(torch.equal(after[name], state[name]) for name in state)


# -------------------------------------------------------------------------------------------------- the mathematics


def test_pissa_takes_the_largest_singular_component_out_of_the_weight():
    net = Net(nn.Linear(2, 2, bias=False))
    net.layer.weight.data = torch.diag(torch.tensor([8.0, 1.0]))
    layer = tuner_layer(adapted(net, "pissa", r=1, lora_alpha=2))
    A, B = factors(layer)
    assert layer.scaling["default"] == 2
    assert torch.allclose(A.abs(), torch.tensor([[2.0, 0.0]])) and torch.allclose(
        B.abs(), torch.tensor([[2.0], [0.0]])
    )
    assert torch.allclose(2 * B @ A, torch.diag(torch.tensor([8.0, 0.0])))
    assert torch.allclose(layer.base_layer.weight, torch.diag(torch.tensor([0.0, 1.0])), atol=1e-6)


def test_olora_takes_the_first_steps_of_gram_and_schmidt_out_of_the_weight():
    net = Net(nn.Linear(2, 2, bias=False))
    net.layer.weight.data = torch.tensor([[3.0, 1.0], [4.0, 2.0]])
    layer = tuner_layer(adapted(net, "olora", r=1, lora_alpha=2))
    A, B = factors(layer)
    assert torch.allclose(B.abs(), torch.tensor([[0.6], [0.8]])) and torch.allclose(
        A.abs(), torch.tensor([[5.0, 2.2]])
    )
    assert torch.allclose(layer.base_layer.weight, torch.tensor([[3.0, 1.0], [4.0, 2.0]]) - 2 * B @ A)


@pytest.mark.parametrize("niter", [None, 20])
@pytest.mark.parametrize("shape", [(8, 12), (20, 8), (3, 8, 12)])
def test_pissa_gives_the_best_approximation_evenly_split(shape, niter):
    U, S, Vh = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    S = 0.5 ** torch.arange(8.0).expand_as(S)  # well apart, so that the randomised decomposition finds them too
    W = (U * S.unsqueeze(-2)) @ Vh
    A, B = principal_factors(W, rank=3, scaling=1.5, niter=niter)
    best = (U[..., :3] * S[..., None, :3]) @ Vh[..., :3, :]
    assert torch.allclose(1.5 * B @ A, best, atol=1e-5)
    assert torch.allclose(A @ A.mT, B.mT @ B, atol=1e-5)


@pytest.mark.parametrize("shape", [(8, 12), (20, 8), (3, 8, 12)])
def test_olora_gives_an_orthonormal_basis_and_all_of_the_weight_at_full_rank(shape):
    W = torch.randn(shape)
    _, B = orthonormal_factors(W, rank=3)
    assert torch.allclose(B.mT @ B, torch.eye(3).expand(*shape[:-2], 3, 3), atol=1e-6)
    A, B = orthonormal_factors(W, rank=8)
    assert torch.allclose(B @ A, W, atol=1e-5)


def test_orthogonal_gives_factors_that_are_not_zero_with_a_product_that_is():
    A, B = disjoint_factors(12, 8, rank=6)
    assert A.shape == (6, 12) and B.shape == (8, 6)
    assert A.norm() > 0.1 and B.norm() > 0.1
    assert (B @ A).abs().max() < 1e-7


# ------------------------------------------------------------------------------------------------ on every kind of layer


@pytest.mark.parametrize("init", METHODS)
@pytest.mark.parametrize("layer", LAYERS)
def test_the_output_is_at_first_that_of_the_base_model(layer, init):
    net, x = case(layer)
    before, expected = base_state(net), net(x)
    model = adapted(net, init, layer)
    assert torch.allclose(model(x), expected, atol=1e-5)
    with model.disable_adapter():
        changed = not torch.allclose(model(x), expected, atol=1e-3)
    assert changed == (init in CHANGING)
    merged = model.merge_and_unload()
    assert all(torch.allclose(tensor, before[name], atol=1e-5) for name, tensor in merged.state_dict().items())


@pytest.mark.parametrize("init", METHODS)
@pytest.mark.parametrize("layer", [name for name in LAYERS if "attention" not in name])
def test_the_factors_have_their_usual_shapes_and_are_not_zero(layer, init):
    net, _ = case(layer)
    usual = factors(tuner_layer(adapted(copy.deepcopy(net), True, layer)))
    found = factors(tuner_layer(adapted(net, init, layer)))
    assert [factor.shape for factor in found] == [factor.shape for factor in usual]
    assert all(factor.abs().max() > 0.01 and factor.is_contiguous() for factor in found)


@pytest.mark.parametrize("init", CHANGING)
def test_the_factors_and_what_is_left_of_the_weight_make_it_up(init):
    net, _ = case("linear")
    before = net.layer.weight.clone()
    layer = tuner_layer(adapted(net, init, use_rslora=True))
    A, B = factors(layer)
    assert layer.scaling["default"] == 3
    assert torch.allclose(layer.base_layer.weight + 3 * B @ A, before, atol=1e-6)
    assert torch.linalg.matrix_rank(layer.base_layer.weight, atol=1e-4) >= 4


@pytest.mark.parametrize("init", CHANGING)
def test_an_attention_has_both_projections_split(init):
    net, _ = case("multihead attention")
    packed, out = net.layer.in_proj_weight.clone(), net.layer.out_proj.weight.clone()
    layer = tuner_layer(adapted(net, init))
    for inner, before in ((layer, packed), (layer.base_layer.out_proj, out)):
        A, B = factors(inner)
        assert not torch.allclose(inner.weight, before, atol=1e-3)
        assert torch.allclose(inner.weight + inner.scaling["default"] * B @ A, before, atol=1e-5)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_8", "olora"])
def test_a_rank_beyond_that_of_the_weight_gives_as_many_components_as_there_are(init):
    net, x = case("linear")
    expected = net(x)
    model = adapted(net, init, r=16)
    A, B = factors(tuner_layer(model))
    assert A.shape == (8, 12) and B.shape == (8, 8)
    assert torch.allclose(model(x), expected, atol=1e-5)


@pytest.mark.parametrize("init", [*METHODS, "corda", "lora_ga", "eva", "gaussian", True])
def test_an_embedding_starts_with_a_zero_and_b_normal_and_stays_as_it_is(init):
    net = Net(nn.Embedding(50, 40))
    before = net.layer.weight.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = tuner_layer(adapted(net, init))
    A, B = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    assert A.shape == (4, 50) and not A.any()
    assert B.shape == (40, 4) and 0.7 < B.std() < 1.3
    assert torch.equal(layer.base_layer.weight, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("init", METHODS)
def test_a_weight_in_half_precision_is_decomposed_in_float32_and_rounded_once(init, dtype):
    net = Net(nn.Linear(12, 8)).to(dtype)
    before = net.layer.weight.float()
    model = adapted(net, init)
    layer = tuner_layer(model)
    assert layer.base_layer.weight.dtype == dtype
    assert {factor.dtype for factor in factors(layer)} == {torch.float32}
    A, B = factors(layer)
    assert torch.allclose(layer.base_layer.weight.float() + 1.5 * B @ A, before, atol=4e-3)
    if init == "pissa":
        A, B = principal_factors(before, 4, 1.5)
        assert torch.equal(layer.base_layer.weight, (before - 1.5 * B @ A).to(dtype))


def test_adapters_keep_the_dtype_of_the_weight_if_asked_to():
    model = get_peft_model(Net(nn.Linear(12, 8)).bfloat16(), config("pissa"), autocast_adapter_dtype=False)
    assert {factor.dtype for factor in factors(tuner_layer(model))} == {torch.bfloat16}


# ----------------------------------------------------------------------------------------------------------------- seeds


def drawn_defaults(fan_in, fan_out, rank):
    return nn.Linear(fan_in, rank, bias=False).weight.data, nn.Linear(rank, fan_out, bias=False).weight.data


def test_a_seed_gives_one_start():
    for init in METHODS:
        starts = []
        for _ in range(2):
            net, _ = case("linear")
            net.load_state_dict({name: torch.ones_like(tensor) for name, tensor in net.state_dict().items()})
            torch.manual_seed(3)
            starts.append(factors(tuner_layer(adapted(net, init))))
        assert all(torch.equal(*pair) for pair in zip(*starts))


def test_the_defaults_are_drawn_before_what_takes_their_place():
    net, _ = case("linear")
    torch.manual_seed(3)
    found = factors(tuner_layer(adapted(net, "orthogonal")))
    torch.manual_seed(3)
    drawn_defaults(12, 8, 4)
    assert all(torch.equal(*pair) for pair in zip(found, disjoint_factors(12, 8, 4)))

    net, _ = case("linear")
    W = net.layer.weight.data.clone()
    torch.manual_seed(3)
    found = factors(tuner_layer(adapted(net, "pissa_niter_1")))
    torch.manual_seed(3)
    drawn_defaults(12, 8, 4)
    assert all(torch.equal(*pair) for pair in zip(found, principal_factors(W, 4, 1.5, niter=1)))

    net, _ = case("linear")
    torch.manual_seed(3)
    A, B = factors(tuner_layer(adapted(net, "gaussian")))
    torch.manual_seed(3)
    drawn_defaults(12, 8, 4)
    assert torch.equal(A, torch.nn.init.normal_(torch.empty(4, 12), std=0.25)) and not B.any()


def test_false_leaves_the_defaults():
    net, _ = case("linear")
    torch.manual_seed(3)
    found = factors(tuner_layer(adapted(net, False)))
    torch.manual_seed(3)
    assert all(torch.equal(*pair) for pair in zip(found, drawn_defaults(12, 8, 4)))


# ---------------------------------------------------------------------------------------------------------------- names


def test_names_are_found_in_upper_and_lower_case():
    assert find_initialiser("PiSSA_niter_16") is INITIALISERS["pissa_niter_N"]
    assert find_initialiser("OLoRA") is INITIALISERS["olora"]
    known = {"corda", "eva", "gaussian", "loftq", "lora_ga", "mica", "olora", "orthogonal", "pissa", "pissa_niter_N"}
    assert set(INITIALISERS) == known
    changing = {"corda", "loftq", "lora_ga", "olora", "pissa", "pissa_niter_N"}
    assert {name for name in known if changes_base(name.replace("N", "4"))} == changing
    assert not changes_base(True) and not changes_base(None)


@pytest.mark.parametrize("layer", ["linear", "conv2d", "embedding"])
@pytest.mark.parametrize(
    "init, nearest",
    [
        ("pisa", "'pissa'"),
        ("pissa_niter", "'pissa_niter_N'"),
        ("olora_2", "'olora'"),
        ("pissa_niter_x", "'pissa_niter_N'"),
    ],
)
def test_an_unknown_name_is_answered_by_the_nearest(layer, init, nearest):
    net = Net(nn.Embedding(5, 3)) if layer == "embedding" else case(layer)[0]
    with pytest.raises(ValueError, match=f"init_lora_weights='{init}' is none of .*Did you mean .*{nearest}"):
        adapted(net, init)
    assert type(net.layer).__module__.startswith("torch")


def test_iterations_without_end_are_refused():
    with pytest.raises(ValueError, match="layer: init_lora_weights='pissa_niter_1001' .* more than 1000 iterations"):
        adapted(case("linear")[0], "pissa_niter_1001")


def test_something_that_is_no_name_is_refused():
    with pytest.raises(ValueError, match="must be True, False or a name, got 5"):
        adapted(case("linear")[0], 5)


def test_the_layers_methods_start_an_adapter_over():
    net, x = case("linear")
    expected = net(x)
    model = adapted(net, True)
    layer = tuner_layer(model)
    layer.orthogonal_init("default")
    A, B = factors(layer)
    assert A.any() and B.any() and (B @ A).abs().max() < 1e-7
    layer.pissa_init("default", "pissa_niter_4")
    assert torch.allclose(model(x), expected, atol=1e-5)
    assert not torch.allclose(layer.base_layer(x), expected, atol=1e-3)
    layer.lora_B["default"].weight.data.zero_()
    left = layer.base_layer(x)
    layer.olora_init("default")
    assert torch.allclose(model(x), left, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("init", CHANGING)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn])
def test_a_weight_in_another_dtype_cannot_be_decomposed(init, dtype):
    net = Net(nn.Linear(4, 4)).to(dtype)
    with pytest.raises(
        TypeError, match=rf"layer: init_lora_weights='{init}' of the adapter 'default' needs .*float32.*got"
    ):
        adapted(net, init, r=2)
    assert type(net.layer) is nn.Linear


@pytest.mark.parametrize("init", METHODS)
def test_a_grouped_convolution_is_refused(init):
    net = Net(nn.Conv2d(4, 8, 3, groups=2))
    with (
        pytest.warns(UserWarning, match="groups"),
        pytest.raises(
            ValueError, match=f"layer: init_lora_weights='{init}' of the adapter 'default' is not for grouped"
        ),
    ):
        adapted(net, init)


def test_an_odd_rank_cannot_be_halved():
    with pytest.raises(ValueError, match=r"layer: .*must be even, got r=3; use 4"):
        adapted(case("linear")[0], "orthogonal", r=3)


def test_a_weight_without_values_cannot_be_decomposed():
    with pytest.raises(RuntimeError, match="layer: .*meta device. Load the model's weights first"):
        adapted(Net(nn.Linear(4, 4, device="meta")), "pissa", r=2)


def test_a_weight_with_merged_adapters_is_not_changed():
    net, _ = case("linear")
    model = adapted(net, True)
    model.merge_adapter()
    message = r"layer: .*'pissa' of the adapter 'b' changes .*\['default'\] are merged into it"
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=message):
        model.add_adapter("b", config("pissa"))
    assert list(model.peft_config) == ["default"]


# --------------------------------------------------------------------------------------------- whole, or not at all


class Three(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(12, 8), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.c(self.b(torch.relu(self.a(x))))


@pytest.mark.parametrize("init", CHANGING)
def test_an_injection_that_fails_leaves_the_base_weights_bit_for_bit(init):
    net = Three()
    net.b.double()
    before = base_state(net)
    with pytest.raises(TypeError):
        get_peft_model(net, LoraConfig(r=2, init_lora_weights=init, target_modules=["a", "b"]))
    assert same_state(net, before) and type(net.a) is nn.Linear


def test_a_second_adapter_that_fails_leaves_the_base_weights_bit_for_bit():
    model = get_peft_model(Three(), LoraConfig(r=2, target_modules=["a"]))
    model.base_model.model.b.double()
    before = base_state(model)
    with warnings.catch_warnings(), pytest.raises(TypeError):
        warnings.simplefilter("ignore")
        model.add_adapter("b", LoraConfig(r=2, init_lora_weights="pissa", target_modules=["a", "b"]))
    assert same_state(model, before)


def test_a_file_that_does_not_fit_leaves_the_base_weights_bit_for_bit(tmp_path):
    net = Three()
    fresh = copy.deepcopy(net)
    get_peft_model(net, LoraConfig(r=2, init_lora_weights="pissa", target_modules=["a", "b"])).save_pretrained(
        tmp_path
    )
    path = tmp_path / "adapter_model.safetensors"
    state = load_file(path)
    state["base_model.model.b.lora_A.weight"] = torch.zeros(3, 8)
    save_file(state, path)
    before = base_state(fresh)
    with pytest.raises(RuntimeError):
        PeftModel.from_pretrained(fresh, tmp_path)
    assert same_state(fresh, before)


@pytest.mark.parametrize("use_dora", [False, True])
def test_layers_that_share_a_weight_take_their_components_out_one_after_the_other(use_dora):
    net = Net(nn.Linear(12, 8))
    net.twin = nn.Linear(12, 8)
    net.twin.weight = net.layer.weight
    net.layer.weight.data = torch.eye(8, 12) * torch.tensor([8.0, 7, 6, 5, 4, 3, 2, 1]).unsqueeze(1)
    settings = LoraConfig(
        r=2, lora_alpha=2, init_lora_weights="pissa", target_modules=["layer", "twin"], use_dora=use_dora
    )
    model = get_peft_model(net, settings).base_model.model
    assert model.twin.base_layer.weight is model.layer.base_layer.weight
    assert torch.allclose(
        model.layer.base_layer.weight.norm(dim=1), torch.tensor([0.0, 0, 0, 0, 4, 3, 2, 1]), atol=1e-5
    )
    for layer, sizes in ((model.layer, [8.0, 7.0]), (model.twin, [6.0, 5.0])):
        A, B = factors(layer)
        assert torch.allclose(torch.linalg.svdvals(B @ A)[:2], torch.tensor(sizes))


# --------------------------------------------------------------------------------------------------------------- DoRA


@pytest.mark.parametrize("init", METHODS)
@pytest.mark.parametrize("layer", ["linear", "transformers Conv1D", "conv2d"])
def test_doras_magnitudes_are_the_norms_of_the_weight_as_it_was(layer, init):
    net, x = case(layer)
    expected, weight = net(x), net.layer.weight.clone()
    model = adapted(net, init, layer, use_dora=True)
    rows = (weight.T if "Conv1D" in layer else weight).flatten(1)
    magnitude = tuner_layer(model).lora_magnitude_vector["default"].weight
    assert torch.allclose(magnitude.flatten(), rows.norm(dim=1), atol=1e-5)
    assert torch.allclose(model(x), expected, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------------- reload


def trained(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1
    return model


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal"])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_saved_adapter_runs_its_start_again_and_then_has_its_own_values(tmp_path, init, low_cpu_mem_usage):
    net = Three()
    fresh, beside, x = copy.deepcopy(net), copy.deepcopy(net), torch.randn(3, 12)
    model = trained(get_peft_model(net, LoraConfig(r=4, init_lora_weights=init, target_modules=["a", "b"])))
    expected = model(x)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["init_lora_weights"] == init
    loaded = PeftModel.from_pretrained(fresh, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.allclose(loaded(x), expected, atol=1e-6)
    assert not any(parameter.is_meta for parameter in loaded.parameters())

    other = get_peft_model(beside, LoraConfig(r=2, target_modules=["c"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other.load_adapter(tmp_path, "loaded", low_cpu_mem_usage=low_cpu_mem_usage)
    other.set_adapter("loaded")
    assert torch.allclose(other(x), expected, atol=1e-6)


def test_a_saved_adapter_goes_on_training_as_if_it_had_not_been_saved(tmp_path):
    def step(model, x):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model(x).square().mean().backward()
        optimizer.step()

    net, x = Three(), torch.randn(3, 12)
    fresh = copy.deepcopy(net)
    model = trained(get_peft_model(net, LoraConfig(r=4, init_lora_weights="pissa", target_modules=["a", "b"])))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh, tmp_path, is_trainable=True)
    for each in (model, loaded):
        step(each, x)
    assert torch.allclose(model(x), loaded(x), atol=1e-6)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_injection_without_storage_changes_the_base_weights_too(init):
    net = Three()
    fresh, x = copy.deepcopy(net), torch.randn(3, 12)
    settings = LoraConfig(r=4, init_lora_weights=init, target_modules=["a", "b"])
    model = trained(get_peft_model(net, settings))
    injected = inject_adapter_in_model(copy.deepcopy(settings), fresh, low_cpu_mem_usage=True)
    set_peft_model_state_dict(injected, peft.get_peft_model_state_dict(model), low_cpu_mem_usage=True)
    assert torch.allclose(injected(x), model(x), atol=1e-6)


@pytest.mark.compat
def test_offloaded_weights_are_changed_where_they_are_kept():
    from accelerate import cpu_offload

    net, x = Three(), torch.randn(3, 12)
    before, expected = net.a.weight.clone(), net(x)
    cpu_offload(net, execution_device="cpu")
    model = get_peft_model(net, LoraConfig(r=4, init_lora_weights="pissa", target_modules=["a"]))
    assert torch.allclose(model(x), expected, atol=1e-5)
    layer = model.base_model.model.a
    A, B = factors(layer)
    assert layer.base_layer.weight.is_meta
    kept = layer.base_layer._hf_hook.weights_map["weight"]
    assert torch.allclose(kept + 2 * B @ A, before, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- conversion


def converted(model, root, **options):
    """Save an adapter as it started, train it, and save it for the base model as it was."""
    model.save_pretrained(root / "start")
    trained(model)
    model.save_pretrained(root / "end", path_initial_model_for_weight_conversion=root / "start", **options)
    return root / "end"


@pytest.mark.parametrize(
    "options",
    [
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "olora", "use_rslora": True},
        {"init_lora_weights": "pissa", "rank_pattern": {"a": 2}, "alpha_pattern": {"b": 3}},
        {"init_lora_weights": "olora", "use_dora": True},
        {"init_lora_weights": "pissa", "bias": "lora_only"},
        {"init_lora_weights": "pissa", "modules_to_save": ["c"]},
        {"init_lora_weights": "orthogonal"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_a_converted_adapter_gives_the_same_output_on_the_original_base_model(tmp_path, options):
    net, x = Three(), torch.randn(3, 12)
    fresh = copy.deepcopy(net)
    model = get_peft_model(net, LoraConfig(r=4, lora_alpha=6, target_modules=["a", "b"], **options))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of orthogonal, which need not be converted
        folder = converted(model, tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(fresh), folder)
    assert torch.allclose(loaded(x), model(x), atol=1e-6)
    before = base_state(fresh)
    if "bias" not in options:
        assert same_state(loaded.unload(), before)
    assert model.peft_config["default"].init_lora_weights == options["init_lora_weights"]
    assert model.peft_config["default"].r == 4 and list(model.peft_config) == ["default"]


def test_the_converted_file_stacks_the_factors(tmp_path):
    net = Three()
    model = get_peft_model(net, LoraConfig(r=4, lora_alpha=6, init_lora_weights="pissa", target_modules=["a"]))
    folder = converted(model, tmp_path)
    start, end = (
        load_file(tmp_path / "start/adapter_model.safetensors"),
        load_file(folder / "adapter_model.safetensors"),
    )
    A, B = factors(model.base_model.model.a)
    key = "base_model.model.a.lora_{}.weight"
    assert end.keys() == start.keys()
    assert torch.equal(end[key.format("A")], torch.cat([A, start[key.format("A")]]))
    assert torch.equal(end[key.format("B")], torch.cat([B, -start[key.format("B")]], 1))


def test_the_converted_configuration_keeps_the_scaling_at_twice_the_rank(tmp_path):
    options = {"rank_pattern": {"a": 2}, "alpha_pattern": {"b": 3}}
    model = get_peft_model(
        Three(), LoraConfig(r=4, lora_alpha=6, init_lora_weights="pissa", target_modules=["a", "b"], **options)
    )
    saved = json.loads((converted(model, tmp_path) / "adapter_config.json").read_text())
    assert saved["init_lora_weights"] is True and saved["corda_config"] is None and saved["lora_ga_config"] is None
    assert saved["r"] == 8 and saved["lora_alpha"] == 12
    assert saved["rank_pattern"] == {"a": 4} and saved["alpha_pattern"] == {"b": 6}
    model = get_peft_model(Three(), LoraConfig(r=4, init_lora_weights="pissa", target_modules=["a"], use_rslora=True))
    saved = json.loads((converted(model, tmp_path / "rs") / "adapter_config.json").read_text())
    assert saved["r"] == 8 and saved["lora_alpha"] == pytest.approx(8 * 2**0.5)
    assert json.loads((tmp_path / "start/adapter_config.json").read_text())["init_lora_weights"] == "pissa"


def test_nothing_is_lost_in_a_conversion(tmp_path):
    class WithEmbedding(Three):
        def __init__(self):
            super().__init__()
            self.e = nn.Embedding(10, 12)

        def forward(self, ids):
            return super().forward(self.e(ids))

    net, ids = WithEmbedding(), torch.arange(10)
    fresh = copy.deepcopy(net)
    settings = LoraConfig(
        r=4, init_lora_weights="pissa", target_modules=["a", "e"], use_dora=True, modules_to_save=["c"]
    )
    model = get_peft_model(net, settings)
    folder = converted(model, tmp_path)
    state = load_file(folder / "adapter_model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
        "base_model.model.a.lora_A.weight": (8, 12),
        "base_model.model.a.lora_B.weight": (8, 8),
        "base_model.model.a.lora_magnitude_vector": (8,),
        "base_model.model.c.bias": (3,),
        "base_model.model.c.weight": (3, 6),
        "base_model.model.e.lora_embedding_A": (8, 10),
        "base_model.model.e.lora_embedding_B": (12, 8),
        "base_model.model.e.lora_magnitude_vector": (12,),
    }
    assert torch.allclose(PeftModel.from_pretrained(fresh, folder)(ids), model(ids), atol=1e-5)


@pytest.mark.parametrize("layer", ["conv2d", "parameter", "experts", "transposed experts", "transformers Conv1D"])
def test_every_kind_of_layer_is_converted(tmp_path, layer):
    net, x = case(layer)
    fresh = copy.deepcopy(net)
    model = adapted(net, "pissa", layer)
    folder = converted(model, tmp_path)
    assert torch.allclose(PeftModel.from_pretrained(fresh, folder)(x), model(x), atol=1e-5)


def test_ranks_and_the_start_decide_whether_a_conversion_makes_sense(tmp_path):
    with pytest.warns(UserWarning, match="use_rslora.*cannot be converted|cannot be converted.*"):
        settings = LoraConfig(
            r=4, init_lora_weights="pissa", target_modules=["a"], use_rslora=True, rank_pattern={"a": 2}
        )
    model = get_peft_model(Three(), settings)
    model.save_pretrained(tmp_path / "start")
    with pytest.raises(
        ValueError, match="'default' cannot be converted .* use_rslora=True together with rank_pattern"
    ):
        model.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=tmp_path / "start")
    assert not (tmp_path / "end").exists()

    model = get_peft_model(Three(), LoraConfig(r=4, init_lora_weights="gaussian", target_modules=["a"]))
    model.save_pretrained(tmp_path / "start")
    with pytest.warns(UserWarning, match="'default' with init_lora_weights='gaussian' did not change the base model"):
        model.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=tmp_path / "start")


def test_the_initial_adapter_must_be_the_same_one(tmp_path):
    model = get_peft_model(Three(), LoraConfig(r=4, init_lora_weights="pissa", target_modules=["a", "b"]))
    small = get_peft_model(Three(), LoraConfig(r=2, target_modules=["a", "b"]))
    other = get_peft_model(Three(), LoraConfig(r=4, target_modules=["a"]))
    for wrong, found in ((small, r"of shape \(2, 12\), expected \(4, 12\)"), (other, "not, expected")):
        wrong.save_pretrained(tmp_path / "start")
        with pytest.raises(ValueError, match=rf"start has base_model.model\.[ab]\.lora_A\.weight {found}"):
            model.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=tmp_path / "start")
    with pytest.raises(ValueError, match="nowhere"):
        model.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=tmp_path / "nowhere")
    assert not (tmp_path / "end").exists()


def test_the_tuner_subtracts_an_initial_adapter_that_has_been_loaded(tmp_path):
    model = get_peft_model(Three(), LoraConfig(r=4, init_lora_weights="pissa", target_modules=["a"]))
    folder = converted(model, tmp_path)
    state = peft.get_peft_model_state_dict(model)
    expected = load_file(folder / "adapter_model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.load_adapter(tmp_path / "start", "start")
    with pytest.raises(ValueError, match="'start' has init_lora_weights='pissa', so that loading it changed"):
        model.base_model.subtract_mutated_init(state, "start")
    model.peft_config["start"].init_lora_weights = True
    found = model.base_model.subtract_mutated_init(state | {"base_model.model.c.weight": torch.ones(1)}, "start")
    assert found.keys() == expected.keys() and all(FACTOR.search(name) for name in found)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# -------------------------------------------------------------------------------------------------------- two adapters


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_4"])
@pytest.mark.parametrize("first", [True, False], ids=["changing one first", "changing one second"])
def test_an_adapter_beside_one_that_changes_the_base_weights_is_warned_of(init, first):
    settings = [LoraConfig(r=2, init_lora_weights=init, target_modules=["a"]), LoraConfig(r=2, target_modules=["a"])]
    settings = settings if first else settings[::-1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = get_peft_model(Three(), settings[0])
    message = rf"init_lora_weights='{init}' changes the base weights, which all adapters use: \['b', 'default'\]"
    with pytest.warns(UserWarning, match=message):
        model.add_adapter("b", settings[1])


def test_the_matrices_of_a_layer_are_a_copy():
    net, _ = case("linear")
    layer = tuner_layer(adapted(net, True))
    base_matrices(layer).zero_()
    assert layer.base_layer.weight.abs().min() > 0
