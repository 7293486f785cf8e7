"""MonteCLoRA: LoRA trained with a mixture of noisy samples of A, and the loss that keeps the noise in place."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Dirichlet, MultivariateNormal, Wishart, kl_divergence
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from peft import LoraConfig, MontecloraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.helpers import MontecloraTrainerMixin
from peft.tuners.lora.monteclora import BufferedMontecloraSampler, MontecloraSampler, sampled_A

LAYERS = {
    "linear": (lambda: nn.Linear(10, 6), lambda: torch.randn(3, 5, 10)),
    "conv1d_transformers": (lambda: Conv1D(6, 10), lambda: torch.randn(3, 10)),
    "embedding": (lambda: nn.Embedding(10, 6), lambda: torch.randint(0, 10, (3, 5))),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), lambda: torch.randn(3, 4, 7)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), lambda: torch.randn(3, 4, 7, 7)),
    "conv2d grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), lambda: torch.randn(3, 4, 7, 7)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2), lambda: torch.randn(3, 4, 3, 3, 3)),
}


class Net(nn.Module):
    def __init__(self, layer=None):
        super().__init__()
        self.layer = nn.Linear(10, 6) if layer is None else layer

    def forward(self, x):
        return self.layer(x)


def config(options=None, **others):
    others = {"r": 2, "lora_alpha": 3, "target_modules": ["layer"], "init_lora_weights": False, **others}
    return LoraConfig(
        monteclora_config=MontecloraConfig(**{"num_samples": 4, "sample_scaler": 0.1, **(options or {})}), **others
    )


def adapted(layer=None, options=None, **others):
    return get_peft_model(Net(layer), config(options, **others)).train()


def layer_of(model):
    return model.base_model.model.layer


def sampler_of(model, adapter="default"):
    return layer_of(model).lora_monteclora_sampler[adapter]


def sampler(**options):
    return MontecloraSampler(6, 3, **{"num_samples": 4, **options})


# ---------------------------------------------------------------------------------------------------------- the sampling


def test_worked_example_of_the_noise():
    one = sampler(sample_scaler=0.5)
    scale = torch.tensor([1.0, 2.0, 0.01]).diag()
    z_wishart = torch.tensor([[4.0, 9.0, 9.0], [9.0, 1.0, 9.0], [9.0, 9.0, 2.0]])
    covariance = one.wishart_reparameterization(scale, z_wishart)
    assert torch.equal(covariance, torch.tensor([4.0, 4.0, 1e-3]).diag())
    noise = one.multivariate_reparameterization(
        torch.tensor([[[1.0, -1.0, 0.0], [float("nan"), 0.0, 0.0]]]), covariance
    )
    torch.testing.assert_close(noise, torch.tensor([[[1.0, -1.0, 0.0], [0.5e-3, 0.0, 0.0]]]))


def test_worked_example_of_the_mixture_weights():
    # Two samples: the variance of the normal is (1/α₁ + 1/α₂) / 4 for both.
    alpha, z = torch.tensor([1.0, 0.25]), torch.tensor([1.0, -1.0])
    logits = sampler().dirichlet_reparameterization(alpha, z)
    log2 = torch.tensor(2.0).log()
    torch.testing.assert_close(logits, torch.stack([log2, -log2]) + (1.25 + 1e-6) ** 0.5 * z)


def test_mixture_weights_are_close_to_the_dirichlet_distribution():
    alpha, one = torch.tensor([3.0, 2.0, 4.0, 3.0]), sampler()
    drawn = torch.stack([one.dirichlet_reparameterization(alpha, torch.randn(4)) for _ in range(3000)]).softmax(-1)
    exact = Dirichlet(alpha)
    torch.testing.assert_close(drawn.mean(0), exact.mean, rtol=0, atol=0.03)
    torch.testing.assert_close(drawn.std(0), exact.stddev, rtol=0, atol=0.03)


def test_what_is_drawn_is_normal_and_wishart():
    one = MontecloraSampler(50, 3, 40)
    drawn = [one.draw() for _ in range(600)]
    assert {name: tuple(value.shape) for name, value in drawn[0].items()} == {
        "z_mvn": (40, 50, 3),
        "z_wishart": (3, 3),
        "z_dirichlet": (40,),
    }
    assert abs(drawn[0]["z_mvn"].std() - 1) < 0.05 and abs(drawn[0]["z_dirichlet"].mean()) < 0.6
    wishart, exact = (
        torch.stack([each["z_wishart"] for each in drawn]),
        Wishart(df=3.0, covariance_matrix=torch.eye(3)),
    )
    torch.testing.assert_close(wishart.mean(0), exact.mean, rtol=0, atol=0.5)
    torch.testing.assert_close(wishart.var(0), exact.variance, rtol=0.35, atol=0.1)


def test_forward_gives_noise_and_weights_and_remembers_their_priors():
    one = sampler()
    noise, weights = one()
    assert noise.shape == (4, 6, 3) and weights.shape == (4,)
    torch.testing.assert_close(weights.sum(), torch.tensor(1.0))
    assert torch.equal(one.expert_weights, weights.detach()) and not one.expert_weights.requires_grad
    assert one.gaussian_var_prior.count_nonzero() == 3 and not one.gaussian_var_prior.requires_grad
    (noise.sum() + weights[0]).backward()
    assert one.std_prior.grad.abs().min() > 0 and one.expert_weights_prior.grad.abs().min() > 0


def test_draws_made_ahead():
    one = sampler()
    buffered = BufferedMontecloraSampler(one, buffer_size=2)
    first, second, third = (buffered.get() for _ in range(3))
    assert len(buffered.buffer) == 2 and buffered.index == 1
    values = [each["z_dirichlet"].tolist() for each in (first, second, third)]
    assert values[0] != values[1] != values[2] and first.keys() == one.draw().keys()
    assert BufferedMontecloraSampler(one, 1, device="meta").get()["z_mvn"].is_meta


# --------------------------------------------------------------------------------------------------------------- the loss


def test_divergence_of_the_mixture_weights():
    alpha = torch.tensor([0.3, 2.0, 1.0, 5.0])
    prior = torch.full((4,), 0.5)
    divergence = kl_divergence(Dirichlet(alpha), Dirichlet(prior))
    expected = divergence + 2 * (alpha.lgamma() - prior.lgamma()).sum()  # one fraction of it is the other way up
    torch.testing.assert_close(sampler(dirichlet_prior=0.5).dirichlet_kl(alpha), expected)


def test_divergence_of_the_noise():
    variance = torch.tensor([0.5, 2.0, 3.0]).diag()
    zero, identity = torch.zeros(3), torch.eye(3)
    expected = 4 * kl_divergence(MultivariateNormal(zero, variance), MultivariateNormal(zero, identity))
    torch.testing.assert_close(sampler().multivariate_kl(variance), expected)


def test_divergence_of_the_covariance():
    # A Wishart variable of r degrees of freedom is a sum of squares of r normal ones.
    scale = torch.tensor([0.8, 1.0, 1.3]).diag()
    zero, identity = torch.zeros(3), torch.eye(3)
    expected = 3 * kl_divergence(MultivariateNormal(zero, scale @ scale.T), MultivariateNormal(zero, identity))
    torch.testing.assert_close(sampler().wishart_kl(scale), expected)
    assert sampler().wishart_kl(torch.eye(3)) == 0


def test_loss_is_the_weighted_sum_of_the_divergences_of_the_last_forward():
    one = sampler(kl_loss_weight=0.5, use_entropy=True, dirichlet_prior=0.2)
    one()
    divergence = (
        one.dirichlet_kl(one.expert_weights_prior.exp())
        + one.wishart_kl(one.std_prior.exp().diag())
        + one.multivariate_kl(one.gaussian_var_prior)
    )
    loss, entropy = one.get_variational_loss()
    torch.testing.assert_close(loss, 0.5 * divergence)
    torch.testing.assert_close(entropy, one.expert_weights.square().sum())
    (loss + entropy).backward()
    assert one.std_prior.grad.abs().min() > 0 and one.expert_weights_prior.grad.abs().min() > 0
    one.use_entropy = False
    assert one.get_variational_loss()[1] == 0.0
    assert one.eval().get_variational_loss() == (0.0, 0.0)


def test_loss_before_the_first_forward_is_that_of_the_priors():
    one = sampler(kl_loss_weight=1.0)
    expected = one.dirichlet_kl(one.expert_weights_prior.exp()) + one.wishart_kl(one.std_prior.exp().diag())
    loss, entropy = one.get_variational_loss()
    torch.testing.assert_close(loss, expected)
    assert entropy.item() == 0.25


def test_loss_of_a_model_is_the_mean_over_layers():
    model = nn.Sequential(nn.Linear(10, 6), nn.Linear(6, 4))
    model = get_peft_model(model, config({"use_entropy": True}, target_modules=["0", "1"])).train()
    assert model.base_model._get_monteclora_loss("default") > 0
    model(torch.randn(3, 10))
    samplers = [layer.lora_monteclora_sampler["default"] for layer in model.base_model.model]
    expected = sum(sum(each.get_variational_loss()) for each in samplers) / 2
    torch.testing.assert_close(model.base_model._get_monteclora_loss(), expected)
    with model.disable_adapter():
        assert model.base_model._get_monteclora_loss() == 0.0
    assert model.eval().base_model._get_monteclora_loss() == 0.0


def test_loss_is_of_the_active_adapters_or_of_those_named():
    model = adapted()
    model.add_adapter("plain", LoraConfig(r=2, target_modules=["layer"]))
    model.add_adapter("other", config())
    own = {name: sum(sampler_of(model, name).get_variational_loss()) for name in ("default", "other")}
    loss = model.base_model._get_monteclora_loss
    torch.testing.assert_close(loss(), own["default"])
    torch.testing.assert_close(loss("other"), own["other"])
    torch.testing.assert_close(loss(["default", "plain", "other"]), sum(own.values()) / 2)
    assert loss("plain") == 0.0
    with pytest.raises(ValueError, match="no adapter 'othr'.*Did you mean 'other'"):
        loss("othr")


def test_the_trainer_mixin_adds_it():
    class Trainer:
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            output = model(inputs)
            return (output.square().mean(), output) if return_outputs else output.square().mean()

    class Montecarlo(MontecloraTrainerMixin, Trainer):
        pass

    model = adapted(options={"kl_loss_weight": 1.0})
    loss, output = Montecarlo().compute_loss(model, torch.randn(3, 10), return_outputs=True)
    torch.testing.assert_close(loss, output.square().mean() + model.base_model._get_monteclora_loss())
    loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters() if parameter.requires_grad)


# -------------------------------------------------------------------------------------------------------- as an adapter


@pytest.mark.parametrize("name", LAYERS)
def test_eval_mode_is_plain_lora(name):
    build, inputs = LAYERS[name]
    model, x = adapted(build()).eval(), inputs()
    plain = get_peft_model(Net(build()), LoraConfig(r=2, lora_alpha=3, target_modules=["layer"])).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(model(x), plain(x))
    if "grouped" not in name:
        weight = layer_of(model).weight.clone()
        model.merge_adapter()
        torch.testing.assert_close(model(x), plain(x))
        model.unmerge_adapter()
        assert torch.equal(layer_of(model).weight, weight)


@pytest.mark.parametrize("name", LAYERS)
def test_training_uses_the_mixture(name):
    build, inputs = LAYERS[name]
    model, x = adapted(build(), lora_alpha=4), inputs()
    layer, one = layer_of(model), sampler_of(model)
    torch.manual_seed(3)
    noise, weights = one()
    torch.manual_seed(3)
    output = model(x)
    A, _ = layer.factors("default")
    with torch.no_grad():
        A += torch.einsum("n,nir->ri", weights, noise).reshape(A.shape)
    torch.testing.assert_close(output, model.eval()(x))
    assert not torch.equal(output, model.train()(x))


def test_dropout_comes_before_the_sampled_factor():
    model, x = adapted(lora_dropout=0.5), torch.randn(4, 10)
    layer = layer_of(model)
    torch.manual_seed(1)
    output = model(x)
    torch.manual_seed(1)
    sampled = sampled_A(layer, "default")
    dropped = layer.lora_dropout["default"](x)
    expected = layer.base_layer(x) + F.linear(F.linear(dropped, sampled), layer.lora_B.default.weight) * 1.5
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_gradient_checkpointing_changes_nothing(use_reentrant):
    model, x = adapted(options={"kl_loss_weight": 1.0}), torch.randn(3, 10, requires_grad=True)
    grads = []
    for run in (lambda: model(x), lambda: checkpoint(model, x, use_reentrant=use_reentrant)):
        torch.manual_seed(1)
        (run().square().sum() + model.base_model._get_monteclora_loss()).backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    assert len(grads[0]) == 4
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)


@pytest.mark.parametrize("parameter", ["std_prior", "expert_weights_prior"])
def test_noise_that_is_not_finite_is_left_out_with_a_warning(parameter):
    model, x = adapted(), torch.randn(3, 10)
    getattr(sampler_of(model), parameter).data.fill_(60.0 if parameter == "std_prior" else float("nan"))
    with pytest.warns(UserWarning, match="layer: the noise of the MonteCLoRA adapter 'default' is not finite"):
        output = model(x)
    torch.testing.assert_close(output, model.eval()(x))


def test_half_precision_samples_in_float32():
    model, x = adapted(), torch.randn(3, 10)
    model.to(torch.bfloat16)
    output = model(x.bfloat16())
    output.float().square().sum().backward()
    assert output.dtype == torch.bfloat16 and sampler_of(model).std_prior.grad.isfinite().all()
    assert sampler_of(model)()[0].dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert sampler_of(model.float())()[0].dtype == torch.float32


def test_a_model_that_trained_can_be_copied_and_pickled():
    model, x = adapted(), torch.randn(3, 10)
    (model(x).sum() + model.base_model._get_monteclora_loss()).backward()
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(again.base_model._get_monteclora_loss(), model.base_model._get_monteclora_loss())


def test_seeds_are_reproducible():
    starts = []
    for _ in range(2):
        torch.manual_seed(5)
        starts.append(get_peft_model_state_dict(adapted()))
    assert all(torch.equal(starts[0][key], starts[1][key]) for key in starts[0])
    for name in ("std_prior", "expert_weights_prior"):
        start = starts[0][f"base_model.model.layer.lora_monteclora_sampler.{name}"]
        assert 0 <= start.min() and start.max() < 1


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_what_is_saved_and_how_it_loads(tmp_path, low_cpu_mem_usage):
    model, x = adapted(), torch.randn(3, 10)
    model(x)  # other values in the buffers than at the start
    state = get_peft_model_state_dict(model)
    prefix = "base_model.model.layer."
    assert {key: tuple(value.shape) for key, value in state.items()} == {
        f"{prefix}lora_A.weight": (2, 10),
        f"{prefix}lora_B.weight": (6, 2),
        f"{prefix}lora_monteclora_sampler.std_prior": (2,),
        f"{prefix}lora_monteclora_sampler.expert_weights_prior": (4,),
        f"{prefix}lora_monteclora_sampler.gaussian_var_prior": (2, 2),
        f"{prefix}lora_monteclora_sampler.expert_weights": (4,),
    }
    model.save_pretrained(tmp_path)
    base = copy.deepcopy(layer_of(model).get_base_layer())
    loaded = PeftModel.from_pretrained(Net(base), tmp_path, is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage)
    assert not [name for name, tensor in loaded.state_dict().items() if tensor.is_meta]
    for key, value in get_peft_model_state_dict(loaded).items():
        assert torch.equal(value, state[key]), key
    for each in (model, loaded):
        torch.manual_seed(1)
        each.train()(x).square().sum().backward()
    torch.testing.assert_close(sampler_of(loaded).std_prior.grad, sampler_of(model).std_prior.grad)
    assert {name for name, p in loaded.named_parameters() if p.requires_grad} == {
        name for name, p in model.named_parameters() if p.requires_grad
    }


def test_a_file_without_the_sampler_starts_a_new_one(tmp_path):
    model = adapted()
    get_peft_model(Net(), LoraConfig(r=2, target_modules=["layer"])).save_pretrained(tmp_path)
    model.peft_config["default"].save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="lack these of the adapter 'default'.*std_prior"):
        loaded = PeftModel.from_pretrained(Net(), tmp_path, is_trainable=True)
    assert not sampler_of(loaded).std_prior.is_meta and loaded.train()(torch.randn(3, 10)).isfinite().all()
    assert torch.equal(sampler_of(loaded).gaussian_var_prior.diag() > 0, torch.ones(2, dtype=torch.bool))


def test_a_deleted_adapter_leaves_nothing():
    model = adapted()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["layer"]))
    model.delete_adapter("default")
    assert not [name for name in model.state_dict() if "monteclora" in name]


@pytest.mark.parametrize("option", ["num_samples", "dirichlet_prior", "buffer_size"])
def test_options_are_checked(option):
    with pytest.raises(ValueError, match=f"{option} of MontecloraConfig must be positive, got 0"):
        MontecloraConfig(**{option: 0})
