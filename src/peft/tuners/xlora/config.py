"""Configuration of X-LoRA."""

from __future__ import annotations

import os
import re
import warnings
from dataclasses import dataclass
from typing import Any

from ...config import PeftConfig
from ...utils.peft_types import PeftType

DEFAULT_HIDDEN_SIZE = 4096


def in_order(adapters: dict[str, str]) -> dict[str, str]:
    """Experts in the order of their names: "2" before "10", "b" before "c"."""

    def parts(name: str) -> list[tuple[bool, int, str]]:
        split = re.split(r"(\d+)", name)
        return [(not part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in split]

    return {name: adapters[name] for name in sorted(adapters, key=parts)}


@dataclass
class XLoraConfig(PeftConfig):
    """A mixture of LoRA experts (arXiv 2402.07148): a classifier reads the hidden states and weights the experts.

    Args:
        hidden_size: width of the base model's hidden states.
        adapters: name -> folder or repository of each LoRA expert. They are numbered in the order of their names, which
            is the one order that a saved file keeps; numbers in names count by value.
        enable_softmax: let the weights of a token sum to 1.
        enable_softmax_topk: the same after the selection by `top_k_lora`.
        layerwise_scalings: have weights of its own for each layer.
        xlora_depth: layers of the classifier.
        xlora_size: width of its hidden layers, of which there are some from depth 2 on.
        xlora_dropout_p: dropout behind them.
        use_trainable_adapters: train the experts too.
        softmax_temperature: divides the logits.
        top_k_lora: experts that a token uses; all by default.
        scaling_pass_value: weight of every expert in the pass whose hidden states the classifier reads.
        global_scaling_weight: multiplies the experts' terms.
    """

    hidden_size: int = None  # type: ignore[assignment]
    adapters: dict[str, str] = None  # type: ignore[assignment]
    enable_softmax: bool = True
    enable_softmax_topk: bool = False
    layerwise_scalings: bool = False
    xlora_depth: int = 1
    xlora_size: int = 2048
    xlora_dropout_p: float = 0.2
    use_trainable_adapters: bool = False
    softmax_temperature: float = 1.0
    top_k_lora: int | None = None
    scaling_pass_value: float = 0.0
    global_scaling_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.XLORA
        self.source: tuple[str, str, dict[str, Any]] | None = None
        if self.hidden_size is None:
            warnings.warn(
                f"hidden_size is not set and is taken as {DEFAULT_HIDDEN_SIZE}; set it to the base model's config.hidden_size."
            )
            self.hidden_size = DEFAULT_HIDDEN_SIZE
        if self.adapters is None:
            warnings.warn(
                "adapters is not set: X-LoRA needs at least one LoRA expert, as in {'math': 'path/to/adapter'}."
            )
            self.adapters = {}
        self.adapters = in_order(self.adapters)
        if self.enable_softmax_topk and self.top_k_lora is None:
            warnings.warn("enable_softmax_topk has no effect without top_k_lora, the number of experts to select.")
        if self.enable_softmax_topk and self.enable_softmax:
            warnings.warn("enable_softmax and enable_softmax_topk are both set, so that a softmax is taken twice.")
        if self.top_k_lora is not None and self.top_k_lora < 1:
            warnings.warn(f"top_k_lora={self.top_k_lora} selects no expert; it should be at least 1.")

    def note_source(self, source: str | os.PathLike, subfolder: str | None, options: dict[str, Any]) -> None:
        """Remember where the file was, since the experts may be beside it, and take `adapters` as given in the call.

        Args:
            source: folder or repository.
            subfolder: where in there the file is.
            options: the keyword arguments of the call.
        """
        hub = {key: options[key] for key in ("token", "cache_dir", "local_files_only", "revision") if key in options}
        self.source = os.fspath(source), subfolder or "", hub
        if options.get("adapters") is not None:
            self.adapters = in_order(options["adapters"])
