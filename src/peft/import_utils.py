"""Which optional packages can be used here; each answer is found once and kept."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any

from packaging.version import InvalidVersion, Version

_OLDEST_GPTQMODEL = "7.0.0"
_OLDEST_TORCHAO = "0.16.0"


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _release_of(package: str) -> tuple[int, ...]:
    """The numbers of a package's version; builds from source count as the release that they lead to."""
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # on the path without having been installed
        version = getattr(importlib.import_module(package), "__version__", "0")
    try:
        return Version(version).release
    except InvalidVersion as error:
        raise ImportError(f"The version of {package}, {version!r}, cannot be read.") from error


def _at_least(package: str, version: str) -> bool:
    return _release_of(package) >= Version(version).release


def _installed_at_least(package: str, version: str) -> bool:
    """Whether the package is there.

    Raises:
        ImportError: it is there and too old to work with.
    """
    if not _installed(package):
        return False
    if not _at_least(package, version):
        found = ".".join(map(str, _release_of(package)))
        raise ImportError(f"{package} {version} or newer is needed, found {found}: upgrade it or uninstall it.")
    return True


@functools.lru_cache
def is_bnb_available() -> bool:
    """Whether bitsandbytes is installed."""
    return _installed("bitsandbytes")


@functools.lru_cache
def is_bnb_4bit_available() -> bool:
    """Whether bitsandbytes is installed and has 4-bit layers."""
    return is_bnb_available() and hasattr(importlib.import_module("bitsandbytes").nn, "Linear4bit")


@functools.lru_cache
def is_gptqmodel_available() -> bool:
    """Whether GPTQModel is installed.

    Raises:
        ImportError: it is older than 7.0.0.
    """
    return _installed_at_least("gptqmodel", _OLDEST_GPTQMODEL)


@functools.lru_cache
def is_torchao_available() -> bool:
    """Whether torchao is installed.

    Raises:
        ImportError: it is older than 0.16.0.
    """
    return _installed_at_least("torchao", _OLDEST_TORCHAO)


@functools.lru_cache
def is_torchao_ge_v0_18_0() -> bool:
    """Whether torchao 0.18.0 or newer is installed."""
    return _installed("torchao") and _at_least("torchao", "0.18.0")


@functools.lru_cache
def is_optimum_available() -> bool:
    """Whether optimum is installed."""
    return _installed("optimum")


@functools.lru_cache
def is_aqlm_available() -> bool:
    """Whether AQLM is installed."""
    return _installed("aqlm")


@functools.lru_cache
def is_eetq_available() -> bool:
    """Whether EETQ is installed."""
    return _installed("eetq")


@functools.lru_cache
def is_hqq_available() -> bool:
    """Whether HQQ is installed."""
    return _installed("hqq")


@functools.lru_cache
def is_inc_available() -> bool:
    """Whether Intel Neural Compressor is installed."""
    return _installed("neural_compressor")


@functools.lru_cache
def is_te_available() -> bool:
    """Whether TransformerEngine is installed, for any framework."""
    return _installed("transformer_engine")


@functools.lru_cache
def is_te_pytorch_available() -> bool:
    """Whether TransformerEngine is installed with its layers for PyTorch."""
    return is_te_available() and _installed("transformer_engine.pytorch")


@functools.lru_cache
def is_diffusers_available() -> bool:
    """Whether diffusers is installed."""
    return _installed("diffusers")


@functools.lru_cache
def is_torch_tpu_available(check_device: bool = True) -> bool:
    """Whether torch_xla is installed.

    Args:
        check_device: ask also for a device that torch_xla can use.
    """
    if not _installed("torch_xla"):
        return False
    if not check_device:
        return True
    try:
        importlib.import_module("torch_xla.core.xla_model").xla_device()
    except RuntimeError:  # how torch_xla says that there is none
        return False
    return True


@functools.lru_cache
def is_xpu_available(check_device: bool = False) -> bool:
    """Whether torch can use Intel GPUs.

    Args:
        check_device: ask also whether memory can be had on one.
    """
    import torch

    if not torch.xpu.is_available():
        return False
    if not check_device:
        return True
    try:
        torch.empty(1, device="xpu")
    except RuntimeError:
        return False
    return True


def names_where_installed(package: str, **names: tuple[str, Callable[[], bool]]) -> Callable[[str], Any]:
    """A package's `__getattr__`, for names that it has only where something is installed.

    Args:
        package: its `__name__`.
        names: the module that a name is in, relative to the package, and whether what it needs is there.

    Raises:
        AttributeError: by the function that is returned: a name is not among these, or what it needs is missing.
    """

    def getattr_(name: str) -> Any:
        module, is_available = names.get(name, ("", None))
        if is_available is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if not is_available():
            raise AttributeError(
                f"module {package!r} has {name!r} only with an optional package; see {package}{module}."
            )
        return getattr(importlib.import_module(module, package), name)

    return getattr_
