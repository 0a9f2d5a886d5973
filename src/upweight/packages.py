"""The one place where optional packages are imported."""

import importlib
from types import ModuleType

from upweight.errors import MissingPackageError

__all__ = ["require"]


def require(name: str, purpose: str) -> ModuleType:
    """Import an optional package, or say how to get it.

    Raises:
        MissingPackageError: the package is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        root = name.partition(".")[0]
        package = {"sklearn": "scikit-learn"}.get(root, root)
        raise MissingPackageError(
            f"{purpose} needs the package {package!r}, which is not installed. "
            f"Install it: pip install {package}"
        ) from error
