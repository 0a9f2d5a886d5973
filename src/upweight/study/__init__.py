"""A study: a recipe explained, audited and proved, as a page and a directory."""

from upweight.study.minimum import off_minimum
from upweight.study.page import versions, write_page
from upweight.study.study import SHOWN_QUERIES, Study, summary
from upweight.study.wish import Wish

__all__ = [
    "SHOWN_QUERIES",
    "Study",
    "Wish",
    "off_minimum",
    "summary",
    "versions",
    "write_page",
]
