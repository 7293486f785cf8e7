"""Where the library meets DeepSpeed, device maps, tensor parallelism, quantised weights and the meta device."""

from __future__ import annotations

import copy
import functools
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import nn
from torch.nn.modules import module as torch_module

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Device = str | int | torch.device
Function = TypeVar("Function", bound=Callable[..., Any])

# ---------------------------------------------------------------------------------------------------- DeepSpeed


def check_deepspeed_zero3_enabled() -> bool:
    """Whether transformers was told that DeepSpeed partitions the parameters (ZeRO stage 3)."""
    # Whoever enables ZeRO-3 has imported this module, so there is no need to import it just to ask.
    integration = sys.modules.get("transformers.integrations.deepspeed")
    return integration is not None and integration.is_deepspeed_zero3_enabled()


def gather_params_ctx(
    param: nn.Parameter | Iterable[nn.Parameter], modifier_rank: int | None = 0, fwd_module: nn.Module | None = None
) -> AbstractContextManager[None]:
    """A context in which partitioned parameters are whole; does nothing without ZeRO-3.

    Args:
        param: one parameter or several.
        modifier_rank: the rank whose changes are kept and sent to the others; None when nothing is changed.
        fwd_module: the module that uses the parameters in its forward, when they belong to another one.
    """
    if not check_deepspeed_zero3_enabled():
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(param, modifier_rank=modifier_rank, fwd_module=fwd_module)


# --------------------------------------------------------------------------------------------- quantised weights


def get_bnb_param_type(param: nn.Parameter) -> Literal[False, "4bit", "8bit"]:
    """How bitsandbytes has quantised a parameter: `"4bit"`, `"8bit"`, or False when it has not."""
    # By name: bitsandbytes need not be installed for the answer "not at all".
    if type(param).__name__ == "Params4bit":
        return "4bit"
    return "8bit" if type(param).__name__ == "Int8Params" else False


def dequantize_bnb_weight(weight: nn.Parameter, state: Any = None) -> torch.Tensor:
    """The values that a bitsandbytes weight stands for; a weight of another kind comes back as it is.

    Args:
        weight: a parameter of a bitsandbytes layer.
        state: the layer's `state`, with the row scales of an 8-bit weight.

    Returns:
        (out, in): float32 for 8-bit weights, the type before quantisation for 4-bit ones.

    Raises:
        TypeError: `weight` is neither a parameter nor a tensor.
        ValueError: an 8-bit weight comes without its state.
    """
    if not isinstance(weight, torch.Tensor):  # which a parameter is, too
        raise TypeError(f"A parameter or tensor can be dequantised, got {type(weight).__name__}.")
    kind = get_bnb_param_type(weight)
    if kind == "4bit":
        return dequantize_4bit_blocks(weight.data, weight.quant_state)
    if kind == "8bit":
        if state is None:
            raise ValueError("The row scales of an 8-bit weight are in its layer's `state`: pass state=layer.state.")
        return dequantize_int8_rows(weight, state)
    return weight


def dequantize_4bit_blocks(codes: torch.Tensor, state: Any) -> torch.Tensor:
    """The values that 4-bit codes stand for, in the type before quantisation.

    Args:
        codes: as the parameter holds them.
        state: its `quant_state`.
    """
    from bitsandbytes.functional import dequantize_4bit

    if getattr(state, "packing_format_for_cpu", False):
        codes, state = bnb_4bit_in_order(codes, state)
    return dequantize_4bit(codes, state)


def bnb_4bit_in_order(codes: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
    """4-bit codes that bitsandbytes has packed for a kernel of some CPUs, in their ordinary order again.

    Packing has rounded the scales to bfloat16, and taken them out of nested quantisation; they stay as they are.

    Args:
        codes: (out, in / 2), as the parameter holds them.
        state: its `quant_state`.

    Returns:
        New codes in the shape and type that they had before, and a new state for them.
    """
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    scales, state = state.absmax, copy.copy(state)
    state.original_nested = False  # otherwise the scales were quantised, and rounded, once more
    codes, state = _convert_weight_packed_for_cpu_inverse(codes, state)
    state.absmax = scales.T.reshape(-1).float()
    return codes, state


def dequantize_int8_rows(weight: nn.Parameter, state: Any = None) -> torch.Tensor:
    """W = Q * s / 127, where row i of Q was scaled such that its largest magnitude s[i] became 127.

    Args:
        weight: Q, with s unless its layer has run already.
        state: the layer's, which has s then.

    Raises:
        ValueError: neither has s.
    """
    scales = getattr(state, "SCB", None)
    scales = getattr(weight, "SCB", None) if scales is None else scales
    if scales is None:
        raise ValueError("An 8-bit weight has no row scales, neither by itself nor in its layer's state.")
    return weight.data * scales.to(weight.device).unsqueeze(1) / 127


def dequantize_module_weight(module: nn.Module) -> torch.Tensor:
    """The weight of a layer as plain numbers, whichever of HQQ, torchao and bitsandbytes has quantised it.

    Args:
        module: a layer; one that is not quantised gives its weight itself.

    Raises:
        TypeError: its `weight` is neither a parameter nor a tensor.
    """
    if hasattr(module, "W_q"):  # HQQ keeps no attribute `weight`
        return module.dequantize()
    weight = module.weight
    if isinstance(weight, torch.Tensor) and type(weight.data).__module__.split(".")[0] == "torchao":
        return weight.dequantize()
    state = getattr(module, "state", None)
    if state is None and get_bnb_param_type(weight) == "8bit":  # an embedding, whose weight has its scales
        return dequantize_int8_rows(weight)
    return dequantize_bnb_weight(weight, state=state)


# --------------------------------------------------------------------------------------------------- device maps


def _main_device(devices: Iterable[Device]) -> Device:
    """Where offloaded modules are brought to for their forward: the first accelerator in use."""
    return next((device for device in devices if str(device) not in ("cpu", "disk")), "cpu")


def _device_of(path: str, device_map: dict[str, Device]) -> Device | None:
    """The device of the closest entry above a module, or else of the first below it."""
    parts = path.split(".")
    for end in range(len(parts), -1, -1):
        above = ".".join(parts[:end])
        if above in device_map:
            return device_map[above]
    return next((device for name, device in device_map.items() if name.startswith(f"{path}.")), None)


def get_layer_device_map(model: nn.Module) -> dict[int, Device] | None:
    """The device on which each hidden layer of a model runs.

    Args:
        model: a transformers model, perhaps one that accelerate has spread out.

    Returns:
        Layer index to device, offloaded layers to the device on which they are computed; None without a device map.

    Raises:
        RuntimeError: the device map does not say where some layer is.
    """
    device_map = getattr(model, "hf_device_map", None)
    if not device_map:
        return None
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = base.config.get_text_config(decoder=True)
    count = getattr(config, "num_decoder_layers", None) or config.num_hidden_layers
    main = _main_device(device_map.values())

    # The entries are relative to the transformers model; any list of the right length may be the decoder's.
    stacks = [name for name, part in base.named_modules() if isinstance(part, nn.ModuleList) and len(part) == count]
    stacks.sort(key=lambda name: "decoder" not in name)
    unmapped: list[str] = []
    for stack in stacks:
        devices = {index: _device_of(f"{stack}.{index}", device_map) for index in range(count)}
        missing = [f"{stack}.{index}" for index, device in devices.items() if device is None]
        if not missing:
            return {index: main if str(device) in ("cpu", "disk") else device for index, device in devices.items()}
        unmapped += missing
    found = f"nothing for {unmapped[0]!r}" if unmapped else f"and the model no list of {count} layers"
    raise RuntimeError(f"Each of {count} layers needs a device; hf_device_map has {sorted(device_map)}, {found}.")


def map_cache_to_layer_device_map(model: nn.Module, cache: Any) -> None:
    """Move each layer of a cache, in place, to the device of the model's layer.

    Args:
        model: a transformers model; nothing happens when it has no `hf_device_map`.
        cache: a transformers `Cache`; nothing happens with anything else. Of an encoder-decoder cache, the
            self-attention's part is moved.
    """
    if not getattr(model, "hf_device_map", None):
        return
    from transformers import Cache, EncoderDecoderCache

    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    if not isinstance(cache, Cache):
        return
    for index, device in get_layer_device_map(model).items():
        if index < len(cache.layers):
            _move_cache_layer(cache.layers[index], torch.device(device))


def _move_cache_layer(layer: Any, device: torch.device) -> None:
    for name, value in vars(layer).items():
        if isinstance(value, torch.Tensor):
            setattr(layer, name, value.to(device))
        elif isinstance(value, torch.device):
            setattr(layer, name, device)


# --------------------------------------------------------------------------------------------------- meta device


class _Empty(threading.local):
    """Whether this thread creates modules without memory at the moment: parameters, buffers too, or neither."""

    parameters = False
    buffers = False


_empty = _Empty()


def _parameter_on_meta(module: nn.Module, name: str, param: nn.Parameter) -> nn.Parameter | None:
    if not _empty.parameters or isinstance(param, nn.UninitializedParameter) or param.is_meta:
        return None
    moved = torch.Tensor._make_subclass(type(param), param.data.to("meta"), param.requires_grad)
    moved.__dict__.update(param.__dict__)
    return moved


def _buffer_on_meta(module: nn.Module, name: str, buffer: torch.Tensor | None) -> torch.Tensor | None:
    return buffer.to("meta") if _empty.buffers and buffer is not None else None


@contextmanager
def init_empty_weights(include_buffers: bool | None = None) -> Iterator[None]:
    """In this context, the modules that this thread creates have parameters without memory (on the meta device).

    Args:
        include_buffers: the same for buffers; by default these are real.
    """
    before = _empty.parameters, _empty.buffers
    hooks = [
        torch_module.register_module_parameter_registration_hook(_parameter_on_meta),
        torch_module.register_module_buffer_registration_hook(_buffer_on_meta),
    ]
    _empty.parameters, _empty.buffers = True, bool(include_buffers)
    try:
        yield
    finally:
        _empty.parameters, _empty.buffers = before
        for hook in hooks:
            hook.remove()


def skip_init_on_device(func: Function) -> Function:
    """Decorate a function so that it creates real tensors even when called within `init_empty_weights`."""

    @functools.wraps(func)
    def with_memory(*args: Any, **kwargs: Any) -> Any:
        before = _empty.parameters, _empty.buffers
        _empty.parameters, _empty.buffers = False, False
        try:
            return func(*args, **kwargs)
        finally:
            _empty.parameters, _empty.buffers = before

    return with_memory


# ----------------------------------------------------------------------------------------------- tensor parallel


@dataclass
class TpInfo:
    """How a model is spread by tensor parallelism."""

    tp_plan: dict[str, str]
    """Pattern of module names to the style in which their weights are split."""
    device_mesh: DeviceMesh
    tp_size: int


def dtensor_from_local_like(local_tensor: torch.Tensor, ref: torch.Tensor) -> torch.Tensor:
    """This rank's part as a distributed tensor, on the mesh and with the placements of another one.

    Args:
        local_tensor: the part that this rank holds.
        ref: a `DTensor` to lay it out like.

    Returns:
        A `DTensor`; `local_tensor` itself when `ref` is not distributed.
    """
    if not torch.distributed.is_available():
        return local_tensor
    from torch.distributed.tensor import DTensor

    if not isinstance(ref, DTensor):
        return local_tensor
    return DTensor.from_local(local_tensor, device_mesh=ref.device_mesh, placements=ref.placements, run_check=False)
