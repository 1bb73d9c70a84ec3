"""The compiled GPU module ``fastreg._cuda``."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

# Imported before fastreg._cuda, so that the driver is torch's to start.
import torch  # noqa: F401


def _load() -> ModuleType | None:
    if importlib.util.find_spec("fastreg._cuda") is None:
        return None
    return importlib.import_module("fastreg._cuda")


MODULE = _load()
