"""FourierFT on every kind of layer (arXiv 2405.03003): W' = W + α·Re(IFFT2(F)) with a sparse trained F."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from ...engine.layer import AdditiveLayer, BaseTunerLayer, check_adapters_to_merge
from ...utils.tensors import transpose
from .spectrum import draw_places, inverse_transform

if TYPE_CHECKING:
    from .config import FourierFTConfig


class FourierFTLayer(AdditiveLayer):
    """Holds the spectra of any number of adapters beside a base layer.

    A weight with more than two axes is taken as a matrix with one row for each output feature. `scaling` is the factor
    that users set on top of the configuration's, which is in `fourierft_scaling`.

    Args:
        base_layer: the layer to adapt.
    """

    adapter_layer_names = ("fourierft_spectrum",)
    other_param_names = ("fourierft_n_frequency", "fourierft_scaling", "fourierft_random_loc_seed", "indices")

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        self._wrap(base_layer, **kwargs)
        self.fourierft_n_frequency: dict[str, int] = {}
        self.fourierft_scaling: dict[str, float] = {}
        self.fourierft_random_loc_seed: dict[str, int] = {}
        self.indices: dict[str, torch.Tensor] = {}
        self.scaling: dict[str, float] = {}
        self.fan_in_fan_out = self.kind is not None and self.kind.transposed

    # ------------------------------------------------------------------------------------------------------ adding

    def update_layer(self, adapter_name: str, n_frequency: int, config: FourierFTConfig, **kwargs: Any) -> None:
        """Add an adapter, or make it anew.

        Args:
            adapter_name: its name.
            n_frequency: trained entries of the spectrum.
            config: everything else.
            kwargs: what depends on the module, such as `target_name`.

        Raises:
            ValueError: `n_frequency` is not positive, or more than the weight has entries.
            RuntimeError: there is no `random_loc_seed`.
        """
        where = self._label or kwargs.get("target_name") or f"A {type(self).__name__}"
        shape = self._matrix_shape()
        if not 0 < n_frequency <= math.prod(shape):
            raise ValueError(
                f"{where}: n_frequency of the adapter {adapter_name!r} must be from 1 to {math.prod(shape)}, the size "
                f"of the {shape[0]} x {shape[1]} weight, got {n_frequency}."
            )
        if config.random_loc_seed is None:
            raise RuntimeError(
                f"{where}: the adapter {adapter_name!r} needs an integer as random_loc_seed, got None: the places of "
                "its frequencies are not saved and are drawn again from it."
            )
        self.fourierft_n_frequency[adapter_name] = n_frequency
        self.fourierft_scaling[adapter_name] = config.scaling
        self.fourierft_random_loc_seed[adapter_name] = config.random_loc_seed
        self.scaling[adapter_name] = self.initial_scaling(adapter_name)
        self.indices[adapter_name] = draw_places(shape, n_frequency, config.random_loc_seed)
        self.fourierft_spectrum[adapter_name] = nn.Parameter(self.empty(n_frequency))
        nn.init.normal_(self.fourierft_spectrum[adapter_name])
        if config.init_weights:
            self.reset_fourier_parameters(adapter_name)
        self._settle(adapter_name, inference_mode=config.inference_mode)

    def _matrix_shape(self) -> tuple[int, int]:
        rows, *columns = self.kind.shape(self.get_base_layer())
        return rows, math.prod(columns)

    def reset_fourier_parameters(self, adapter_name: str) -> None:
        """Start over with ΔW = 0.

        Args:
            adapter_name: the adapter.
        """
        nn.init.zeros_(self.fourierft_spectrum[adapter_name])

    # ---------------------------------------------------------------------------------------------------- the update

    def delta_weight(self, adapter: str) -> torch.Tensor:
        """ΔW with its scaling, canonical; computed in float32 at least and given in the spectrum's dtype."""
        spectrum = self.fourierft_spectrum[adapter]
        places = self.indices[adapter]
        if places.device != spectrum.device:
            places = self.indices[adapter] = places.to(spectrum.device)
        wide = spectrum.float() if spectrum.dtype in (torch.float16, torch.bfloat16) else spectrum
        matrix = inverse_transform(wide, places, self._matrix_shape())
        scaled = matrix * (self.fourierft_scaling[adapter] * self.scaling[adapter])
        return scaled.to(spectrum.dtype).view(self._weight_shape())

    def _weight_shape(self) -> tuple[int, ...]:
        return self.kind.shape(self.get_base_layer())

    def __repr__(self) -> str:
        return f"fourierft.{super().__repr__()}"


class _Layer(FourierFTLayer, nn.Module):
    """A FourierFT layer with its first adapter.

    Args:
        base_layer: the layer to adapt.
        adapter_name: the adapter.
        config: its configuration.
        n_frequency: trained entries of the spectrum.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: FourierFTConfig,
        n_frequency: int = 1000,
        **kwargs: Any,
    ) -> None:
        nn.Module.__init__(self)
        FourierFTLayer.__init__(self, base_layer, **kwargs)
        self.update_layer(adapter_name, n_frequency, config=config, **kwargs)


class FourierFTLinear(_Layer):
    """FourierFT on `nn.Linear`, quantised ones included, and transformers' `Conv1D`."""

    def _matrix_shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def _weight_shape(self) -> tuple[int, ...]:
        return self._matrix_shape()

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """ΔW with its scaling, (out, in) also where the base layer stores its weight (in, out).

        Args:
            adapter: a name this layer holds.
        """
        return self.delta_weight(adapter)

    def term(self, x: torch.Tensor, adapter: str) -> torch.Tensor:
        delta = self.get_delta_weight(adapter)
        return F.linear(self._cast_term_input(x, delta.dtype), delta)

    def fold(self, tensors: dict[str, torch.Tensor], adapter: str) -> dict[str, torch.Tensor]:
        name = self.kind.weight_name
        return {name: tensors[name] + transpose(self.get_delta_weight(adapter), self.fan_in_fan_out)}


class FourierFTEmbedding(_Layer):
    """FourierFT on `nn.Embedding`: ΔW is (width, entries)."""


class FourierFTConv1d(_Layer):
    """FourierFT on `nn.Conv1d`: ΔW is (out, C·k), C the input channels of a group."""


class FourierFTConv2d(_Layer):
    """FourierFT on `nn.Conv2d`: ΔW is (out, C·k·k), C the input channels of a group."""


class FourierFTConv3d(_Layer):
    """FourierFT on `nn.Conv3d`: ΔW is (out, C·k·k·k), C the input channels of a group."""


__all__ = [
    "BaseTunerLayer",
    "FourierFTConv1d",
    "FourierFTConv2d",
    "FourierFTConv3d",
    "FourierFTEmbedding",
    "FourierFTLayer",
    "FourierFTLinear",
    "check_adapters_to_merge",
    "transpose",
]
