"""Packages that only some parts of fastreg need."""

import importlib
from types import ModuleType

from fastreg.errors import FastregError

# Extras of packages that "demo" does not bring.
EXTRAS = {"accelerate": "integrations", "lightning": "integrations", "transformers": "integrations",
          "tensorboard": "logging", "wandb": "logging"}  # fmt: skip


def require(module: str) -> ModuleType:
    """Import a package of an extra.

    Args:
        module: dotted name, ``"sklearn.datasets"``.

    Returns:
        The module.

    Raises:
        FastregError: the package is not installed; the message says how to install it.

    Example:
        >>> require("json").dumps([1])
        '[1]'
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise FastregError(
            f"fastreg: {module} must be installed, got {error} (pip install 'fastreg[{extra_of(module)}]')"
        ) from error


def extra_of(module: str) -> str:
    """The extra of fastreg that installs a module.

    Example:
        >>> extra_of("sklearn.datasets")
        'demo'
    """
    return EXTRAS.get(module.partition(".")[0], "demo")
