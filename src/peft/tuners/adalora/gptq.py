"""AdaLoRA on linear layers of GPTQ; see `peft.engine.backends.gptq` for how these keep their weights."""

from ...engine.layer import AdapterLayer
from .config import AdaLoraConfig
from .layer import AdaLoraLayer, SVDLinear


class SVDQuantLinear(SVDLinear):
    """AdaLoRA on a linear layer whose weight is quantised by GPTQ, into which nothing can be merged."""


LAYER_CLASSES: dict[tuple[str, str], type[AdapterLayer]] = {("gptq", "linear"): SVDQuantLinear}

__all__ = ["AdaLoraConfig", "AdaLoraLayer", "SVDQuantLinear"]
