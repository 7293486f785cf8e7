"""Arrow: tokens routed between LoRA experts by the experts' own weights, with GenKnowSub."""

import copy
import os
import re

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from peft import (
    ArrowConfig,
    IA3Config,
    LoraConfig,
    MontecloraConfig,
    PeftModel,
    PromptTuningConfig,
    create_arrow_model,
    get_peft_model,
    get_peft_model_state_dict,
)
from peft.tuners.lora.arrow import (
    GKS_ADAPTER_PREFIX,
    TASK_ADAPTER_PREFIX,
    ArrowLinearVariant,
    ArrowLoraLinearLayer,
    _locate,
    check_loaded_lora_compatibility_arrow,
    ensure_adapters_target_linear_layers_only,
)

TARGETS = ["first", "second"]


class Net(nn.Module):
    def __init__(self, linear=nn.Linear):
        super().__init__()
        torch.manual_seed(1)
        self.first = linear(6, 8) if linear is nn.Linear else linear(8, 6)
        self.second = linear(8, 4) if linear is nn.Linear else linear(4, 8)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.second(self.first(x).tanh()))


def save_expert(folder, seed, model=None, **options):
    options = {"r": 2, "lora_alpha": 3, "target_modules": TARGETS, "init_lora_weights": False, **options}
    model = Net() if model is None else model
    torch.manual_seed(seed)
    model = get_peft_model(model, LoraConfig(**options))
    stretch(model)
    model.save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def stretch(model, adapter="default"):
    """Set the first singular value apart from the others, so that few steps of a power iteration find its vector."""
    for name, parameter in model.named_parameters():
        if name.endswith(f"lora_B.{adapter}.weight"):
            parameter[:, 0] *= 4


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """Folders of four experts and two general-knowledge adapters."""
    root = tmp_path_factory.mktemp("adapters")
    names = [*(f"expert{i}" for i in range(4)), *(f"general{i}" for i in range(2))]
    return [save_expert(root / name, 10 + i) for i, name in enumerate(names)]


def routed(experts, count=3, model=None, general=0, **options):
    options = {"top_k": 2, "router_temperature": 0.7, "rng_seed": 3, **options}
    config = ArrowConfig(use_gks=bool(general), **options)
    return create_arrow_model(Net() if model is None else model, experts[:count], config, experts[4 : 4 + general])


def layer_of(model):
    return model.base_model.model.first


def router_of(model):
    return layer_of(model).lora_arrow["arrow_router"]


def expert_factors(layer, name):
    return layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach()


def reference(layer, x, names, general=(), top_k=2, temperature=0.7):
    """The routed layer, token by token and by the exact singular vectors."""
    rows = []
    shared = [sum(expert_factors(layer, name)[i] for name in general) / max(len(general), 1) for i in (0, 1)]
    factors = [[factor - s for factor, s in zip(expert_factors(layer, name), shared)] for name in names]
    for token in x.reshape(-1, x.shape[-1]):
        scores = [abs(token @ torch.linalg.svd(B @ A).Vh[0]) for A, B in factors]
        best = sorted(range(len(names)), key=lambda e: -scores[e])[:top_k]
        shares = torch.stack([scores[e] / temperature for e in best]).softmax(0)
        mixed = sum(c * layer.scaling[names[e]] * factors[e][1] @ factors[e][0] @ token for c, e in zip(shares, best))
        rows.append(layer.base_layer(token) + mixed)
    return torch.stack(rows).view(*x.shape[:-1], -1)


# --------------------------------------------------------------------------------------------------------- the mathematics


def worked_example(**options):
    """Two experts on two inputs: e0 doubles the first into the first output, e1 trebles the second."""
    config = ArrowConfig(**{"top_k": 2, "rng_seed": 0, **options})
    config.task_adapter_names = ["e0", "e1"]
    router = ArrowLoraLinearLayer(2, config)
    A = nn.ModuleDict({name: nn.Linear(2, 1, bias=False) for name in ("e0", "e1")})
    B = nn.ModuleDict({name: nn.Linear(1, 1, bias=False) for name in ("e0", "e1")})
    for name, direction, gain in (("e0", [1.0, 0.0], 2.0), ("e1", [0.0, 1.0], 3.0)):
        A[name].weight.data = torch.tensor([direction])
        B[name].weight.data = torch.tensor([[gain]])
    return router, A, B


def test_worked_example():
    router, A, B = worked_example(router_temperature=2.0)
    scaling = {"e0": 1.0, "e1": 0.5}
    output = router(torch.tensor([[3.0, -1.0]]), A, B, nn.Identity(), scaling)
    assert router.prototypes.abs().tolist() == [[1.0, 0.0], [0.0, 1.0]]
    c = torch.tensor([1.5, 0.5]).softmax(0)
    torch.testing.assert_close(output, (c[0] * 6 - c[1] * 1.5).view(1, 1))


def test_tokens_that_are_not_among_the_best_get_nothing():
    router, A, B = worked_example(top_k=1)
    output = router(torch.tensor([[3.0, -1.0], [1.0, -4.0]]), A, B, nn.Identity(), {"e0": 1.0, "e1": 1.0})
    assert output.tolist() == [[6.0], [-12.0]]


def test_prototype_is_the_first_right_singular_vector():
    router, _, _ = worked_example()
    A, B = torch.randn(3, 6), torch.randn(5, 3)
    B[:, 0] *= 10
    found = router.top_right_singular_vec_from_BA(A, B, iters=60)
    assert abs(found @ torch.linalg.svd(B @ A).Vh[0]) > 1 - 1e-5
    both = router.top_right_singular_vec_from_BA(torch.stack([A, A]), torch.stack([B, B]), iters=60)
    torch.testing.assert_close(both, torch.stack([found, found]))
    assert router.top_right_singular_vec_from_BA(A.bfloat16(), B.bfloat16()).dtype == torch.bfloat16


def test_zero_experts_have_no_prototype_and_add_nothing():
    router, A, B = worked_example()
    for name in B:
        B[name].weight.data.zero_()
    assert router(torch.randn(3, 2), A, B, nn.Identity(), {"e0": 1.0, "e1": 1.0}).tolist() == [[0.0]] * 3
    assert router.prototypes.tolist() == [[0.0, 0.0]] * 2


def test_routed_output(experts):
    model, x = routed(experts), torch.randn(2, 5, 6)
    expected = reference(layer_of(model), x, ["task_0", "task_1", "task_2"])
    torch.testing.assert_close(layer_of(model)(x), expected, rtol=1e-3, atol=1e-3)
    assert model(x).shape == (2, 5, 3)


def test_general_knowledge_is_subtracted_on_the_way(experts):
    model, x = routed(experts, general=2), torch.randn(2, 5, 6)
    before = {name: get_peft_model_state_dict(model, adapter_name=name) for name in ("task_0", "gks_1")}
    output = layer_of(model)(x)
    expected = reference(layer_of(model), x, ["task_0", "task_1", "task_2"], ["gks_0", "gks_1"])
    torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-3)
    for name, state in before.items():
        after = get_peft_model_state_dict(model, adapter_name=name)
        assert all(torch.equal(after[key], state[key]) for key in state)


def test_a_saved_expert_is_the_one_that_was_loaded(experts, tmp_path):
    model = routed(experts, general=1)
    model(torch.randn(3, 6))
    model.save_pretrained(tmp_path)
    again, original = (PeftModel.from_pretrained(Net(), path) for path in (tmp_path / "task_1", experts[1]))
    for key, value in get_peft_model_state_dict(original).items():
        assert torch.equal(get_peft_model_state_dict(again)[key], value)


def test_a_seed_gives_one_output_and_no_seed_one_per_model(experts):
    x = torch.randn(20, 6)
    assert torch.equal(routed(experts)(x), routed(experts)(x))
    model = routed(experts, rng_seed=None)
    first = model(x)
    model.set_adapter("task_0")
    model.set_adapter("arrow_router")
    assert torch.equal(model(x), first)


def test_dropout_is_on_the_mixed_output(experts):
    model, x = routed(experts), torch.randn(4, 6)
    layer = layer_of(model)
    layer.lora_dropout["arrow_router"] = nn.Dropout(0.5).eval()
    plain = layer(x) - layer.base_layer(x)
    model.train()
    torch.manual_seed(1)
    dropped = layer(x) - layer.base_layer(x)
    torch.manual_seed(1)
    torch.testing.assert_close(dropped, nn.functional.dropout(plain, 0.5))


def test_biases_of_experts_count(tmp_path):
    paths = [save_expert(tmp_path / str(i), i, lora_bias=True) for i in range(2)]
    model, x = create_arrow_model(Net(), paths, ArrowConfig(top_k=2)), torch.zeros(1, 6)
    layer = layer_of(model)
    # A token of zeros is no nearer to one expert than to another.
    expected = sum(layer.scaling[name] * layer.lora_B[name].bias for name in ("task_0", "task_1")) / 2
    torch.testing.assert_close(layer(x)[0], layer.base_layer.bias + expected)


@pytest.mark.parametrize("general", [0, 2])
@pytest.mark.parametrize("mode", ["bfloat16", "bfloat16 adapters", "autocast"])
def test_half_precision(experts, mode, general):
    exact, x = routed(experts, general=general), torch.randn(2, 5, 6, requires_grad=True)
    model = copy.deepcopy(exact)
    if mode == "bfloat16 adapters":
        model = create_arrow_model(
            Net().bfloat16(),
            experts[:3],
            ArrowConfig(top_k=2, router_temperature=0.7, rng_seed=3, use_gks=bool(general)),
            experts[4:],
            autocast_adapter_dtype=False,
        )
    elif mode == "bfloat16":
        model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        output = model(x if mode == "autocast" else x.bfloat16())
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    expected = exact(x)
    # Close scores may be ranked otherwise in half precision; most tokens go the same way.
    close = (output.float() - expected).abs().amax(-1) < 0.1 * expected.abs().max()
    assert close.float().mean() >= 0.8


def test_gradients_reach_the_input_also_after_an_inference(experts):
    model, x = routed(experts), torch.randn(3, 6, requires_grad=True)
    with torch.inference_mode():
        model(torch.randn(3, 6))
    model(x).sum().backward()
    assert x.grad.abs().sum() > 0 and not any(parameter.grad is not None for parameter in model.parameters())


# --------------------------------------------------------------------------------------------------------- life cycle


def test_what_is_made(experts):
    model = routed(experts, general=2)
    assert list(model.peft_config) == ["task_0", "task_1", "task_2", "gks_0", "gks_1", "arrow_router"]
    assert (TASK_ADAPTER_PREFIX, GKS_ADAPTER_PREFIX) == ("task_", "gks_")
    assert model.active_adapters == ["arrow_router"] and not model.training
    config = model.peft_config["arrow_router"]
    assert (config.target_modules, config.r, config.lora_alpha) == (set(TARGETS), 2, 8)
    assert config.arrow_config.task_adapter_names == ["task_0", "task_1", "task_2"]
    assert config.arrow_config.gks_adapter_names == ["gks_0", "gks_1"]
    assert not [name for name in model.state_dict() if "arrow" in name and "arrow_router.weight" not in name]


def test_general_adapters_are_not_loaded_for_nothing(experts):
    model = create_arrow_model(Net(), experts[:2], ArrowConfig(top_k=1), general_adapter_paths=experts[4:])
    assert list(model.peft_config) == ["task_0", "task_1", "arrow_router"]
    assert model.peft_config["arrow_router"].arrow_config.gks_adapter_names == []


def test_nothing_trains_while_the_router_is_active(experts):
    def training(model):
        return sorted({name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad})

    model = routed(experts, general=1)
    assert training(model) == []
    model.set_adapter("task_1")
    assert training(model) == ["task_1"]
    model.set_adapter("arrow_router")
    assert training(model) == []
    model.set_requires_grad("arrow_router", True)
    assert training(model) == []


def test_disabling_gives_the_base_model(experts):
    model, x = routed(experts), torch.randn(3, 6)
    output = model(x)
    with model.disable_adapter():
        assert torch.equal(model(x), Net()(x))
    assert torch.equal(model(x), output)


def test_an_expert_can_be_used_alone_and_trained_on(experts):
    model, x = routed(experts), torch.randn(10, 6)
    before = model(x)
    model.set_adapter("task_1")
    torch.testing.assert_close(model(x), PeftModel.from_pretrained(Net(), experts[1])(x))
    with torch.no_grad():
        for layer in (layer_of(model), model.base_model.model.second):
            layer.lora_A["task_1"].weight += torch.randn_like(layer.lora_A["task_1"].weight)
    model.set_adapter("arrow_router")
    output = layer_of(model)(x)
    expected = reference(layer_of(model), x, ["task_0", "task_1", "task_2"])
    assert (output - expected).abs().max() < 0.1 * (model(x) - before).abs().max()


def test_later_adapters_join(experts):
    model, x = routed(experts), torch.randn(3, 6)
    model(x)
    model.load_adapter(experts[3], "later")
    names = ["task_0", "task_1", "task_2", "later"]
    assert router_of(model).task_adapter_names == names
    expected = reference(layer_of(model), x, names)
    torch.testing.assert_close(layer_of(model)(x), expected, rtol=1e-3, atol=1e-3)
    assert router_of(model).prototypes.shape == (4, 6)


def test_later_adapters_may_have_another_rank(experts):
    model, x = routed(experts), torch.randn(3, 6)
    model.add_adapter("wide", LoraConfig(r=3, target_modules=TARGETS, init_lora_weights=False))
    stretch(model, "wide")
    expected = reference(layer_of(model), x, ["task_0", "task_1", "task_2", "wide"])
    torch.testing.assert_close(layer_of(model)(x), expected, rtol=1e-3, atol=1e-3)


def test_who_does_not_join(experts):
    model = routed(experts)
    model.add_adapter("gks_7", LoraConfig(r=2, target_modules=TARGETS))
    model.add_adapter("dora", LoraConfig(r=2, target_modules=TARGETS, use_dora=True))
    model.add_adapter("noisy", LoraConfig(r=2, target_modules=TARGETS, monteclora_config=MontecloraConfig()))
    assert router_of(model).task_adapter_names == ["task_0", "task_1", "task_2", "noisy"]


def test_later_adapters_on_other_modules_leave_the_rest_alone(experts):
    model, x = routed(experts), torch.randn(3, 6)
    output = model(x)
    model.add_adapter("head", LoraConfig(r=2, target_modules=["head"], init_lora_weights=False))
    assert torch.equal(model(x), output)


def test_loading_other_weights_into_an_expert_is_noticed(experts):
    model, x = routed(experts), torch.randn(3, 6)
    before = model(x)
    model.load_adapter(experts[3], "task_1")
    torch.testing.assert_close(model(x), routed([experts[0], experts[3], experts[2]])(x))
    assert not torch.equal(model(x), before)


def test_a_deleted_expert_is_not_used_any_more(experts):
    model, x = routed(experts), torch.randn(3, 6)
    model(x)
    model.delete_adapter("task_1")
    assert model.active_adapters == ["arrow_router"]
    torch.testing.assert_close(model(x), routed([experts[0], experts[2]], 2)(x))


def test_deleting_the_router_leaves_nothing_of_it(experts):
    model = routed(experts)
    with pytest.warns(UserWarning, match="'arrow_router' was deleted; 'task_0' becomes the active one"):
        model.delete_adapter("arrow_router")
    assert "arrow_router" not in layer_of(model).lora_arrow and len(layer_of(model).lora_A) == 3
    torch.testing.assert_close(model(torch.ones(1, 6)), PeftModel.from_pretrained(Net(), experts[0])(torch.ones(1, 6)))


def test_copies_route_as_the_original(experts):
    model, x = routed(experts), torch.randn(3, 6)
    before = model(x)
    assert torch.equal(copy.deepcopy(model)(x), before)
    assert copy.deepcopy(model).double()(x.double()).dtype == torch.float64


def test_mixed_batch(experts):
    model, x = routed(experts), torch.randn(4, 5, 6)
    mixed = model(x, adapter_names=["arrow_router", "task_1", "__base__", "arrow_router"])
    whole = {"arrow_router": model(x), "__base__": Net()(x)}
    model.set_adapter("task_1")
    whole["task_1"] = model(x)
    for row, name in enumerate(["arrow_router", "task_1", "__base__", "arrow_router"]):
        torch.testing.assert_close(mixed[row], whole[name][row])


@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
def test_a_router_cannot_be_merged(experts, call):
    model, x = routed(experts), torch.randn(3, 6)
    before = model(x)
    with pytest.raises(
        RuntimeError, match="(first|second): the Arrow router 'arrow_router' chooses experts per token"
    ):
        getattr(model.base_model, call)()
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("hook", ["merge_safe", "merge_unsafe", "unmerge"])
def test_the_variant_refuses_to_merge(experts, hook):
    layer = layer_of(routed(experts))
    with pytest.raises(RuntimeError, match="has no merged weight"):
        getattr(ArrowLinearVariant, hook)(layer, "arrow_router", layer.weight)
    with pytest.raises(RuntimeError, match="has no merged weight"):
        layer.get_delta_weight("arrow_router")
    assert not layer.supports_lora_conversion("arrow_router") and layer.supports_lora_conversion("task_0")


def test_an_expert_can_be_merged(experts):
    model, x = routed(experts), torch.randn(3, 6)
    model.set_adapter("task_0")
    expected = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected)


def test_unload_gives_the_base_model(experts):
    x = torch.randn(3, 6)
    base = routed(experts).unload()
    assert type(base) is Net and torch.equal(base(x), Net()(x))


# -------------------------------------------------------------------------------------------------------------- files


def test_a_saved_router_works_again_once_its_experts_are_there(experts, tmp_path):
    model, x = routed(experts, general=1), torch.randn(3, 6)
    expected = model(x)
    model.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["README.md", "arrow_router", "gks_0", "task_0", "task_1", "task_2"]
    loaded = PeftModel.from_pretrained(Net(), tmp_path / "arrow_router", adapter_name="router")
    config = loaded.peft_config["router"].arrow_config
    assert config == model.peft_config["arrow_router"].arrow_config
    with pytest.raises(ValueError, match=r"'router' has no experts to route to.*model.load_adapter\(path"):
        loaded(x)
    for name in ("task_0", "task_1", "task_2"):
        loaded.load_adapter(tmp_path / name, name)
    with pytest.raises(
        ValueError, match=r"general-knowledge adapters \['gks_0'\] \(use_gks\), of which \['gks_0'\] are not here"
    ):
        loaded(x)
    loaded.load_adapter(tmp_path / "gks_0", "gks_0")
    torch.testing.assert_close(loaded(x), expected)


def test_a_router_made_by_hand_names_its_general_adapters(experts):
    model = routed(experts)
    router = LoraConfig(r=2, target_modules=TARGETS, arrow_config=ArrowConfig(top_k=1, use_gks=True))
    model.add_adapter("router", router)
    model.set_adapter("router")
    with pytest.raises(
        ValueError, match="'router' is to subtract .*the gks_adapter_names of its ArrowConfig name none"
    ):
        model(torch.randn(3, 6))
    assert router_of(model).task_adapter_names == ["task_0", "task_1", "task_2"]


def test_general_adapters_have_the_rank_of_the_experts(experts):
    model = routed(experts, general=1)
    model.add_adapter("wide", LoraConfig(r=3, target_modules=TARGETS))
    with pytest.raises(ValueError, match="of one rank .*, got {'task_0': 2, .*'wide': 3, 'gks_0': 2}"):
        model(torch.randn(3, 6))


@pytest.mark.parametrize("error", [ValueError, RuntimeError])
def test_more_experts_per_token_than_there_are(experts, error):
    model = routed(experts, 2, top_k=3)
    with pytest.raises(
        error,
        match=r"first: the Arrow router 'arrow_router' is to .*top_k=3 .*but there are 2: \['task_0', 'task_1'\].*at most 2",
    ):
        model(torch.randn(3, 6))
    model.load_adapter(experts[3], "third")
    assert model(torch.randn(3, 6)).isfinite().all()


def test_a_path_may_be_a_repository_with_a_folder(tmp_path, experts):
    assert _locate("user/repository", {}) == ("user/repository", {})
    assert _locate("user/repository/a/b", {"token": "t"}) == ("user/repository", {"subfolder": "a/b", "token": "t"})
    assert _locate("user/repository/a", {"subfolder": "b"}) == ("user/repository", {"subfolder": "b"})
    assert _locate("repository", {}) == ("repository", {})
    assert _locate(experts[0], {}) == (experts[0], {})
    assert _locate(os.path.dirname(experts[0]), {"subfolder": "expert0"})[1] == {"subfolder": "expert0"}


@pytest.mark.parametrize(
    ("path", "message"),
    [("", "There is no adapter in the folder"), ("nowhere", "There is no folder .*nowhere' to load an adapter from")],
)
def test_a_path_without_an_adapter(experts, tmp_path, path, message):
    with pytest.raises(ValueError, match=message):
        create_arrow_model(Net(), [experts[0], str(tmp_path / path)], ArrowConfig())


# -------------------------------------------------------------------------------------------- experts that do not fit


def refused(error, message, paths, model=None, config=None, general=None):
    """Nothing is left behind by what is refused."""
    model = Net() if model is None else model
    config = ArrowConfig() if config is None else config
    before = {name: (id(module), module.training) for name, module in model.named_modules()}
    with pytest.raises(error, match=message):
        create_arrow_model(model, paths, config, general)
    assert {name: (id(module), module.training) for name, module in model.named_modules()} == before
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert config.task_adapter_names is None and config.gks_adapter_names is None
    assert not getattr(model, "peft_config", None)


def test_no_experts():
    refused(ValueError, "task_specific_adapter_paths is empty", [])


def test_general_knowledge_without_adapters(experts):
    refused(ValueError, "needs general_adapter_paths", experts[:2], config=ArrowConfig(use_gks=True))


def test_another_rank(experts, tmp_path):
    other = save_expert(tmp_path, 1, r=3)
    refused(ValueError, r"first: .*must have one rank, got r=3 for 'task_1' and r=2 for 'task_0'", [experts[0], other])


def test_other_modules(experts, tmp_path):
    other = save_expert(tmp_path, 1, target_modules=["first", "head"])
    message = r"'task_1' adapts \['.*head'\] more than 'task_0' and \['.*second'\] less"
    refused(ValueError, message, [experts[0], other])


def test_general_adapters_must_fit_too(experts, tmp_path):
    other = save_expert(tmp_path, 1, r=3)
    refused(ValueError, "r=3 for 'gks_0'", experts[:2], config=ArrowConfig(use_gks=True), general=[other])


def test_dora_experts(tmp_path):
    paths = [save_expert(tmp_path / str(i), i, use_dora=True) for i in range(2)]
    refused(ValueError, r"'task_0' is no plain LoRA adapter \(it has a DoraLinearVariant\)", paths)


@pytest.mark.parametrize(
    "layer", [nn.Embedding(6, 8), nn.Conv2d(6, 8, 1), nn.MultiheadAttention(6, 2)], ids=lambda l: type(l).__name__
)
def test_layers_that_are_not_linear(tmp_path, layer):
    def model():
        return nn.ModuleDict({"first": copy.deepcopy(layer)})

    path = save_expert(tmp_path, 1, model=model(), target_modules=["first"])
    message = f"'task_0' adapts base_model.model.first, which is a {type(layer).__name__}"
    refused(TypeError, message, [path], model=model())


@pytest.mark.parametrize(
    "config",
    [IA3Config(target_modules=["first"], feedforward_modules=[]), LoraConfig(target_parameters=["first.weight"])],
    ids=["IA3", "target_parameters"],
)
def test_adapters_of_other_sorts(tmp_path, config):
    get_peft_model(Net(), config).save_pretrained(tmp_path)
    if config.peft_type == "LORA":
        refused(TypeError, "'task_0' adapts base_model.model.first, which is a Linear", [str(tmp_path)])
    else:
        refused(ValueError, r"No LoRA layer holds the adapters \['task_0'\]", [str(tmp_path)])


@pytest.mark.compat
def test_prompts(tmp_path):
    def model():
        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        return LlamaForCausalLM(LlamaConfig(vocab_size=11, **sizes)).train()

    get_peft_model(model(), PromptTuningConfig("CAUSAL_LM", num_virtual_tokens=2)).save_pretrained(tmp_path)
    refused(ValueError, "No LoRA layer holds", [str(tmp_path)], model=model())


def test_copies_of_modules_are_not_routed(tmp_path):
    paths = [save_expert(tmp_path / str(i), i, modules_to_save=["head"]) for i in range(2)]
    with pytest.warns(UserWarning, match=r"The experts \['task_0', 'task_1'\] have copies of modules"):
        model = create_arrow_model(Net(), paths, ArrowConfig(top_k=1))
    head = model.base_model.model.head
    hidden = torch.randn(3, 4)
    assert torch.equal(head(hidden), Net().head(hidden))


def test_checks_of_a_loaded_model(experts):
    model = routed(experts)
    assert check_loaded_lora_compatibility_arrow(model, ["task_0", "task_1"]) == (TARGETS, 2)
    assert ensure_adapters_target_linear_layers_only(model, ["task_0"]) is None
    for check in (check_loaded_lora_compatibility_arrow, ensure_adapters_target_linear_layers_only):
        with pytest.raises(ValueError, match=re.escape("['task_9']; known are ['arrow_router', 'task_0', 'task_1'")):
            check(model, ["task_0", "task_9"])


def test_transformers_conv1d(tmp_path):
    paths = [save_expert(tmp_path / str(i), i, model=Net(Conv1D), fan_in_fan_out=True) for i in range(3)]
    model, x = routed(paths, model=Net(Conv1D)), torch.randn(2, 5, 6)
    expected = reference(layer_of(model), x, ["task_0", "task_1", "task_2"])
    torch.testing.assert_close(layer_of(model)(x), expected, rtol=1e-3, atol=1e-3)


def test_router_is_only_where_experts_are(tmp_path):
    def model():
        torch.manual_seed(0)
        return nn.Sequential(Net(), nn.Linear(3, 6), Net())

    paths = [save_expert(tmp_path / str(i), i, model=model(), target_modules=["0.first"]) for i in range(2)]
    routed_model, x = create_arrow_model(model(), paths, ArrowConfig(top_k=1)), torch.randn(3, 6)
    assert "arrow_router" in routed_model.base_model.model[2].first.lora_A
    hidden = routed_model.base_model.model[2].first
    assert torch.equal(hidden(x), model()[2].first(x)) and routed_model(x).isfinite().all()


@pytest.mark.parametrize("option", ["top_k", "router_temperature"])
def test_options_are_checked(option):
    with pytest.raises(ValueError, match=f"{option} of ArrowConfig must be positive, got 0"):
        ArrowConfig(**{option: 0})
