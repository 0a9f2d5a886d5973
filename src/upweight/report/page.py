"""The page: a summary of plain values in, one self-contained HTML string out.

A summary is what ``json.load`` could return; "?" marks what may be None or absent:

    title, created, version, identity?        strings
    models: list of
      name, sentence, method, removal, unit, measure        strings
      per?: what scores are divided by; they only rank then
      change: whether scores are changes on removal; helpful: 1, −1 or 0, as in Meaning
      facts: [[label, value], ...]    damping: number    worst_residual?: number
      coverage: share of parameters   caveats: [string]
      queries: list of
        id, picture?, title, measure: number
        helpful, harmful: lists of    id, picture?, label, score
      suspects?: caption, found?: {checked, found, total}, unit? (of the loss, if not the scores')
        differing?: {count, of} of the labels that are not what the model says
        rows: list of    id, picture?, given?, predicted?, self_influence, loss, margin?, flipped?,
          issue? (whether the label is not what the model says)
      evidence?: truth?
        agreements: list of    name, r, r_interval, slope?, slope_interval?, count
        points: list of        x (predicted), y (actual), kind, query, removed
      retrained?: verdict: {grade, sentence}, statistic: {name, unit}, unit, truth, pairs: number
        cost: {trainings, ...}    notes: [string]    points: as above, of the pairs
        findings: list of      question, trials, count, failed, ceiling?: estimate
          ratings: list of     name, order: estimate, ahead?, r, slope?: estimates

An estimate is {value, interval}, as upweight.evidence writes it.
Pictures are data URIs, as ``upweight.report.picture`` makes them; intervals are 95 % intervals.
"""

import base64
import functools
import hashlib
import json
import math
from collections.abc import Mapping
from importlib import resources
from typing import Any

import jinja2

from upweight.errors import InputError
from upweight.report.numbers import MISSING, figure, interval
from upweight.report.views import model_view

__all__ = ["render"]


def render(summary: Mapping[str, Any]) -> str:
    """The report as one HTML page that needs nothing else: no network, no server, no JavaScript.

    The summary itself travels in the page, under the id ``upweight-summary`` and without its
    pictures, so that a program can read what a person sees.

    Args:
        summary: plain values in the shape that the module's docstring gives.

    Raises:
        InputError: a part of the summary is missing, or a picture is not a data URI.

    Example:
        >>> page = render({"title": "Digits", "created": "2026-11-22", "version": "0.1.0",
        ...                "models": []})
        >>> "<h1>Digits</h1>" in page
        True
    """
    for name in ("title", "created", "version", "models"):
        if name not in summary:
            raise InputError(
                f"The summary has no {name!r}; got {sorted(summary)}. Add it: "
                "upweight.report.page's docstring lists every part."
            )
    script = _resource("page.js")
    try:
        models = [model_view(model, place) for place, model in enumerate(summary["models"], 1)]
        template = _environment().get_template("page.html.j2")
        return template.render(
            summary=summary,
            models=models,
            style=_resource("style.css"),
            script=script,
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            data=_embedded(summary),
        )
    except (KeyError, jinja2.UndefinedError) as error:
        raise InputError(
            f"The summary lacks a part: {error}. upweight.report.page's docstring lists every part."
        ) from error


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("upweight.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(figure=figure, interval=interval)
    environment.globals["MISSING"] = MISSING
    return environment


@functools.cache
def _resource(name: str) -> str:
    """A style sheet or script, which jinja2 must neither read as a template nor escape."""
    return resources.files("upweight.report").joinpath("templates", name).read_text("utf-8")


def _embedded(summary: Mapping[str, Any]) -> str:
    """JSON for a script element, where "<" could end the element and is therefore escaped."""
    text = json.dumps(_plain(summary), allow_nan=False, ensure_ascii=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _plain(value: Any) -> Any:
    """JSON values: no pictures, which the page shows anyway, and null for NaN and infinity."""
    if isinstance(value, Mapping):
        return {str(k): None if k == "picture" else _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, (str, int, bool, type(None))) else str(value)
