"""Reading and writing files of tensors.

What is read may be anybody's: nothing in it is run, and whatever is wrong is one error.
"""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from .constants import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from .error import PeftError
from .files import replacing
from .tensors import id_tensor_storage


class TensorFileError(PeftError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError):
    """A file of tensors cannot be used: it is cut or damaged, has something else in it, or code that would run."""


def torch_load(*args: Any, weights_only: bool = True, **kwargs: Any) -> Any:
    """`torch.load` that unpickles nothing but tensors unless told otherwise."""
    return torch.load(*args, weights_only=weights_only, **kwargs)


def read_tensors(path: str | os.PathLike, device: str | torch.device = "cpu") -> dict[str, torch.Tensor]:
    """The tensors in a file by their names.

    Args:
        path: a file, of safetensors if its name ends so, otherwise of torch's format.
        device: where the tensors go.

    Raises:
        TensorFileError: it is no dictionary of ordinary tensors; the message names the file.
    """
    path = os.fspath(path)
    try:
        state = (
            _read_safetensors(path, device) if path.endswith(".safetensors") else torch_load(path, map_location=device)
        )
    except OSError:  # of the file system, which says by itself what is wrong
        raise
    except Exception as error:  # damaged pickles have any error there is
        raise TensorFileError(f"{path} cannot be read: {_first_line(error)}") from error
    return checked(state, path)


def checked(state: Any, path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """A dictionary of tensors as it was read.

    Args:
        state: what was read.
        path: the file, for the error.

    Raises:
        TensorFileError: it is something else.
    """
    if not isinstance(state, dict):
        raise TensorFileError(f"{path} has no dictionary of tensors but a {type(state).__name__}.")
    for name, value in state.items():
        if not isinstance(name, str) or not torch.is_tensor(value):
            raise TensorFileError(f"{path} has a {type(value).__name__} under {name!r}; expected names and tensors.")
        if value.layout != torch.strided or value.is_quantized or value.is_meta:
            kind = "quantised" if value.is_quantized else "without values" if value.is_meta else str(value.layout)
            raise TensorFileError(f"{path}: {name!r} is {kind}; expected an ordinary tensor.")
    return state


def _read_safetensors(path: str, device: str | torch.device) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    if str(device) == "mps":
        return {name: value.to(device) for name, value in load_file(path).items()}
    if torch.device(device).type == "cpu":
        return _read_into_memory(path)
    return load_file(path, device=str(device))


def _read_into_memory(path: str) -> dict[str, torch.Tensor]:
    """A file's tensors, each in memory of its own: what is mapped would change with what is written over the file."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as mapped:
        return {name: mapped.get_tensor(name).clone() for name in mapped.keys()}


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no further words'}"


def write_weights(folder: Path, state: dict[str, torch.Tensor], safe_serialization: bool = True) -> None:
    """Write an adapter's weights beside and rename.

    Args:
        folder: an existing folder.
        state: tensors by their names on disk.
        safe_serialization: safetensors; torch's format otherwise.
    """
    if safe_serialization:
        from safetensors.torch import save_file

        with replacing(folder / SAFETENSORS_WEIGHTS_NAME) as path:
            save_file(_apart(state), path, metadata={"format": "pt"})
    else:
        with replacing(folder / WEIGHTS_NAME) as path:
            torch.save(state, path)


def _apart(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors that share no storage and are contiguous, as safetensors wants them."""
    seen: set[Any] = set()
    result = {}
    for name, tensor in state.items():
        storage = id_tensor_storage(tensor)
        shared = storage in seen and tensor.numel() > 0
        seen.add(storage)
        result[name] = tensor.clone().contiguous() if shared else tensor.contiguous()
    return result
