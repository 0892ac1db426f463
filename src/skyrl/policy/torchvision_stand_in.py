"""What stands in for torchvision where it is not installed.

transformers and vLLM import it beside the picture processors of most families, though pictures need nothing of it: each
family has a processor that works with PIL, and the others (pixels on a GPU, videos) are never called here. PyPI has no
build of torchvision for a torch without CUDA, and the one that it has can't be imported beside such a torch.
"""

from __future__ import annotations

import sys
from enum import Enum
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import NoReturn

from skyrl.records import ConfigError

PARTS = ("", ".io", ".transforms", ".transforms.functional", ".transforms.v2", ".transforms.v2.functional")
MODES = ("NEAREST", "NEAREST_EXACT", "BOX", "BILINEAR", "HAMMING", "BICUBIC", "LANCZOS")
InterpolationMode = Enum("InterpolationMode", {mode: mode.lower() for mode in MODES})  # type: ignore[misc]


class _Missing:
    """A function or class of torchvision: it can be named, not called."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, *_: object, **__: object) -> NoReturn:
        raise ConfigError(
            f"model.policy: its picture processor calls {self._name}, and torchvision is not installed; install the "
            "build of torchvision that belongs to your build of torch"
        )


class _Module(ModuleType):
    __version__ = "0"

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return InterpolationMode if name == "InterpolationMode" else _Missing(f"{self.__name__}.{name}")


def stand_in_for_torchvision() -> None:
    """Make ``import torchvision`` work, and transformers choose its PIL processors, unless torchvision is installed. To
    be called before transformers is imported, which looks for torchvision once; harmless when called again.

    Raises:
        ConfigError: if torchvision is installed and can't be imported.
    """
    if "torchvision" in sys.modules:
        return
    if find_spec("torchvision") is not None:
        try:
            import torchvision  # noqa: F401
        except (ImportError, OSError, RuntimeError) as error:
            raise ConfigError(
                f"torchvision is installed, but can't be imported beside this torch: {error}. Uninstall it "
                "(pictures don't need it), or install the build that belongs to your build of torch"
            ) from error
        return
    for part in PARTS:
        name = f"torchvision{part}"
        module = _Module(name)
        module.__spec__, module.__path__ = ModuleSpec(name, None, is_package=True), []
        sys.modules[name] = module
        above, _, own = name.rpartition(".")
        if above:
            setattr(sys.modules[above], own, module)
    from transformers.models.auto import image_processing_auto

    image_processing_auto._resolve_backend = lambda *_: "pil"
