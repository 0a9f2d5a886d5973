"""Whether a model is where influence describes it: at a minimum of its objective."""

__all__ = ["MINIMUM", "off_minimum"]

MINIMUM = 1e-5


def off_minimum(slope: float) -> str | None:
    """What to say of a gradient norm that no minimum has; None of one small enough.

    Example:
        >>> off_minimum(1e-9) is None
        True
        >>> off_minimum(0.25).partition(":")[0]
        'gradient norm 2.5e-01, more than 1e-05'
    """
    if slope <= MINIMUM:
        return None
    return (
        f"gradient norm {slope:.1e}, more than {MINIMUM:.0e}: not at a minimum. Train longer, or "
        "state the l2 it was trained with; refits from here may be refused."
    )
