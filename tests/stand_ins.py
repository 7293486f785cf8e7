"""Stand-ins for quantised layers of packages that need a GPU: their class names, attributes and layouts, computed with torch.

They are told apart by the names of their classes and packages, as the packages' own are, and keep their weights as the
files of these packages do. What they compute is written for clarity: bit by bit, and with nothing of the library's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


def of_package(module: str) -> Callable[[type], type]:
    """Let a class say that it is defined in some package's module."""

    def pretend(cls: type) -> type:
        cls.__module__ = module
        return cls

    return pretend


def packed(codes: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """Codes as a stream of bits in words of 32, lowest bits first, along a dimension."""
    codes = codes.long().movedim(dim, -1)
    stream = (codes.unsqueeze(-1) >> torch.arange(bits) & 1).flatten(-2)
    stream = F.pad(stream, (0, -stream.shape[-1] % 32)).unflatten(-1, (-1, 32))
    words = (stream << torch.arange(32)).sum(-1)
    return torch.where(words < 2**31, words, words - 2**32).int().movedim(-1, dim)


def codes_in(words: torch.Tensor, bits: int, count: int, dim: int) -> torch.Tensor:
    """The inverse of `packed`."""
    words = words.long().movedim(dim, -1)
    stream = (
        (words.unsqueeze(-1) >> torch.arange(32) & 1).flatten(-2)[..., : count * bits].unflatten(-1, (count, bits))
    )
    return (stream << torch.arange(bits)).sum(-1).movedim(-1, dim)


def rounded(weight: torch.Tensor, bits: int, group_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes (in, out), and scales and zero points (groups, out), of a weight (out, in)."""
    groups = weight.detach().float().T.unflatten(0, (-1, group_size))
    low, high = groups.amin(1).clamp(max=0), groups.amax(1).clamp(min=0)
    scales = ((high - low) / (2**bits - 1)).half()
    zeros = (-low / scales).round().clamp(0, 2**bits - 1)
    codes = (groups / scales.unsqueeze(1) + zeros.unsqueeze(1)).round().clamp(0, 2**bits - 1)
    return codes.flatten(0, 1).long(), scales, zeros.long()


# ------------------------------------------------------------------------------------------------------------- GPTQModel


@of_package("gptqmodel.nn_modules.qlinear")
class BaseQuantLinear(nn.Module):
    bits: int
    group_size: int

    def _set_up(self, linear: nn.Linear, bits: int, group_size: int) -> None:
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bits, self.group_size = bits, group_size
        self.online_full_had = self.online_partial_had = False
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().half())

    def words(self) -> torch.Tensor:
        """`qweight` in the order of the file."""
        return self.qweight

    def dense(self) -> torch.Tensor:
        """(in, out)."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.dense().T.to(x.dtype), bias)


class Shape:
    """What GPTQModel has in the place of `weight`, for those who only look at its shape."""

    def __init__(self, *shape: int) -> None:
        self.shape, self.dtype = torch.Size(shape), torch.float16


@of_package("gptqmodel.nn_modules.qlinear.torch")
class TorchLinear(BaseQuantLinear):
    """GPTQ: words along the inputs; the group of each input is in `g_idx`."""

    planar = False

    def __init__(
        self, linear: nn.Linear, bits: int = 4, group_size: int = 16, order: torch.Tensor | None = None
    ) -> None:
        super().__init__()
        self._set_up(linear, bits, group_size)
        order = torch.arange(self.in_features) if order is None else order
        codes, scales, zeros = rounded(linear.weight[:, order], bits, group_size)
        back = order.argsort()  # inputs are grouped in another order than they come in, if activations decide on it
        self.register_buffer("g_idx", (back // group_size).int())
        self.register_buffer("qweight", packed(codes[back], bits, 0))
        self.register_buffer("qzeros", packed(zeros, bits, 1))
        self.register_buffer("scales", scales)

    @property
    def weight(self) -> Shape:
        return Shape(self.out_features, self.in_features)

    def dense(self) -> torch.Tensor:
        codes = codes_in(self.words(), self.bits, self.in_features, 0)
        zeros = codes_in(self.qzeros, self.bits, self.out_features, 1)
        return self.scales[self.g_idx.long()] * (codes - zeros[self.g_idx.long()])


@of_package("gptqmodel.nn_modules.qlinear.marlin")
class MarlinLinear(TorchLinear):
    """A kernel that keeps the words in an order of its own."""

    def __init__(self, linear: nn.Linear, **options: Any) -> None:
        super().__init__(linear, **options)
        self.qweight = self.qweight.flip(1)

    def words(self) -> torch.Tensor:
        return self.qweight.flip(1)


ORDER_IN_WORD = [0, 2, 4, 6, 1, 3, 5, 7]
"""Which of eight columns AWQ's GEMM format has where in a word of four-bit codes, lowest bits first."""


@of_package("gptqmodel.nn_modules.qlinear")
class AWQuantLinear(BaseQuantLinear):
    pass


@of_package("gptqmodel.nn_modules.qlinear.torch_awq")
class AwqTorchLinear(AWQuantLinear):
    """AWQ: words along the outputs."""

    def __init__(self, linear: nn.Linear, bits: int = 4, group_size: int = 16) -> None:
        super().__init__()
        self._set_up(linear, bits, group_size)
        codes, scales, zeros = rounded(linear.weight, bits, group_size)
        self.register_buffer("qweight", packed(self._ordered(codes, ORDER_IN_WORD), bits, 1))
        self.register_buffer("qzeros", packed(self._ordered(zeros, ORDER_IN_WORD), bits, 1))
        self.register_buffer("scales", scales)

    def _ordered(self, codes: torch.Tensor, order: list[int]) -> torch.Tensor:
        return codes if self.bits != 4 else codes.unflatten(1, (-1, 8))[..., order].flatten(1)

    def dense(self) -> torch.Tensor:
        back = sorted(range(8), key=ORDER_IN_WORD.__getitem__)
        codes, zeros = (
            self._ordered(codes_in(words, self.bits, self.out_features, 1), back)
            for words in (self.words(), self.qzeros)
        )
        groups = torch.arange(self.in_features) // self.group_size
        return (codes - zeros[groups]) * self.scales[groups]


@of_package("gptqmodel.nn_modules.qlinear.marlin_awq")
class AwqMarlinLinear(AwqTorchLinear):
    """A kernel that keeps the words in an order of its own."""

    def __init__(self, linear: nn.Linear, **options: Any) -> None:
        super().__init__(linear, **options)
        self.qweight = self.qweight.flip(0)

    def words(self) -> torch.Tensor:
        return self.qweight.flip(0)


# ------------------------------------------------------------------------------------------------------------------ EETQ


def int8_columns(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes (in, out) of a weight (out, in), rows in the order of a kernel, and the scales (out)."""
    scales = (weight.detach().float().abs().amax(1) / 127).half()
    codes = (weight.detach().float() / scales.unsqueeze(1)).round().clamp(-127, 127).to(torch.int8)
    return codes.T.flip(0).contiguous(), scales


def w8_a16_gemm(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """What EETQ's kernel computes: it turns codes to half precision, and multiplies."""
    return x @ (weight.flip(0) * scales).to(x.dtype)


@of_package("eetq.modules.qlinear")
class EetqLinear(nn.Module):
    """As transformers' class of that name; there are no attributes for its sizes."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        codes, scales = int8_columns(linear.weight)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.weight_scales = nn.Parameter(scales, requires_grad=False)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().half(), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = w8_a16_gemm(x, self.weight, self.weight_scales)
        return result if self.bias is None else result + self.bias.to(x.dtype)


# ------------------------------------------------------------------------------------------------ Intel Neural Compressor


@of_package("neural_compressor.torch.algorithms.fp8_quant._quant_common.helper_modules")
class PatchedLinear(nn.Module):
    """A weight (in, out) in 8-bit floating point with one scale; measuring, one (out, in) as it was.

    Args:
        linear: the layer in whose place it is.
        mode: "measure", "quantize", "qdq" (where the weight's values are computed before the product) or "fake" (where it
            stays in the dtype that it had).
    """

    def __init__(self, linear: nn.Linear, mode: str = "quantize") -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.mode, self.hp_dtype = mode, linear.weight.dtype
        self.use_qdq, self.fake_quant = mode == "qdq", mode == "fake"
        weight = linear.weight.detach()
        self.scale_weight = weight.abs().max() / 448
        if mode != "measure":
            self.quant_input = nn.Identity()
            weight = weight.T.contiguous()
            weight = weight if mode == "fake" else (weight / self.scale_weight).to(torch.float8_e4m3fn)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)

    def dequant_weights(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.to(self.hp_dtype) * self.scale_weight

    def qdq_weights(self, weight: torch.Tensor) -> torch.Tensor:
        return self.dequant_weights((weight / self.scale_weight).to(torch.float8_e4m3fn))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.mode == "measure":
            weight = self.weight
        elif self.mode == "fake":
            weight = self.qdq_weights(self.weight).T
        else:
            weight = self.dequant_weights(self.weight).T
        return F.linear(x, weight, self.bias)


# ------------------------------------------------------------------------------------------------------ TransformerEngine


class Float8Weight(torch.Tensor):
    """As a weight that TransformerEngine keeps quantised: it says what quantised it, and gives its values."""

    _quantizer = "a recipe"

    def dequantize(self) -> torch.Tensor:
        return self.detach().as_subclass(torch.Tensor)


@of_package("transformer_engine.pytorch.module.base")
class TransformerEngineBaseModule(nn.Module):
    """One weight, or several for parts of the outputs; without a bias, an empty one."""

    def __init__(self, linear: nn.Linear, parts: int = 1, quantised: bool = False, return_bias: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.return_bias = return_bias
        self.weight_names = ["weight"] if parts == 1 else [f"part{index}_weight" for index in range(parts)]
        for name, part in zip(self.weight_names, linear.weight.detach().chunk(parts)):
            value = nn.Parameter(part.clone(), requires_grad=False)
            if quantised:
                value = nn.Parameter(part.clone().as_subclass(Float8Weight), requires_grad=False)
            self.register_parameter(name, value)
        self.bias = torch.Tensor() if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)

    def forward(self, x: torch.Tensor, is_first_microbatch: bool | None = None) -> Any:
        weight = torch.cat([getattr(self, name).as_subclass(torch.Tensor) for name in self.weight_names])
        bias = self.bias if self.bias.numel() else None
        return (F.linear(x, weight), bias) if self.return_bias else F.linear(x, weight, bias)


@of_package("transformer_engine.pytorch.module.linear")
class Linear(TransformerEngineBaseModule):
    pass


@of_package("transformer_engine.pytorch.module.layernorm_linear")
class LayerNormLinear(TransformerEngineBaseModule):
    """A normalisation before the product."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.layer_norm_weight = nn.Parameter(torch.ones(linear.in_features), requires_grad=False)

    def forward(self, x: torch.Tensor, is_first_microbatch: bool | None = None) -> torch.Tensor:
        return super().forward(F.layer_norm(x, (self.in_features,), self.layer_norm_weight))


@of_package("transformer_engine.pytorch.module.layernorm_mlp")
class LayerNormMLP(nn.Module):
    """A network with as many outputs as inputs; no attribute says how many."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.layer_norm_weight = nn.Parameter(torch.ones(linear.in_features), requires_grad=False)
        self.fc1_weight = nn.Parameter(linear.weight.detach().clone(), requires_grad=False)
        self.fc2_weight = nn.Parameter(linear.weight.detach().T.clone(), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = F.layer_norm(x, self.layer_norm_weight.shape, self.layer_norm_weight) @ self.fc1_weight.T
        return F.gelu(hidden) @ self.fc2_weight.T
