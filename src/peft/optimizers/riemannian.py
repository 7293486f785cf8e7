"""Riemannian preconditioning of LoRA's gradients (arXiv 2402.02347), for any optimiser."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..peft_model import PeftModel


def create_riemannian_optimizer(
    model: PeftModel, optimizer_cls: type[torch.optim.Optimizer], *, lr: float, reg: float = 1e-2, **kwargs: Any
) -> torch.optim.Optimizer:
    """An optimiser that follows the gradient on the manifold of low-rank products (arXiv 2402.02347).

    Before each step, ∇A becomes (BᵀB + reg·I)⁺·∇A, and ∇B becomes ∇B·(A·Aᵀ + reg·I)⁺, so that how the product moves does
    not depend on how it is divided between the factors. Only pairs of trainable matrices take part: factors of linear
    layers. Everything else that trains is stepped as `optimizer_cls` does it.

    Args:
        model: a model with a LoRA adapter.
        optimizer_cls: the optimiser to derive from.
        lr: its learning rate.
        reg: what is added to the diagonals.
        kwargs: further arguments of the optimiser.

    Returns:
        An instance of a subclass of `optimizer_cls`, with all trainable parameters in one group.

    Raises:
        TypeError: `optimizer_cls` is not a class of torch optimisers.
        ValueError: its step needs a closure, or the model has no pair of trainable factors. The returned optimiser
            raises it for a closure.
    """
    _check(optimizer_cls)
    pairs = _trainable_pairs(model)
    if not pairs:
        raise ValueError(
            f"{type(model).__name__} has no trainable pair of matrices lora_A and lora_B, which the Riemannian "
            "preconditioner is for. Adapt linear layers by LoRA, and create the optimizer while the adapter is active."
        )
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return _preconditioned(optimizer_cls, pairs, reg)(trainable, lr=lr, **kwargs)


def _check(optimizer_cls: Any) -> None:
    if not (isinstance(optimizer_cls, type) and issubclass(optimizer_cls, torch.optim.Optimizer)):
        raise TypeError(f"optimizer_cls must be a class derived from torch.optim.Optimizer, got {optimizer_cls!r}.")
    closure = inspect.signature(optimizer_cls.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise ValueError(
            f"{optimizer_cls.__name__}.step needs a closure, which computes gradients in the middle of a step, where they "
            "cannot be preconditioned. Use an optimizer that steps without one, such as AdamW or SGD."
        )


def _trainable_pairs(model: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """A (r, in) and B (out, r) of every linear layer of which both train."""
    parameters = dict(model.named_parameters())
    pairs = []
    for name, A in parameters.items():
        B = parameters.get(name.replace(".lora_A.", ".lora_B.")) if ".lora_A." in name else None
        if B is not None and all(factor.dim() == 2 and factor.requires_grad for factor in (A, B)):
            pairs.append((A, B))
    return pairs


def _preconditioned(
    optimizer_cls: type[torch.optim.Optimizer], pairs: list[tuple[nn.Parameter, nn.Parameter]], reg: float
) -> type[torch.optim.Optimizer]:
    """A subclass whose step preconditions the gradients of these pairs first."""

    class RiemannianOptimizer(optimizer_cls):
        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            """One step.

            Raises:
                ValueError: a closure is given.
            """
            if closure is not None:
                raise ValueError(
                    f"{type(self).__name__}.step takes no closure: the gradients that it would compute are not "
                    "preconditioned. Call backward() and then step()."
                )
            for A, B in pairs:
                precondition(A, B, reg)
            return super().step()

    RiemannianOptimizer.__name__ = RiemannianOptimizer.__qualname__ = f"Riemannian{optimizer_cls.__name__}"
    return RiemannianOptimizer


@torch.no_grad()
def precondition(A: nn.Parameter, B: nn.Parameter, reg: float) -> None:
    """Precondition the gradients of a pair of factors in place; a missing one is left out.

    Args:
        A: (r, in).
        B: (out, r).
        reg: what is added to the diagonals.
    """
    dtype = torch.promote_types(A.dtype, torch.float32)
    a, b = A.to(dtype), B.to(dtype)
    ridge = reg * torch.eye(len(A), dtype=dtype, device=A.device)
    if A.grad is not None:
        A.grad.copy_(torch.linalg.pinv(b.T @ b + ridge) @ A.grad.to(dtype))
    if B.grad is not None:
        B.grad.copy_(B.grad.to(dtype) @ torch.linalg.pinv(a @ a.T + ridge))
