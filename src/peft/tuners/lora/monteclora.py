"""MonteCLoRA: training with a mixture of noisy samples of A (arXiv 2411.04358).

A training step uses A + Σ p_n·ε_n instead of A. The noise ε_n is normal with a covariance Σ drawn from a Wishart
distribution, the weights p are drawn from a Dirichlet distribution (as the softmax of a normal), and both have learnt
parameters, which divergences from priors hold in place. Everything is reparametrised, so that gradients reach them:

    S = diag(exp(std_prior))        Σ = diag(S·Z·Sᵀ), Z ~ Wishart(r, I)     ε_n = sample_scaler · z_n · Σ^½
    α = exp(expert_weights_prior)   μ = log α - mean(log α)                 p = softmax(D^½·z + μ)

with z_n and z standard normal and D the diagonal covariance that makes the softmax of a normal look like Dirichlet(α).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from .variant import LoraVariant, register_variant

if TYPE_CHECKING:
    from .config import LoraConfig
    from .layer import LoraLayer

Draw = dict[str, torch.Tensor]
"""What one step draws: `z_mvn` (N, in, r) and `z_dirichlet` (N,), standard normal; `z_wishart` (r, r), Wishart(r, I)."""


class MontecloraSampler(nn.Module):
    """The noise of one adapter: its learnt parameters, and what is sampled from them.

    Args:
        in_features: the inputs of A.
        out_features: the rank r, since it is A that is sampled.
        num_samples: N.
        use_entropy: add Σ p² to the loss.
        dirichlet_prior: parameter of the symmetric Dirichlet prior.
        sample_scaler: scale of the noise.
        kl_loss_weight: weight of the divergences from the priors.
        buffer_size: how many draws a `BufferedMontecloraSampler` makes ahead; training makes none.
        device: where the parameters are made.
        dtype: their dtype.
        kwargs: of no effect.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_samples: int,
        use_entropy: bool = True,
        dirichlet_prior: float = 1.0,
        sample_scaler: float = 3e-4,
        kl_loss_weight: float = 1e-5,
        buffer_size: int = 10,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.num_samples = in_features, out_features, num_samples
        self.use_entropy, self.kl_loss_weight = use_entropy, kl_loss_weight
        self.dirichlet_prior, self.sample_scaler = dirichlet_prior, sample_scaler
        self.buffer_size = buffer_size
        options = {"device": device, "dtype": dtype}
        self.std_prior = nn.Parameter(torch.rand(out_features, **options))
        self.expert_weights_prior = nn.Parameter(torch.rand(num_samples, **options))
        self.register_buffer("gaussian_var_prior", torch.eye(out_features, **options))
        self.register_buffer("expert_weights", torch.full((num_samples,), 1 / num_samples, **options))
        self._last: Draw | None = None

    @torch.no_grad()
    def draw(self) -> Draw:
        """New random numbers for one step, in float32.

        They come from torch's generator at the moment that they are needed, so that gradient checkpointing, which
        restores its state, computes a layer again with the same ones.
        """
        options = {"device": self.std_prior.device, "dtype": torch.float32}
        rank, samples = self.out_features, self.num_samples
        normal = torch.randn(rank, rank, **options)
        with self._in_float32():
            wishart = normal.T @ normal
        return {
            "z_mvn": torch.randn(samples, self.in_features, rank, **options),
            "z_wishart": wishart,
            "z_dirichlet": torch.randn(samples, **options),
        }

    def _in_float32(self) -> torch.autocast:
        return torch.autocast(self.std_prior.device.type, enabled=False)

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Sample.

        Returns:
            The noise ε (N, in, r) and the mixture weights p (N,), in float32.
        """
        drawn = self.draw()
        self._last = {name: drawn[name] for name in ("z_wishart", "z_dirichlet")}
        with self._in_float32():
            covariance, weights = self._sampled(self._last)
            noise = self.multivariate_reparameterization(drawn["z_mvn"], covariance)
        with torch.no_grad():
            self.gaussian_var_prior.copy_(covariance)
            self.expert_weights.copy_(weights)
        return noise, weights

    def _sampled(self, drawn: Draw) -> tuple[torch.Tensor, torch.Tensor]:
        """Σ (r, r) and p (N,) for the random numbers of a step."""
        scale = self.std_prior.float().exp().diag()
        covariance = self.wishart_reparameterization(scale, drawn["z_wishart"].to(scale.device))
        logits = self.dirichlet_reparameterization(self._alpha(), drawn["z_dirichlet"].to(scale.device))
        return covariance, logits.softmax(0)

    def _alpha(self) -> torch.Tensor:
        return self.expert_weights_prior.float().exp()

    # -------------------------------------------------------------------------------------------- reparametrisations

    def wishart_reparameterization(self, std: torch.Tensor, z_wishart: torch.Tensor) -> torch.Tensor:
        """The diagonal of S·Z·Sᵀ as a matrix, not below 1e-3.

        Args:
            std: S, (r, r).
            z_wishart: Z, (r, r).
        """
        return ((std @ z_wishart) * std).sum(1).clamp_min(1e-3).diag()

    def multivariate_reparameterization(self, z_mvn: torch.Tensor, cov_matrix: torch.Tensor) -> torch.Tensor:
        """Normal noise of a covariance, scaled; NaN becomes 1e-3 first.

        Args:
            z_mvn: standard normal, (..., r).
            cov_matrix: a diagonal matrix, (r, r).
        """
        noise = z_mvn * cov_matrix.diagonal().sqrt()
        return self.sample_scaler * torch.where(noise.isnan(), 1e-3, noise)

    def dirichlet_reparameterization(self, alpha: torch.Tensor, z_dirichlet: torch.Tensor) -> torch.Tensor:
        """The normal whose softmax is close to Dirichlet(α) (the Laplace bridge).

        Args:
            alpha: α, (N,).
            z_dirichlet: standard normal, (N,).
        """
        alpha, samples = alpha.clamp_min(1e-6), len(alpha)
        log_alpha, inverse = alpha.log(), 1 / alpha
        variance = inverse * (1 - 2 / samples) + inverse.sum() / samples**2
        return (variance.clamp_min(1e-6) + 1e-6).sqrt() * z_dirichlet + log_alpha - log_alpha.mean()

    # --------------------------------------------------------------------------------------------------------- losses

    def dirichlet_kl(self, alpha2: torch.Tensor) -> torch.Tensor:
        """What the loss has for KL(Dirichlet(α₂) ‖ Dirichlet(prior)).

        The divergence itself has Σ log Γ(prior)/Γ(α₂); adapters are trained with the inverse of that fraction, and the
        loss keeps to it, so that a training goes on as it began.

        Args:
            alpha2: α₂, (N,).
        """
        alpha1 = torch.full_like(alpha2, self.dirichlet_prior)
        total2, total1 = alpha2.sum(), alpha1.sum()
        normalisers = total2.lgamma() - total1.lgamma() + (alpha2.lgamma() - alpha1.lgamma()).sum()
        return normalisers + ((alpha2 - alpha1) * (alpha2.digamma() - total2.digamma())).sum()

    def wishart_kl(self, std: torch.Tensor) -> torch.Tensor:
        """KL(Wishart(r, S·Sᵀ) ‖ Wishart(r, I)).

        Args:
            std: a diagonal matrix S, (r, r).
        """
        variance, rank = std.diagonal().square(), len(std)
        return rank / 2 * (variance.sum() - variance.log().sum() - rank)

    def multivariate_kl(self, var: torch.Tensor) -> torch.Tensor:
        """N · KL(Normal(0, Σ) ‖ Normal(0, I)).

        Args:
            var: a diagonal matrix Σ, (r, r).
        """
        variance = var.diagonal()
        return self.num_samples / 2 * (variance.sum() - variance.clamp_min(1e-6).log().sum() - len(var))

    def get_variational_loss(self) -> tuple[torch.Tensor | float, torch.Tensor | float]:
        """The weighted divergences of what the last forward sampled, and Σ p² if asked for; zeros in eval mode.

        It is computed anew from the parameters, so that it needs nothing of the forward's graph.
        """
        if not self.training:
            return 0.0, 0.0
        with self._in_float32():
            if self._last is None:
                covariance, weights = self.gaussian_var_prior.float(), self.expert_weights.float()
            else:
                covariance, weights = self._sampled(self._last)
            divergence = (
                self.dirichlet_kl(self._alpha())
                + self.wishart_kl(self.std_prior.float().exp().diag())
                + self.multivariate_kl(covariance)
            )
            return self.kl_loss_weight * divergence, weights.square().sum() if self.use_entropy else 0.0


class BufferedMontecloraSampler:
    """Draws of a sampler made ahead, for programs that take many of them outside of training.

    Args:
        model: the sampler.
        buffer_size: how many to make at a time.
        device: where to put them; where the sampler is by default.
    """

    def __init__(
        self, model: MontecloraSampler, buffer_size: int = 150, device: torch.device | str | None = None
    ) -> None:
        self.model, self.buffer_size, self.device = model, buffer_size, device
        self.buffer: list[Draw] = []
        self.index = 0

    def get(self) -> Draw:
        """The next draw."""
        if self.index == len(self.buffer):
            self.buffer, self.index = [self._draw() for _ in range(self.buffer_size)], 0
        self.index += 1
        return self.buffer[self.index - 1]

    def _draw(self) -> Draw:
        return {name: value.to(self.device or value.device) for name, value in self.model.draw().items()}


@register_variant(
    "monteclora_config", kinds=("linear", "conv1d_transformers", "embedding", "conv1d", "conv2d", "conv3d")
)
class MontecloraLinearVariant(LoraVariant):
    """MonteCLoRA: plain LoRA in eval mode, samples of A in training.

    The window of a convolution counts as inputs, and so do the entries of an embedding.
    """

    containers: ClassVar[dict[str, Callable[[], Any]]] = {"lora_monteclora_sampler": nn.ModuleDict}
    plain_at_inference = True

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        A, _ = module.factors(adapter_name)
        module.lora_monteclora_sampler[adapter_name] = MontecloraSampler(
            A[0].numel(),
            len(A),
            **vars(config.monteclora_config),
            device=module.empty(0).device,
        )

    @staticmethod
    def forward(
        module: LoraLayer, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        if not module.training:
            return result + module.term(x, active_adapter)
        scaling, weight = module.scaling[active_adapter], sampled_A(module, active_adapter)
        if not x.is_floating_point():
            _, B = module.factors(active_adapter)
            return result + module.embed(x, weight.T) @ B.T * scaling
        A, B = module.lora_A[active_adapter], module.lora_B[active_adapter]
        x = module.lora_dropout[active_adapter](x)
        hidden = F.linear(x, weight, A.bias) if isinstance(A, nn.Linear) else A._conv_forward(x, weight, None)
        return result + B(hidden) * scaling


def sampled_A(module: LoraLayer, adapter: str) -> torch.Tensor:
    """A + Σ p_n·ε_n of a training step, in A's shape; A itself, with a warning, if the noise is not finite.

    Args:
        module: the layer.
        adapter: the adapter.
    """
    A, _ = module.factors(adapter)
    noise, weights = module.lora_monteclora_sampler[adapter]()
    shift = torch.tensordot(weights, noise, 1).T
    if not torch.compiler.is_compiling() and not torch.isfinite(shift).all():
        warnings.warn(
            f"{module.called}: the noise of the MonteCLoRA adapter {adapter!r} is not finite, so A is used without it. Its "
            "std_prior or expert_weights_prior has grown out of bounds; use a lower learning rate or a higher "
            "kl_loss_weight."
        )
        return A
    return A + shift.to(A.dtype).reshape(A.shape)


def mean_variational_loss(layers: Iterable[LoraLayer], adapter_names: list[str]) -> torch.Tensor | float:
    """The variational loss of adapters, averaged over the samplers; 0.0 if there are none.

    Args:
        layers: LoRA layers; those whose adapters are disabled do not count.
        adapter_names: the adapters.
    """
    losses: list[Any] = []
    for layer in layers:
        samplers = layer._modules.get("lora_monteclora_sampler", {})
        for name in adapter_names:
            if name in samplers and not layer.disable_adapters:
                losses.append(sum(samplers[name].get_variational_loss()))
    if not losses:
        return 0.0
    device = losses[0].device if torch.is_tensor(losses[0]) else None
    return sum(loss.to(device) if torch.is_tensor(loss) else loss for loss in losses) / len(losses)
