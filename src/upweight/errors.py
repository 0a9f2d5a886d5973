"""Every exception the library raises on purpose.

    UpweightError
    ├── InputError (ValueError)           something that was passed cannot be used
    │   ├── ModelError                    the module, its mode or its parameters
    │   ├── DataError                     the examples, their ids or their order
    │   ├── LossError                     the loss, its shape or its labels
    │   └── RecipeError                   a recipe file
    ├── NumericalError (ArithmeticError)  the numbers do not allow an answer
    │   ├── NonFiniteError                NaN or infinity, with the place
    │   ├── IndefiniteError               a curvature with a direction that bends down
    │   └── NotConvergedError             a solve that stopped early
    ├── StoreError (OSError)              a run directory
    ├── ResourceError (MemoryError)       memory ran out
    └── MissingPackageError (ImportError) an optional package

A message is one sentence of what was expected and what came, then one that says what to do.
"""

__all__ = [
    "DataError",
    "IndefiniteError",
    "InputError",
    "LossError",
    "MissingPackageError",
    "ModelError",
    "NonFiniteError",
    "NotConvergedError",
    "NumericalError",
    "RecipeError",
    "ResourceError",
    "StoreError",
    "UpweightError",
]


class UpweightError(Exception):
    """Base of every error raised on purpose."""


class InputError(UpweightError, ValueError):
    """Something that was passed cannot be used."""


class ModelError(InputError):
    """The module, its mode or its parameters cannot be used."""


class DataError(InputError):
    """The examples, their ids or their order cannot be used."""


class LossError(InputError):
    """The loss, its shape or its labels cannot be used."""


class RecipeError(InputError):
    """A recipe file lacks a name or defines a wrong one."""


class NumericalError(UpweightError, ArithmeticError):
    """The numbers do not allow an answer."""


class NonFiniteError(NumericalError):
    """A loss or a gradient is NaN or infinite."""


class IndefiniteError(NumericalError):
    """The curvature has a direction that bends down, so its inverse answers another question."""


class NotConvergedError(NumericalError):
    """An iterative solve stopped before its tolerance."""


class StoreError(UpweightError, OSError):
    """A run directory cannot be read, written or reused."""


class ResourceError(UpweightError, MemoryError):
    """Memory ran out, and smaller steps did not help."""


class MissingPackageError(UpweightError, ImportError):
    """An optional package is needed for this call."""
