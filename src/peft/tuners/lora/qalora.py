"""QA-LoRA, quantisation-aware LoRA (arXiv 2309.14717): A sees one number per group of inputs, their mean.

With a group per scale of the quantised base weight, such an update could be folded into the scales' zero points.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import torch

from ...utils.tensors import bare_linear
from .variant import LoraVariant

if TYPE_CHECKING:
    from .config import LoraConfig
    from .layer import LoraLayer


def pooled(x: torch.Tensor, group_size: int) -> torch.Tensor:
    """The mean of each group of features, times the number of groups.

    Args:
        x: (..., in).
        group_size: features per group.

    Returns:
        (..., in / group_size).
    """
    groups = x.unflatten(-1, (-1, group_size))
    return groups.mean(-1) * groups.shape[-2]


class QALoraLinearVariant(LoraVariant):
    """LoRA with A (r, in / group) on groups of inputs.

    For layers over quantised weights, which ask for it themselves where `use_qalora` is set; other layers have no use for
    it. `init_lora_weights` says how B starts; A has torch's own start. There is no update of the base weight's shape that
    could be merged.
    """

    @staticmethod
    def check(module: LoraLayer, adapter_name: str, r: int, config: LoraConfig, **kwargs: Any) -> None:
        size = config.qalora_group_size
        if size < 1 or module.in_features % size:
            raise ValueError(
                f"{module.called}: its {module.in_features} inputs cannot be divided into groups of "
                f"qalora_group_size={size} for the adapter {adapter_name!r}."
            )

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        A, _ = module.factors(adapter_name)
        groups = module.in_features // config.qalora_group_size
        module.lora_A[adapter_name] = bare_linear(torch.empty(len(A), groups, dtype=A.dtype, device=A.device))
        module.lora_A[adapter_name].reset_parameters()

    @staticmethod
    def forward(
        module: LoraLayer, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        A, B = module.lora_A[active_adapter], module.lora_B[active_adapter]
        x = module.lora_dropout[active_adapter](x)
        x = pooled(x, module.in_features // A.in_features)
        return result + B(A(x)) * module.scaling[active_adapter]

    @staticmethod
    def delta_weight(module: LoraLayer, active_adapter: str) -> NoReturn:
        raise NotImplementedError(
            f"{module.called}: the adapter {active_adapter!r} is a QALoRA, which acts on means of inputs and has no merged "
            "weight. Keep the adapter, or unload() it."
        )

    get_delta_weight = delta_weight

    @staticmethod
    def merge_safe(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> NoReturn:
        QALoraLinearVariant.delta_weight(module, active_adapter)

    @staticmethod
    def merge_unsafe(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> NoReturn:
        QALoraLinearVariant.delta_weight(module, active_adapter)

    @staticmethod
    def unmerge(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> NoReturn:
        QALoraLinearVariant.delta_weight(module, active_adapter)

    def supports_lora_conversion(self) -> bool:
        """No: it has no update of the base weight's shape."""
        return False
