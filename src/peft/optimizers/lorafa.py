"""LoRA-FA (arXiv 2308.03303): A stays as it started, B follows the gradient of the product."""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..engine.lifecycle import holders_of
from ..peft_model import PeftModel
from ..tuners.lora.layer import LoraLayer
from ..utils.devices import infer_device

_B = re.compile(r"(.*)\blora_B(\.(?!.*\bbias$).*)")
"""The name of a factor B: its layer's, and what follows; B's own bias is no factor."""


def create_lorafa_optimizer(
    model: PeftModel,
    r: int,
    lora_alpha: int,
    lr: float,
    weight_decay: float = 0.0,
    use_rslora: bool | None = None,
) -> Optimizer:
    """The optimiser of LoRA-FA (arXiv 2308.03303), with every factor `lora_A` of the model declared frozen.

    The factors of embeddings train both, by AdamW: theirs start with A = 0, which B alone cannot move.

    Args:
        model: a model with a LoRA adapter.
        r: rank that the legacy group entry `scaling_factor` is computed from; each layer's own scaling is used.
        lora_alpha: the same.
        lr: learning rate.
        weight_decay: how much of a weight is taken off in a step, as a multiple of `lr`.
        use_rslora: deprecated; the adapters' configurations say so.

    Raises:
        ValueError: `use_rslora` is not what the configurations of the active adapters say.
    """
    scaling = lora_alpha / math.sqrt(r) if _uses_rslora(model, use_rslora) else lora_alpha / r
    scalings: dict[int, float] = {}
    for _, holder in holders_of(model):
        if isinstance(holder, LoraLayer):
            for adapter, container, _, parameter in holder.adapter_parameters():
                scalings[id(parameter)] = float(holder.scaling[adapter])
                if container == "lora_A":
                    holder.declare_frozen(adapter, container)
    names, parameters = zip(*model.named_parameters())
    group = {
        "params": list(parameters),
        "lr": lr,
        "names": list(names),
        "scaling_factors": [scalings.get(id(parameter)) for parameter in parameters],
        "scaling_factor": scaling,
        "betas": (0.9, 0.999),
        "weight_decay": weight_decay,
    }
    return LoraFAOptimizer([group])


def _uses_rslora(model: PeftModel, asked: bool | None) -> bool:
    configured = {name: model.peft_config[name].use_rslora for name in model.active_adapters}
    if asked is None:
        return all(configured.values())
    others = [name for name, value in configured.items() if value != asked]
    if others:
        raise ValueError(
            f"use_rslora={asked} is not what the configurations of the active adapters {others} say. Set it in their "
            "LoraConfig, and leave it out here."
        )
    warnings.warn("use_rslora is taken from the adapters' configurations; leave it out here.", FutureWarning)
    return asked


class LoraFAOptimizer(Optimizer):
    """AdamW in which B moves as the product s·B·A would, with A frozen (arXiv 2308.03303).

    The gradient that B follows is (1/s²)·∇B·(A·Aᵀ + 1e-8·I)⁺, its product rounded to bfloat16. What is no factor of a
    pair follows its own gradient.

    Args:
        params: groups with `params`, their `names` in the model, and for each the `scaling_factors` s of its layer.
        lr: learning rate.
        betas: decay of the running means of the gradient and of its square.
        eps: what is added to the denominator.
        weight_decay: how much of a weight is taken off in a step, as a multiple of `lr`.
        correct_bias: correct the running means for their start at zero.

    Raises:
        ValueError: a negative `lr` or `eps`, or a beta outside [0, 1).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps)):
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}.")
        for beta in betas:
            if not 0 <= beta < 1:
                raise ValueError(f"betas must be in [0, 1), got {betas}.")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "correct_bias": correct_bias}
        super().__init__(params, defaults)
        self._warned = False

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step.

        Args:
            closure: computes the loss and its gradients before the step.

        Returns:
            What the closure returned.

        Raises:
            KeyError: a group lacks `names`, or has neither `scaling_factors` nor `scaling_factor`.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if "names" not in group:
                raise KeyError(
                    "A group of LoraFAOptimizer needs the 'names' of its 'params', by which factors are paired; "
                    "create_lorafa_optimizer gives them."
                )
            self._step_group(group, self._scalings(group))
        return loss

    def _scalings(self, group: dict[str, Any]) -> list[float | None]:
        if "scaling_factors" in group:
            return group["scaling_factors"]
        if "scaling_factor" not in group:
            raise KeyError(
                "A group of LoraFAOptimizer needs 'scaling_factors', one for each of its 'params'; "
                "create_lorafa_optimizer gives them."
            )
        if not self._warned:
            self._warned = True
            warnings.warn(
                "A group of LoraFAOptimizer with one 'scaling_factor' for all layers is deprecated; give it "
                "'scaling_factors', one for each of its 'params'.",
                FutureWarning,
            )
        return [group["scaling_factor"]] * len(group["params"])

    def _step_group(self, group: dict[str, Any], scalings: list[float | None]) -> None:
        parameters = dict(zip(group["names"], group["params"]))
        pairs = paired(group["names"])
        frozen = {a for a, _ in pairs.values()}
        for name, parameter, scaling in zip(group["names"], group["params"], scalings):
            gradient = parameter.grad
            if gradient is None or name in frozen:
                continue
            if name in pairs:
                a, key = pairs[name]
                gradient = projected(gradient, parameters[a], scaling)
                self._adamw(group, self.state[key], parameter, gradient, suffix="_B")
            else:
                self._adamw(group, self.state[name], parameter, gradient)

    def _adamw(
        self, group: dict[str, Any], state: Any, parameter: nn.Parameter, gradient: torch.Tensor, suffix: str = ""
    ) -> None:
        mean, square = f"exp_avg{suffix}", f"exp_avg_sq{suffix}"
        if not state:
            state.update({"step": 0, mean: torch.zeros_like(parameter), square: torch.zeros_like(parameter)})
        state["step"] += 1
        (beta1, beta2), lr = group["betas"], group["lr"]
        state[mean].mul_(beta1).add_(gradient, alpha=1 - beta1)
        state[square].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        size = lr
        if group["correct_bias"]:
            size = lr * math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])
        parameter.addcdiv_(state[mean], state[square].sqrt().add_(group["eps"]), value=-size)
        if group["weight_decay"] > 0:
            parameter.add_(parameter, alpha=-lr * group["weight_decay"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state; running means are brought to the devices of their parameters.

        Args:
            state_dict: what `state_dict()` gave.
        """
        super().load_state_dict(state_dict)
        # torch moves what is kept by parameter; here it is kept by name.
        for group in self.param_groups:
            keys = {name: key for name, (_, key) in paired(group["names"]).items()}
            for name, parameter in zip(group["names"], group["params"]):
                state = self.state.get(keys.get(name, name), {})
                for entry, value in state.items():
                    if torch.is_tensor(value):
                        state[entry] = value.to(parameter.device)


def paired(names: list[str]) -> dict[str, tuple[str, str]]:
    """The factors among some parameters: name of B -> name of its A, and the key that their state is kept under.

    Args:
        names: names of parameters in a model.
    """
    known = set(names)
    found = {}
    for name in names:
        match = _B.fullmatch(name)
        partner = f"{match[1]}lora_A{match[2]}" if match else ""
        if partner in known:
            found[name] = (partner, f"{match[1]}lora")
    several = Counter(key for _, key in found.values())
    # Adapters of one layer have states of their own; a single one's is called as it has always been.
    return {name: (a, name if several[key] > 1 else key) for name, (a, key) in found.items()}


def projected(gradient: torch.Tensor, A: torch.Tensor, scaling: float) -> torch.Tensor:
    """The gradient of B for which s·B·A moves as near as it can to the gradient of the whole weight.

    Args:
        gradient: B's, (out, r, *ones).
        A: (r, in, *window); with groups, each has its share of the r rows.
        scaling: s.

    Returns:
        The shape and dtype of `gradient`; the product is rounded to bfloat16, unless it is float64.
    """
    rank = gradient.shape[1]
    if len(A) != rank:
        return _projected_by_group(gradient, A, scaling)
    rows = A.flatten(1)
    # In float32 at least, which is what the identity is in.
    gram = rows @ rows.T + 1e-8 * torch.eye(rank, dtype=torch.float32, device=rows.device)
    product = _rounded(gradient.flatten(1)) @ _rounded(torch.linalg.pinv(gram))
    return ((1 / scaling**2) * product).to(gradient.dtype).view_as(gradient)


def _projected_by_group(gradient: torch.Tensor, A: torch.Tensor, scaling: float) -> torch.Tensor:
    groups = len(A) // gradient.shape[1]
    parts = zip(gradient.chunk(groups), A.chunk(groups))
    return torch.cat([projected(part, rows, scaling) for part, rows in parts])


def _rounded(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.bfloat16()


__all__ = ["LoraFAOptimizer", "PeftModel", "create_lorafa_optimizer", "infer_device", "paired", "projected"]
