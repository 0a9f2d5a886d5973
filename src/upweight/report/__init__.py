"""The report a person opens in a browser: plain dict -> template -> one HTML page."""

from upweight.report.page import render
from upweight.report.pictures import picture

__all__ = ["picture", "render"]
