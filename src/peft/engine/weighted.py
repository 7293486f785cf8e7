"""Making one adapter out of several: what does not depend on the method.

A method says how its own tensors are combined. Here are the checks of what is asked for, the targets of the new adapter,
and what it takes over as it is: copies of modules and rows of embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..utils.naming import did_you_mean
from .lifecycle import AdapterHolder

if TYPE_CHECKING:
    from .tuner import BaseTuner


def check_sources(tuner: BaseTuner, adapters: Sequence[str], weights: Sequence[float]) -> None:
    """Raise unless these adapters can be combined.

    Args:
        tuner: the tuner that has them.
        adapters: their names.
        weights: one number for each.

    Raises:
        ValueError: an unknown adapter, another number of weights, or several adapters that replace one module.
    """
    known = sorted(tuner.peft_config)
    for name in adapters:
        if name not in known:
            raise ValueError(f"There is no adapter {name!r}; known are {known}.{did_you_mean(name, known)}")
    if not adapters or len(weights) != len(adapters):
        raise ValueError(
            f"Each adapter needs one weight: got {len(adapters)} adapters {list(adapters)} and {len(weights)} weights."
        )
    for label, holder in tuner.holders:
        rivals = [name for name in dict.fromkeys(adapters) if name in holder._get_available_adapters()]
        if not isinstance(holder, tuner.tuner_layer_cls) and len(rivals) > 1:
            raise ValueError(
                f"The adapters {rivals} each have their own copy of the module {label!r}, or their own rows of it, which "
                "cannot be added up. Combine adapters of which at most one has it in modules_to_save or "
                "trainable_token_indices."
            )


def union_of(values: list[Any], field_name: str) -> str | set[str]:
    """What any of several values of one field selects.

    Args:
        values: regular expressions, or collections of names.
        field_name: the field, for the error.

    Raises:
        ValueError: some are regular expressions and some are collections.
    """
    if all(isinstance(value, str) for value in values):
        patterns = list(dict.fromkeys(values))
        return patterns[0] if len(patterns) == 1 else "|".join(f"({pattern})" for pattern in patterns)
    if any(isinstance(value, str) for value in values):
        raise ValueError(
            f"{field_name} of the adapters are partly regular expressions and partly lists, which have no common "
            f"form: {values}."
        )
    return set().union(*values)


@torch.no_grad()
def take_over(holder: AdapterHolder, adapters: Sequence[str], adapter_name: str) -> None:
    """Give a wrapper's new adapter the values of the one that it has among others.

    Args:
        holder: the wrapper.
        adapters: the others.
        adapter_name: the new one.
    """
    source = next((name for name in adapters if name in holder._get_available_adapters()), None)
    if source is None:
        return
    values = {entry.saved: entry.tensor for entry in holder.state_entries(source)}
    for entry in holder.state_entries(adapter_name):
        entry.tensor.copy_(values[entry.saved])
