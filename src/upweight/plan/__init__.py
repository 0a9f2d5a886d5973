"""What a run will cost, from a timed probe of two batches, before it runs."""

from upweight.plan.estimate import make_plan
from upweight.plan.plan import Plan, Stage

__all__ = ["Plan", "Stage", "make_plan"]
