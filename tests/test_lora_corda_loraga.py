"""CorDA and LoRA-GA: what their preparations leave at the layers, the files that keep it, and how an adapter starts from it."""

import copy
import warnings

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft import LoraConfig, LoraGAConfig, PeftModel, get_peft_model
from peft.tuners.lora import corda, loraga, preprocess_loraga
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import CordaEigens, preprocess_corda
from peft.tuners.lora.loraga import GRADIENT
from peft.tuners.lora.pissa import principal_factors


class Net(nn.Module):
    """Two targets, one of them transposed, a dropout, and a layer that is left alone."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(12, 16)
        self.dropout = nn.Dropout(0.5)
        self.b = Conv1D(10, 16)
        self.c = nn.Linear(10, 8)

    def forward(self, x):
        return self.c(self.b(self.dropout(torch.relu(self.a(x)))))


def corda_config(**options):
    settings = {key: options.pop(key) for key in list(options) if key in CordaConfig.__dataclass_fields__}
    options = {"r": 3, "lora_alpha": 6, "target_modules": ["a", "b"], "fan_in_fan_out": True, **options}
    return LoraConfig(init_lora_weights="corda", corda_config=CordaConfig(**settings), **options)


def loraga_config(**options):
    settings = {key: options.pop(key) for key in list(options) if key in LoraGAConfig.__dataclass_fields__}
    options = {"r": 3, "lora_alpha": 6, "target_modules": ["a", "b"], "fan_in_fan_out": True, **options}
    return LoraConfig(init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig(**settings), **options)


def quietly(function, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fan_in_fan_out is right for one of the two layers
        return function(*args, **kwargs)


def sample_runs(model, count=3, rows=1):
    def run():
        for seed in range(count):
            generator = torch.Generator().manual_seed(seed)
            model(torch.randn(rows, 7, 12, generator=generator))

    return run


def train_step(model, count=2, sign=1):
    def step():
        for seed in range(count):
            generator = torch.Generator().manual_seed(seed)
            (sign * model(torch.randn(5, 12, generator=generator)).square().mean()).backward()

    return step


def without_dropout(net):
    net.dropout.p = 0.0
    return net


def matrix(module):
    return module.weight.T if isinstance(module, Conv1D) else module.weight


def layers(model):
    return {name: model.base_model.model.get_submodule(name) for name in ("a", "b")}


def product(layer, adapter="default"):
    return layer.scaling[adapter] * layer.lora_B[adapter].weight @ layer.lora_A[adapter].weight


def left_alone(net, before):
    """Whether the weights, their flags, the modes and the hooks of a model are as they were."""
    flags, modes, state = before
    return (
        flags == [parameter.requires_grad for parameter in net.parameters()]
        and modes == [module.training for module in net.modules()]
        and all(torch.equal(value, net.state_dict()[name]) for name, value in state.items())
        and not any(module._forward_hooks or module._backward_hooks for module in net.modules())
        and all(parameter.grad is None for parameter in net.parameters())
    )


def snapshot(net):
    return (
        [parameter.requires_grad for parameter in net.parameters()],
        [module.training for module in net.modules()],
        copy.deepcopy(net.state_dict()),
    )


# --------------------------------------------------------------------------------------------------- CorDA's preparation


def test_corda_decomposes_the_weight_times_the_covariance_of_the_inputs():
    net = without_dropout(Net())
    config = corda_config(prune_temporary_fields=False)
    preprocess_corda(net, config, run_model=sample_runs(net))
    inputs = [torch.randn(7, 12, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    expected = sum((x / x.max().abs()).T @ (x / x.max().abs()) for x in inputs) / 3
    assert torch.allclose(net.a.covariance_matrix, expected, atol=1e-6)
    assert (net.a.corda_method, net.a.rank) == ("ipm", 3)

    damped = expected + 0.01 * expected.diagonal().mean() * torch.eye(12)
    U, S, Vh = torch.linalg.svd(net.a.weight @ damped, full_matrices=False)
    eigens = net.a.eigens
    assert torch.allclose(eigens.S_WC, S[:3], atol=1e-4)
    assert torch.allclose((eigens.U_WC * U[:, :3]).sum(0).abs(), torch.ones(3), atol=1e-4)
    assert torch.allclose(eigens.V_WC.T @ damped @ (eigens.V_WC.T @ damped).T, torch.eye(3), atol=1e-3)


def test_corda_with_the_identity_as_covariance_is_pissa(tmp_path):
    net = Net()
    weight = net.a.weight.detach().clone()
    torch.save({"a": torch.eye(12)}, tmp_path / "covariances.pt")
    config = corda_config(target_modules=["a"], covariance_file=tmp_path / "covariances.pt")
    preprocess_corda(net, config)
    model = quietly(get_peft_model, net, config)
    A, B = principal_factors(weight, rank=3, scaling=2)
    assert torch.allclose(product(model.base_model.model.a), 2 * B @ A, atol=1e-5)


@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_corda_takes_the_components_that_matter_most_or_least(method):
    net = Net()
    preprocess_corda(net, corda_config(target_modules=["a"], corda_method=method, r=12), run_model=sample_runs(net))
    whole = net.a.eigens
    preprocess_corda(net, corda_config(target_modules=["a"], corda_method=method), run_model=sample_runs(net))
    part = slice(None, 3) if method == "ipm" else slice(-3, None)
    assert torch.allclose(net.a.eigens.S_WC, whole.S_WC[part])
    assert torch.allclose(net.a.eigens.U_WC, whole.U_WC[:, part])
    assert torch.allclose(net.a.eigens.V_WC, whole.V_WC[:, part])


def test_corda_honours_ranks_by_module_and_leaves_nothing_else():
    net = Net()
    preprocess_corda(net, corda_config(rank_pattern={"b": 5}), run_model=sample_runs(net))
    shapes = {name: {k: tuple(v.shape) for k, v in vars(getattr(net, name).eigens).items()} for name in "ab"}
    assert shapes == {
        "a": {"S_WC": (3,), "U_WC": (16, 3), "V_WC": (12, 3)},
        "b": {"S_WC": (5,), "U_WC": (10, 5), "V_WC": (16, 5)},
    }
    for name in "ab":
        assert not {"sample_count", "covariance_matrix", "corda_method", "rank"} & vars(getattr(net, name)).keys()
    assert not hasattr(net.c, "eigens")


def test_corda_takes_batches_of_any_size():
    net = without_dropout(Net())
    config = corda_config(prune_temporary_fields=False)
    preprocess_corda(net, config, run_model=sample_runs(net, count=1, rows=4))
    x = torch.randn(4, 7, 12, generator=torch.Generator().manual_seed(0)).flatten(0, 1)
    x = x / x.max().abs()
    assert torch.allclose(net.a.covariance_matrix, x.T @ x, atol=1e-6)


def test_corda_runs_the_model_in_evaluation_mode_without_gradients_and_brings_it_back():
    net = Net()
    net.b.eval()
    before, seen = snapshot(net), []

    def run():
        seen.append((net.training, net.dropout.training, torch.is_grad_enabled()))
        sample_runs(net)()

    preprocess_corda(net, corda_config(), run_model=run)
    assert seen == [(False, False, False)]
    assert left_alone(net, before)


def test_corda_can_look_at_another_model_with_the_same_modules():
    net = without_dropout(Net())
    other = copy.deepcopy(net).requires_grad_(False)
    preprocess_corda(net, corda_config(), run_model=sample_runs(other), hooked_model=other)
    assert not hasattr(other.a, "eigens")
    direct = copy.deepcopy(other)
    preprocess_corda(direct, corda_config(), run_model=sample_runs(direct))
    assert torch.equal(net.a.eigens.U_WC, direct.a.eigens.U_WC)


def test_corda_stays_in_half_precision_if_asked_to():
    for half, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        net = Net().bfloat16()
        config = corda_config(use_float16_for_covariance=half, prune_temporary_fields=False)
        preprocess_corda(net, config, run_model=lambda net=net: net(torch.randn(1, 7, 12).bfloat16()))
        assert net.a.covariance_matrix.dtype == dtype


def test_cordas_inputs_may_be_few(capsys):
    """A covariance of low rank is damped until it can be inverted."""
    C = torch.zeros(6, 6)
    C[0, 0] = 1e6
    candidate, inverse = corda.damped(C)
    assert torch.dist(candidate @ inverse, torch.eye(6)) < 0.05
    assert torch.equal(C.diagonal(), torch.tensor([1e6, 0, 0, 0, 0, 0]))

    net = Net()
    preprocess_corda(net, corda_config(verbose=True), run_model=lambda: net(torch.randn(1, 1, 12)))
    assert net.a.eigens.S_WC.isfinite().all()
    assert "a: S_WC (3,), U_WC (16, 3), V_WC (12, 3)" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------- CorDA's start


@pytest.mark.parametrize("method", ["ipm", "kpm"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_cordas_start_preserves_the_output(method, use_rslora):
    net, x = Net().eval(), torch.randn(2, 12)
    weights, expected = {name: matrix(getattr(net, name)).clone() for name in "ab"}, net(x)
    config = corda_config(corda_method=method, use_rslora=use_rslora)
    preprocess_corda(net, config, run_model=sample_runs(net))
    model = quietly(get_peft_model, net, config).eval()
    assert torch.allclose(model(x), expected, atol=1e-5)
    for name, layer in layers(model).items():
        assert not torch.allclose(matrix(layer.base_layer), weights[name], atol=1e-3)
        assert torch.allclose(matrix(layer.base_layer) + product(layer), weights[name], atol=1e-5)
        assert not hasattr(layer.base_layer, "eigens")


def test_a_saved_corda_adapter_needs_the_cache_or_a_conversion(tmp_path):
    net, x = Net().eval(), torch.randn(2, 12)
    fresh = copy.deepcopy(net)
    config = corda_config(cache_file=tmp_path / "cache.pt")
    preprocess_corda(net, config, run_model=sample_runs(net))
    config.corda_config.cache_file = None  # not a part of what is saved
    model = quietly(get_peft_model, net, config).eval()
    model.save_pretrained(tmp_path / "start")
    for layer in layers(model).values():
        layer.lora_B["default"].weight.data += 0.1
    expected = model(x)
    model.save_pretrained(tmp_path / "raw")
    model.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=tmp_path / "start")

    with pytest.raises(ValueError, match=r"[ab] has nothing for the adapter 'default' .* Call preprocess_corda"):
        quietly(PeftModel.from_pretrained, copy.deepcopy(fresh), tmp_path / "raw")
    again = copy.deepcopy(fresh)
    config.corda_config.cache_file = tmp_path / "cache.pt"
    preprocess_corda(again, config)
    assert torch.allclose(quietly(PeftModel.from_pretrained, again, tmp_path / "raw")(x), expected, atol=1e-5)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*corda_config")
        loaded = PeftModel.from_pretrained(copy.deepcopy(fresh), tmp_path / "end")
    assert torch.allclose(loaded(x), expected, atol=1e-5)


def test_an_injection_that_fails_keeps_what_corda_prepared():
    net = Net()
    config = corda_config(target_modules=["a", "b"])
    preprocess_corda(net, config, run_model=sample_runs(net))
    before, kept = copy.deepcopy(net.state_dict()), net.b.eigens
    net.b.eigens = CordaEigens(kept.S_WC[:1], kept.U_WC, kept.V_WC)
    with pytest.raises(ValueError, match=r"b: S_WC of preprocess_corda has the shape \(1,\), expected \(3,\) for r=3"):
        quietly(get_peft_model, net, config)
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in before.items())
    assert hasattr(net.a, "eigens")
    net.b.eigens = CordaEigens(kept.S_WC * torch.nan, kept.U_WC, kept.V_WC)
    with pytest.raises(ValueError, match="b: S_WC of preprocess_corda has values that are not finite"):
        quietly(get_peft_model, net, config)
    net.b.eigens = kept
    quietly(get_peft_model, net, config)


def test_cordas_rank_is_limited_by_the_weight():
    net = Net()
    config = corda_config(r=14, target_modules=["a"])
    preprocess_corda(net, config, run_model=sample_runs(net))
    with pytest.raises(ValueError, match=r"the shape \(12,\), expected \(14,\) .*the rank can be 12 at most"):
        quietly(get_peft_model, net, config)


# ---------------------------------------------------------------------------------------------------------- CorDA's files


def test_cordas_files_save_the_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = {"cache_file": "cache.pt", "covariance_file": "deep/er/covariances.pt"}  # with and without a folder
    net = Net()
    preprocess_corda(net, corda_config(**files), run_model=sample_runs(net))
    cache = torch.load("cache.pt", weights_only=True)
    assert set(cache) == {f"{name}.eigens.{key}" for name in "ab" for key in ("S_WC", "U_WC", "V_WC")}
    covariances = torch.load("deep/er/covariances.pt", weights_only=True)
    assert {name: tuple(value.shape) for name, value in covariances.items()} == {"a": (12, 12), "b": (16, 16)}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache.pt", "deep"]

    for again in ({"cache_file": "cache.pt"}, {"covariance_file": "deep/er/covariances.pt"}):
        other = copy.deepcopy(net)
        del other.a.eigens, other.b.eigens
        preprocess_corda(other, corda_config(**again))
        assert torch.equal(other.b.eigens.V_WC, net.b.eigens.V_WC)


def test_cordas_files_must_belong_to_the_model(tmp_path):
    path = tmp_path / "file.pt"
    net = Net()
    preprocess_corda(net, corda_config(cache_file=path), run_model=sample_runs(net))
    with pytest.raises(ValueError, match=r"cache file '.*' has 'a.eigens.S_WC' of shape \(3,\), expected \(4,\)"):
        preprocess_corda(Net(), corda_config(cache_file=path, r=4))
    with pytest.raises(
        ValueError, match=r"cache file '.*' has nothing for 'c.eigens.S_WC' \(nearest: [ab].eigens.S_WC\)"
    ):
        preprocess_corda(Net(), corda_config(cache_file=path, target_modules=["c"]))
    with pytest.raises(ValueError, match=r"covariance file '.*' has nothing for 'a'"):
        preprocess_corda(Net(), corda_config(covariance_file=path))
    torch.save(["no", "dictionary"], path)
    with pytest.raises(ValueError, match="cache file '.*' is no dictionary of tensors"):
        preprocess_corda(Net(), corda_config(cache_file=path))


class Bomb:
    def __reduce__(self):
        return (print, ("unpickled",))


def test_files_are_not_unpickled(tmp_path, capsys):
    path = tmp_path / "file.pt"
    torch.save({"a": Bomb()}, path)
    for call in (
        lambda: preprocess_corda(Net(), corda_config(cache_file=path)),
        lambda: preprocess_corda(Net(), corda_config(covariance_file=path)),
        lambda: preprocess_loraga(Net(), loraga_config(), None, cache_file=path),
    ):
        with pytest.raises(ValueError, match="cannot be read"):
            call()
    assert "unpickled" not in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------- CorDA's refusals


def test_corda_says_what_is_missing():
    net = Net()
    with pytest.raises(ValueError, match="corda_config is None"):
        preprocess_corda(net, LoraConfig(target_modules=["a"]), run_model=sample_runs(net))
    with pytest.raises(ValueError, match="Give run_model"):
        preprocess_corda(net, corda_config())
    with pytest.raises(ValueError, match="corda_method must be 'ipm' or 'kpm', got 'xpm'"):
        preprocess_corda(net, corda_config(corda_method="xpm"), run_model=sample_runs(net))
    with pytest.raises(ValueError, match="run_model did not call a, so there is no covariance"):
        preprocess_corda(net, corda_config(), run_model=lambda: None)
    for prepare in (
        lambda config: preprocess_corda(net, config, run_model=sample_runs(net)),
        lambda config: preprocess_loraga(net, config, train_step(net)),
    ):
        make = corda_config if prepare.__code__.co_names[0] == "preprocess_corda" else loraga_config
        with pytest.raises(ValueError, match=r"selects no linear layer, .* Did you mean \['a"):
            prepare(make(target_modules=["aa"]))
        with pytest.raises(ValueError, match="no default for the model type 'custom'"):
            prepare(make(target_modules=None))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_corda_refuses_inputs_that_are_not_finite_and_leaves_the_model_as_it_was(value):
    net = Net()
    before = snapshot(net)
    with pytest.raises(ValueError, match="a got inputs for its covariance that are not finite, or all zero"):
        preprocess_corda(net, corda_config(), run_model=lambda: net(torch.full((1, 2, 12), value)))
    assert left_alone(net, before)


def test_a_run_that_fails_leaves_the_model_as_it_was(tmp_path):
    net = Net()
    before = snapshot(net)

    def fail():
        net(torch.randn(1, 3, 12)).sum()
        raise KeyError("data")

    config = corda_config(cache_file=tmp_path / "cache.pt", covariance_file=tmp_path / "covariances.pt")
    with pytest.raises(KeyError, match="data"):
        preprocess_corda(net, config, run_model=fail)
    assert left_alone(net, before) and not list(tmp_path.iterdir())
    with pytest.raises(KeyError, match="data"):
        preprocess_loraga(net, loraga_config(), fail, cache_file=tmp_path / "cache.pt")
    assert left_alone(net, before) and not list(tmp_path.iterdir())
    assert not any(hasattr(module, name) for module in net.modules() for name in ("eigens", "rank", GRADIENT))


def test_half_precision_covariances_that_overflow_are_refused():
    net = Net().half()
    x = torch.cat(
        [torch.full((1, 1, 12), 1e-2), torch.full((1, 100, 12), -1.0)], 1
    ).half()  # 100 / max**2 is too large
    with pytest.raises(
        ValueError, match="covariance of the inputs of a is not finite. Set use_float16_for_covariance=False"
    ):
        preprocess_corda(net, corda_config(use_float16_for_covariance=True), run_model=lambda: net(x))


# ------------------------------------------------------------------------------------------------ LoRA-GA's preparation


def test_lora_ga_leaves_the_average_gradient_by_each_weight():
    net = without_dropout(Net())
    other = copy.deepcopy(net)
    preprocess_loraga(net, loraga_config(), train_step(net, count=2))
    train_step(other, count=2)()
    for name in "ab":
        assert torch.allclose(getattr(getattr(net, name), GRADIENT), getattr(other, name).weight.grad / 2)
    assert not hasattr(net.c, GRADIENT)
    again = copy.deepcopy(other)
    loraga.estimate_gradients(again, loraga_config(), train_step(again, count=2))
    assert torch.equal(getattr(again.a, GRADIENT), getattr(net.a, GRADIENT))


def test_a_layer_that_is_used_twice_counts_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x):
            return self.a(self.a(x))

    net, x = Twice(), torch.randn(2, 4)
    preprocess_loraga(net, loraga_config(target_modules=["a"]), lambda: net(x).sum().backward())
    found = getattr(net.a, GRADIENT)
    net(x).sum().backward()
    assert torch.allclose(found, net.a.weight.grad / 2)


def test_a_checkpointed_layer_counts_once():
    from torch.utils.checkpoint import checkpoint

    net, x = without_dropout(Net()), torch.randn(3, 12)
    other = copy.deepcopy(net)
    for use_reentrant in (False, True):
        copied = copy.deepcopy(net)
        inputs = x.clone().requires_grad_()
        run = lambda net=copied, x=inputs, use=use_reentrant: checkpoint(net, x, use_reentrant=use).sum().backward()  # noqa: E731
        preprocess_loraga(copied, loraga_config(), run)
        other.zero_grad()
        other(x).sum().backward()
        assert torch.allclose(getattr(copied.a, GRADIENT), other.a.weight.grad, atol=1e-6)


def test_lora_ga_trains_the_targets_alone_and_brings_the_model_back():
    net = Net().eval()
    net.a.requires_grad_(False)
    net.c.weight.grad = torch.ones(8, 10)
    seen = []

    def step():
        seen.append(
            (net.training, [name for name, p in net.named_parameters() if p.requires_grad], torch.is_grad_enabled())
        )
        train_step(net)()

    before = snapshot(net)
    with torch.no_grad():
        preprocess_loraga(net, loraga_config(), step)
    assert seen == [(True, ["a.weight", "b.weight"], True)]
    assert torch.equal(net.c.weight.grad, torch.ones(8, 10))
    net.c.weight.grad = None
    assert left_alone(net, before)


def test_gradients_that_are_there_already_do_not_count_and_come_back():
    net = without_dropout(Net())
    train_step(net)()
    before = net.a.weight.grad.clone()
    preprocess_loraga(net, loraga_config(), train_step(net))
    assert torch.allclose(getattr(net.a, GRADIENT), before / 2)
    assert torch.equal(net.a.weight.grad, before)


@pytest.mark.compat
def test_lora_ga_knows_the_default_targets():
    from transformers import GPT2Config, GPT2LMHeadModel

    net = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=10, bos_token_id=0, eos_token_id=0))
    config = loraga_config(target_modules=None)
    ids = torch.arange(10).unsqueeze(0)
    preprocess_loraga(net, config, lambda: net(ids).logits.sum().backward())
    assert config.target_modules == {"c_attn"}
    assert [name for name, module in net.named_modules() if hasattr(module, GRADIENT)] == [
        "transformer.h.0.attn.c_attn"
    ]
    preprocess_loraga(net, loraga_config(target_modules="all-linear"), lambda: net(ids).logits.sum().backward())
    assert hasattr(net.transformer.h[0].mlp.c_fc, GRADIENT) and not hasattr(net.lm_head, GRADIENT)


def test_lora_ga_keeps_gradients_in_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("cache.pt", "deep/er/cache.pt"):
        net = Net()
        preprocess_loraga(net, loraga_config(), train_step(net), cache_file=path)
        saved = torch.load(path, weights_only=True)
        assert {name: tuple(value.shape) for name, value in saved.items()} == {
            f"a.{GRADIENT}": (16, 12),
            f"b.{GRADIENT}": (16, 10),
        }
        other = Net()
        preprocess_loraga(other, loraga_config(), None, cache_file=path)
        assert torch.equal(getattr(other.b, GRADIENT), getattr(net.b, GRADIENT))
    with pytest.raises(ValueError, match=rf"gradient cache 'cache.pt' has nothing for 'c.{GRADIENT}'"):
        preprocess_loraga(Net(), loraga_config(target_modules=["c"]), None, cache_file="cache.pt")
    wide = Net()
    wide.a = nn.Linear(20, 16)
    with pytest.raises(ValueError, match=rf"has 'a.{GRADIENT}' of shape \(16, 12\), expected \(16, 20\)"):
        preprocess_loraga(wide, loraga_config(), None, cache_file="cache.pt")


def test_lora_ga_says_what_is_missing():
    net = Net()
    with pytest.raises(ValueError, match="lora_ga_config is None"):
        preprocess_loraga(net, LoraConfig(target_modules=["a"]), train_step(net))
    with pytest.raises(ValueError, match="train_step left no gradient at any of the 2 targets"):
        preprocess_loraga(net, loraga_config(), lambda: None)
    with pytest.raises(ValueError, match="train_step left no gradient at any"):
        preprocess_loraga(net, loraga_config(), lambda: (train_step(net)(), net.zero_grad()))
    with pytest.warns(UserWarning, match=r"no gradient at \['a'\]; these start as with init_lora_weights=True"):
        preprocess_loraga(net, loraga_config(), lambda: net.b(torch.randn(2, 16)).sum().backward())
    net.a.quant_state = None
    with pytest.raises(ValueError, match="a is quantised"):
        preprocess_loraga(net, loraga_config(), train_step(net))


# ----------------------------------------------------------------------------------------------------- LoRA-GA's start


@pytest.mark.parametrize("scale", ["stable", "weight_svd", "gd_scale", "unit"])
@pytest.mark.parametrize("direction", ["ArBr", "A2rBr", "ArB2r", "random"])
def test_lora_gas_start_preserves_the_output(direction, scale):
    net, x = Net().eval(), torch.randn(2, 12)
    weights, expected = {name: matrix(getattr(net, name)).clone() for name in "ab"}, net(x)
    config = loraga_config(direction=direction, scale=scale)
    preprocess_loraga(net, config, train_step(net))
    model = quietly(get_peft_model, net, config).eval()
    assert torch.allclose(model(x), expected, atol=1e-5)
    for name, layer in layers(model).items():
        assert product(layer).abs().max() > 1e-4
        assert torch.allclose(matrix(layer.base_layer) + product(layer), weights[name], atol=1e-5)
        assert not hasattr(layer.base_layer, GRADIENT)


def prepared(G, **settings):
    """The factors of an adapter of rank 2 and scaling 2 on a layer with this gradient."""
    net = nn.Sequential(nn.Linear(G.shape[1], G.shape[0], bias=False))
    setattr(net[0], GRADIENT, G)
    config = loraga_config(target_modules=["0"], r=2, lora_alpha=4, fan_in_fan_out=False, **settings)
    layer = get_peft_model(net, config).base_model.model[0]
    return layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data, layer


SIZES = torch.tensor([8.0, 4.0, 2.0, 1.0])
UNIT = torch.eye(4)


@pytest.mark.parametrize(
    "direction, rows, columns", [("ArBr", [1, 3], [0, 2]), ("A2rBr", [2, 3], [0, 1]), ("ArB2r", [0, 1], [2, 3])]
)
def test_directions_choose_singular_vectors_of_the_gradient(direction, rows, columns):
    A, B, _ = prepared(torch.diag(SIZES), direction=direction, scale="unit")
    assert torch.allclose(A.abs(), UNIT[rows], atol=1e-5)
    assert torch.allclose(B.abs(), (UNIT * SIZES)[:, columns], atol=1e-4)


def test_a_random_direction_is_the_same_for_both_factors_and_by_the_seed():
    torch.manual_seed(4)
    A, B, _ = prepared(torch.diag(SIZES), direction="random", scale="unit")
    assert torch.equal(A.abs().argmax(1), B.abs().argmax(0))
    torch.manual_seed(4)
    assert torch.equal(prepared(torch.diag(SIZES), direction="random", scale="unit")[0], A)


def test_scales_set_the_size_of_the_factors():
    A, B, _ = prepared(torch.diag(SIZES), scale="unit")
    for scale, a, b in (("stable", 1, 4**0.25 / 3), ("gd_scale", 0.5, 0.5)):
        found = prepared(torch.diag(SIZES), scale=scale, stable_gamma=9)
        assert torch.allclose(found[0].abs(), a * A.abs(), atol=1e-5)
        assert torch.allclose(found[1].abs(), b * B.abs(), atol=1e-4)
    A, B, layer = prepared(torch.diag(SIZES), scale="weight_svd")
    weight = layer.base_layer.weight + product(layer)
    assert torch.allclose(B[:, 0].norm(), torch.linalg.svdvals(weight)[0], atol=1e-3)
    assert not prepared(torch.zeros(4, 4), scale="weight_svd")[1].any()


def test_a_rank_that_takes_too_many_singular_vectors_is_refused():
    for direction in ("A2rBr", "ArB2r", "random"):
        message = (
            rf"direction='{direction}' takes r=2 of 2r singular vectors, but a weight has only 3. Lower its rank to 1"
        )
        with pytest.raises(ValueError, match=message):
            prepared(torch.randn(3, 5), direction=direction)
    A, B, _ = prepared(torch.randn(3, 5), direction="ArBr")
    assert A.shape == (1, 5) and B.shape == (3, 1)


def test_settings_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="direction must be 'ArBr', 'A2rBr', 'ArB2r' or 'random', got 'x'"):
        prepared(torch.diag(SIZES), direction="x")
    with pytest.raises(ValueError, match="scale must be 'stable', 'weight_svd', 'gd_scale' or 'unit', got 'x'"):
        prepared(torch.diag(SIZES), scale="x")
    net = Net()
    preprocess_loraga(net, loraga_config(), train_step(net))
    bare = LoraConfig(init_lora_weights="lora_ga", target_modules=["a"])
    with pytest.raises(ValueError, match="'default' with init_lora_weights='lora_ga' needs lora_ga_config"):
        get_peft_model(net, bare)
    assert hasattr(net.a, GRADIENT)


def test_without_gradients_lora_ga_starts_as_usual_and_says_so():
    net = Net()
    before = copy.deepcopy(net.state_dict())
    with pytest.warns(
        UserWarning, match="'default' with init_lora_weights='lora_ga' starts as with True and changes no"
    ):
        layer = get_peft_model(net, loraga_config(target_modules=["a"])).base_model.model.a
    assert not layer.lora_B["default"].weight.any()
    bound = 12**-0.5
    assert bound / 2 < layer.lora_A["default"].weight.abs().max() <= bound
    assert torch.equal(layer.base_layer.weight, before["a.weight"])


def test_a_saved_lora_ga_adapter_can_be_converted(tmp_path):
    net, x = Net().eval(), torch.randn(2, 12)
    fresh, config = copy.deepcopy(net), loraga_config()
    preprocess_loraga(net, config, train_step(net))
    model = quietly(get_peft_model, net, config).eval()
    model.save_pretrained(tmp_path / "start")
    for layer in layers(model).values():
        layer.lora_B["default"].weight.data += 0.1
    model.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=tmp_path / "start")
    assert torch.allclose(PeftModel.from_pretrained(fresh, tmp_path / "end")(x), model(x), atol=1e-5)


def test_the_layers_methods_start_an_adapter_over():
    net, x = Net().eval(), torch.randn(2, 12)
    expected = net(x)
    model = quietly(get_peft_model, net, LoraConfig(target_modules=["a"], r=3, lora_alpha=6)).eval()
    layer = model.base_model.model.a
    setattr(layer.base_layer, GRADIENT, torch.randn(16, 12))
    layer.lora_ga_init("default", LoraGAConfig())
    assert layer.lora_B["default"].weight.any() and not hasattr(layer.base_layer, GRADIENT)
    assert torch.allclose(model(x), expected, atol=1e-5)
    layer.lora_B["default"].weight.data.zero_()
    left = model(x)
    preprocess_corda(net, corda_config(target_modules=["base_layer"]), run_model=sample_runs(net))
    layer.corda_init("default", "corda")
    assert torch.allclose(model(x), left, atol=1e-5)


def test_where_a_model_is():
    for module in (corda, loraga):
        assert module.get_model_device(Net()) == "cpu"
    targets = [("a", Net().a), ("b", Net().b)]
    assert [name for name, _ in corda.target_modules(Net(), corda_config())] == [name for name, _ in targets]
    assert [name for name, _ in loraga.get_target_modules(Net(), loraga_config())] == ["a", "b"]


def test_decompositions_can_be_made_step_by_step():
    net, config = Net(), corda_config()
    corda.calib_cov_distribution(net, config, sample_runs(net), None, None)
    whole = corda.collect_eigens_for_layer(net.a, config)
    assert [tuple(value.shape) for value in vars(whole).values()] == [(12,), (16, 12), (12, 12)]
    corda.collect_eigens(net, config, verbose=False)
    assert len(net.a.eigens.S_WC) == 12
    for module in (net.a, net.b):
        module.corda_method, module.rank = "kpm", 2
    corda.crop_corda_eigens(net, config)
    assert torch.equal(net.a.eigens.S_WC, whole.S_WC[-2:])
