"""Wrappers whose unknown attributes are those of the module that they wrap."""

from __future__ import annotations

from typing import Any, ClassVar


class ForwardsAttributes:
    """A mixin before `nn.Module`: what the wrapper does not have is asked of one of its submodules."""

    forwards_to: ClassVar[str]
    """The submodule that is asked."""

    def __getattr__(self, name: str) -> Any:
        own = self.__dict__
        for kept in ("_modules", "_parameters", "_buffers"):
            if name in own.get(kept, ()):
                return own[kept][name]
        inner = own.get("_modules", {}).get(self.forwards_to)
        if inner is None:  # half-built (deepcopy, pickle): there is no module to ask yet
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(inner, name)
