"""Which ranks an AdaLoRA adapter keeps: a budget that shrinks during training, spent on the triplets that matter most.

A triplet is what one rank has of a layer's factors: an entry of E, a row of A, a column of B. A pattern says for every
rank that the adapter started with whether it is kept, by the name of the layer's E.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from ...engine.lifecycle import AdapterHolder, holders_of
from ...utils.integrations import gather_params_ctx

if TYPE_CHECKING:
    from .config import AdaLoraConfig
    from .layer import AdaLoraLayer

RankPattern = dict[str, list[bool]]
FACTORS = ("lora_A", "lora_E", "lora_B")


def pattern_key(module_name: str) -> str:
    """The name by which a pattern has a module, in a configuration and its file."""
    return f"{module_name}.lora_E"


def layers_with(holders: Iterable[tuple[str, AdapterHolder]], adapter_name: str) -> Iterator[tuple[str, AdaLoraLayer]]:
    """Name and module of every AdaLoRA layer that holds an adapter, without the layers of other methods around it.

    Args:
        holders: name in the base model and module of all that holds adapters.
        adapter_name: the adapter.
    """
    for name, holder in holders:
        if adapter_name in holder._modules.get("lora_E", ()):
            yield ".".join(part for part in name.split(".") if part != "base_layer"), holder


def check_betas(config: AdaLoraConfig) -> None:
    """Raise unless means can be kept with the betas of a configuration.

    Raises:
        AssertionError: a beta is not between 0 and 1.
    """
    for name in ("beta1", "beta2"):
        if not 0 < getattr(config, name) < 1:
            raise AssertionError(f"{name} of an AdaLoraConfig must be between 0 and 1, got {getattr(config, name)}.")


def rank_axis(factor: str) -> int:
    """The axis of a factor that its ranks lie along."""
    return 1 if factor == "lora_B" else 0


def ranks_of(factor: str, tensor: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Some ranks of a factor, as a new tensor.

    Args:
        factor: one of `FACTORS`.
        tensor: the factor.
        kept: (r,), boolean.
    """
    return tensor.index_select(rank_axis(factor), kept.nonzero().view(-1).to(tensor.device))


class RankAllocator:
    """The budget of an adapter, the sensitivity of its weights, and the pruning of triplets (arXiv 2303.10512).

    Args:
        model: the base model with the adapter's layers.
        peft_config: the adapter's configuration.
        adapter_name: the adapter.

    Raises:
        AssertionError: a beta is not between 0 and 1.
    """

    def __init__(self, model: nn.Module, peft_config: AdaLoraConfig, adapter_name: str) -> None:
        self.peft_config, self.adapter_name = peft_config, adapter_name
        self.beta1, self.beta2 = peft_config.beta1, peft_config.beta2
        check_betas(peft_config)
        layers = [layer for _, layer in layers_with(holders_of(model), adapter_name)]
        self.init_bgt = sum(layer.initial_rank(adapter_name) for layer in layers)
        self.target_bgt = peft_config.target_r * len(layers)
        self.reset_ipt()

    def set_total_step(self, total_step: int) -> None:
        """Let the schedule end at another step.

        Args:
            total_step: the number of training steps.
        """
        self.peft_config.total_step = total_step

    def reset_ipt(self) -> None:
        """Forget how sensitive the loss has been to each weight."""
        self.ipt: dict[str, torch.Tensor] = {}
        self.exp_avg_ipt: dict[str, torch.Tensor] = {}
        self.exp_avg_unc: dict[str, torch.Tensor] = {}

    def budget_schedule(self, step: int) -> tuple[int, bool]:
        """How many triplets are kept at a step, and whether they are chosen anew.

        Args:
            step: the training step.
        """
        config = self.peft_config
        last = config.total_step - config.tfinal
        if step <= config.tinit:
            return self.init_bgt, False
        if step > last:
            return self.target_bgt, True
        left = 1 - (step - config.tinit) / (last - config.tinit)
        budget = int((self.init_bgt - self.target_bgt) * left**3 + self.target_bgt)
        return budget, step % config.deltaT == 0

    # ---------------------------------------------------------------------------------------------------- importance

    @torch.no_grad()
    def update_ipt(self, model: nn.Module) -> None:
        """Take in the gradients of a step: the sensitivity |p·∇p| of each weight, smoothed, and how uncertain it is.

        Args:
            model: the base model, after a backward pass. A weight that has no gradient was not used: its sensitivity is 0.

        Raises:
            TypeError: no weight of the adapter has a gradient.
        """
        parameters = dict(self._parameters(model))
        if all(parameter.grad is None for parameter in parameters.values()):
            raise TypeError(
                f"No weight of the adapter {self.adapter_name!r} has a gradient. Call update_and_allocate after "
                "backward() and before zero_grad()."
            )
        for name, parameter in parameters.items():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            self.ipt[name] = ipt = (parameter * gradient).abs()
            mean = self.beta1 * self.exp_avg_ipt.get(name, 0.0) + (1 - self.beta1) * ipt
            doubt = self.beta2 * self.exp_avg_unc.get(name, 0.0) + (1 - self.beta2) * (ipt - mean).abs()
            self.exp_avg_ipt[name], self.exp_avg_unc[name] = mean, doubt

    def _parameters(self, model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        for name, layer in layers_with(holders_of(model), self.adapter_name):
            for factor in FACTORS:
                yield f"{name}.{factor}.{self.adapter_name}", layer._modules[factor][self.adapter_name]

    def _score(self, name: str, factor: str) -> torch.Tensor:
        name = f"{name}.{factor}.{self.adapter_name}"
        return self.exp_avg_ipt[name] * self.exp_avg_unc[name]

    def _scores(self, name: str) -> torch.Tensor:
        """The importance of each triplet of a layer."""
        A, E, B = (self._score(name, factor) for factor in FACTORS)
        return E.view(-1) + A.mean(dim=1) + B.mean(dim=0)

    # ------------------------------------------------------------------------------------------------------- pruning

    def update_and_allocate(
        self, model: nn.Module, global_step: int, force_mask: bool = False
    ) -> tuple[int, RankPattern | None]:
        """Take in a step and, if it is time, prune.

        Args:
            model: the base model, after a backward pass and the optimiser's step.
            global_step: the training step.
            force_mask: prune whatever the schedule says.

        Returns:
            The budget, and the pattern of what is kept; None if nothing was decided.
        """
        if global_step < self.peft_config.total_step - self.peft_config.tfinal:
            self.update_ipt(model)
        budget, is_time = self.budget_schedule(global_step)
        if not (is_time or force_mask) or not self.exp_avg_ipt:
            return budget, None
        return budget, self.mask_to_budget(model, budget)

    @torch.no_grad()
    def mask_to_budget(self, model: nn.Module, budget: int) -> RankPattern:
        """Set E to zero for all but the most important triplets; a pruned one can come back.

        Args:
            model: the base model.
            budget: how many triplets to keep. Of equally important ones, none at the limit is kept.

        Returns:
            `"<module>.lora_E.<adapter>"` -> for each initial rank whether it is kept.
        """
        layers = dict(layers_with(holders_of(model), self.adapter_name))
        scores = {name: self._scores(name) for name in layers}
        device = next(iter(scores.values())).device
        every = torch.cat([score.to(device) for score in scores.values()])
        excess = len(every) - budget
        limit = every.kthvalue(excess).values.item() if excess > 0 else -1.0
        pattern = {}
        for name, layer in layers.items():
            # Written so that what is not a number, after a step that went wrong, prunes nothing.
            kept = ~(scores[name] <= limit)
            layer.lora_E[self.adapter_name].masked_fill_(~kept.view(-1, 1), 0.0)
            pattern[f"{pattern_key(name)}.{self.adapter_name}"] = layer.in_initial_ranks(
                self.adapter_name, kept.tolist()
            )
        return pattern

    @torch.no_grad()
    def mask_using_rank_pattern(self, model: nn.Module, rank_pattern: RankPattern | None) -> None:
        """Set E to zero where a pattern says so.

        Args:
            model: the base model.
            rank_pattern: what `mask_to_budget` gave, or a configuration has; None for nothing.
        """
        for name, layer in layers_with(holders_of(model), self.adapter_name):
            kept = pattern_of(rank_pattern, name, self.adapter_name)
            E = layer.lora_E[self.adapter_name]
            if kept is not None:
                rows = layer.of_present_ranks(self.adapter_name, kept)
                E.masked_fill_(~torch.tensor(rows, dtype=torch.bool, device=E.device).view(-1, 1), 0.0)


def pattern_of(rank_pattern: RankPattern | None, module_name: str, adapter_name: str) -> list[bool] | None:
    """What a pattern says about one module; None for nothing."""
    key = pattern_key(module_name)
    return (rank_pattern or {}).get(key, (rank_pattern or {}).get(f"{key}.{adapter_name}"))


def for_file(rank_pattern: RankPattern, adapter_name: str) -> RankPattern:
    """A pattern by names without the adapter's, as a configuration keeps it: its file may be loaded as another one."""
    return {key.removesuffix(f".{adapter_name}"): kept for key, kept in rank_pattern.items()}


def orthogonality_losses(layer: AdaLoraLayer, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """‖A·Aᵀ - I‖ and ‖Bᵀ·B - I‖ of one layer: 0 if its triplets are as a singular value decomposition has them."""
    A, B = (layer._modules[factor][adapter_name] for factor in ("lora_A", "lora_B"))
    with gather_params_ctx([A, B], modifier_rank=None, fwd_module=layer):
        return distance_to_identity(A @ A.T), distance_to_identity(B.T @ B)


def distance_to_identity(gram: torch.Tensor) -> torch.Tensor:
    """‖G - I‖ in the Frobenius norm.

    Args:
        gram: (r, r).
    """
    return torch.linalg.matrix_norm(gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
