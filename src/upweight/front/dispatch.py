"""One question with two answers: which of them is meant is seen from an argument."""

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

__all__ = ["answered_by"]

Asked = ParamSpec("Asked")
Answer = TypeVar("Answer")


def answered_by(
    other: Callable[..., Any], *, where: str
) -> Callable[[Callable[Asked, Answer]], Callable[..., Any]]:
    """Answer by another question wherever an argument of its own is named.

    Args:
        other: takes that argument.
        where: its name.

    Example:
        >>> @answered_by(lambda x, by: x / by, where="by")
        ... def half(x):
        ...     return x / 2
        >>> half(12), half(12, by=3)
        (6.0, 4.0)
    """

    def decorate(question: Callable[Asked, Answer]) -> Callable[..., Any]:
        @wraps(question)
        def either(*args: Asked.args, **kwargs: Asked.kwargs) -> Any:
            return (other if where in kwargs else question)(*args, **kwargs)

        return either

    return decorate
