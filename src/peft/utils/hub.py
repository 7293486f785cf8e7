"""The hub client, imported when a file is really asked for."""

from __future__ import annotations

import inspect
import os
from typing import Any


def is_offline() -> bool:
    """Whether the environment says that the hub must not be asked."""
    import huggingface_hub.constants

    return bool(huggingface_hub.constants.HF_HUB_OFFLINE) or os.environ.get("TRANSFORMERS_OFFLINE", "0") in (
        "1",
        "true",
        "True",
    )


def download_parameters() -> set[str]:
    """Names of the keyword arguments that the hub client's download takes."""
    from huggingface_hub import hf_hub_download

    return set(inspect.signature(hf_hub_download).parameters)


def cached_file(repo_id: str, filename: str, **kwargs: Any) -> str:
    """Local path of a file of a repository, downloaded if it is not in the cache."""
    from huggingface_hub import hf_hub_download

    known = download_parameters()
    return hf_hub_download(
        repo_id, filename, **{key: value for key, value in kwargs.items() if key in known and value is not None}
    )


def file_exists(repo_id: str, filename: str, **kwargs: Any) -> bool | None:
    """Whether a repository has a file; None where that cannot be found out.

    Args:
        repo_id: the repository.
        filename: the file, inside `subfolder` if that is given.
        kwargs: `revision`, `repo_type`, `token`, `subfolder`.
    """
    from huggingface_hub import file_exists as ask

    if is_offline():
        return None
    subfolder = kwargs.pop("subfolder", None)
    path = f"{subfolder}/{filename}" if subfolder else filename
    known = {
        key: value for key, value in kwargs.items() if key in ("revision", "repo_type", "token") and value is not None
    }
    try:
        return ask(repo_id, path, **known)
    except OSError:
        return None
