"""Rules: how each parametrised operation enters the recorded graph. Importing the package registers them.

But for those in ``registry.LATE``, whose functions take long to import: they wait until somebody has imported these.
"""

from __future__ import annotations

import importlib
import pkgutil

from fastreg.rules.registry import LATE

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    if _module.name not in LATE.values():
        importlib.import_module(_module.name)
