"""What transformers says about a quantised model, and which layers GPTQModel made."""

from __future__ import annotations

from typing import Any

from torch import nn

from .. import import_utils


def get_quantization_config(model: nn.Module, method: str) -> Any | None:
    """The quantisation configuration of a model, None unless it is quantised by that method.

    Args:
        model: a transformers model.
        method: such as "gptq", as transformers calls it.
    """
    if getattr(getattr(model, "config", None), "quantization_config", None) is None:
        return None
    return model.config.quantization_config if getattr(model, "quantization_method", None) == method else None


def get_gptqmodel_quant_linear(gptq_quantization_config: Any, device_map: Any = None) -> type[nn.Module] | None:
    """The class of linear layer that GPTQModel uses for a configuration; None without either of them.

    Args:
        gptq_quantization_config: transformers' `GPTQConfig`.
        device_map: where the layers are; GPTQModel chooses its kernels by it.
    """
    if gptq_quantization_config is None or not import_utils.is_gptqmodel_available():
        return None
    from gptqmodel.quantization import METHOD
    from gptqmodel.utils.importer import hf_select_quant_linear_v2

    config = gptq_quantization_config
    return hf_select_quant_linear_v2(
        bits=config.bits,
        group_size=config.group_size,
        desc_act=config.desc_act,
        sym=config.sym,
        format=getattr(config, "format", None) or getattr(config, "checkpoint_format", "gptq"),
        backend=getattr(config, "backend", None) or "auto",
        device_map=device_map,
        meta=getattr(config, "meta", None),
        quant_method=METHOD.GPTQ,
        pack=False,
    )


def is_from(module: nn.Module, package: str, *class_names: str) -> bool:
    """Whether a module's class is, or derives from, one of these classes of a package.

    Args:
        module: any module.
        package: as it is imported; nothing is.
        class_names: the classes' own names, wherever in the package they are defined.
    """
    # By name: to ask is no reason to import the package, and where nobody has imported it no layer is of it.
    return any(
        cls.__name__ in class_names and cls.__module__.partition(".")[0] == package for cls in type(module).__mro__
    )


def is_gptqmodel_quant_linear(module: nn.Module) -> bool:
    """Whether a module is one of GPTQModel's quantised linear layers."""
    return is_from(module, "gptqmodel", "BaseQuantLinear")


def is_gptqmodel_awq_layer(module: nn.Module) -> bool:
    """Whether a module is one of GPTQModel's linear layers for AWQ weights."""
    return is_from(module, "gptqmodel", "AWQuantLinear")
