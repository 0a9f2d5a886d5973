"""From a summary to what the template prints: texts, widths and charts; no HTML here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from upweight.errors import InputError
from upweight.report.numbers import Scale, figure, finite, percent, scale_of
from upweight.report.retrained import Retrained, retrained_view
from upweight.report.scatter import Scatter, scatter
from upweight.report.verdict import Verdict, verdict

__all__ = [
    "Example",
    "ModelView",
    "Number",
    "Query",
    "Side",
    "Suspect",
    "audit_heading",
    "differing",
    "model_view",
    "sides",
]


@final
@dataclass(frozen=True)
class Example:
    """A training example beside a query: its score written out and as a bar's width."""

    id: str
    picture: str | None
    label: str
    score: str
    width: float


@final
@dataclass(frozen=True)
class Side:
    """The helpful or the harmful examples of a query; its kind is empty where none are either."""

    kind: str
    word: str
    note: str
    examples: tuple[Example, ...]


@final
@dataclass(frozen=True)
class Query:
    """An explained query."""

    id: str
    picture: str | None
    title: str
    measured: str
    unit: str
    sides: tuple[Side, ...]
    pictured: bool


@final
@dataclass(frozen=True)
class Number:
    """A cell of a table: its text, and what it sorts by (empty where there is no number)."""

    text: str
    key: str


@final
@dataclass(frozen=True)
class Suspect:
    """A training example whose label looks wrong; its numbers are in the table's order."""

    rank: int
    id: str
    picture: str | None
    given: str | None
    predicted: str | None
    flipped: bool | None
    issue: bool | None
    numbers: tuple[Number, ...]
    width: float


@final
@dataclass(frozen=True)
class ModelView:
    """Everything that the page shows of one model."""

    place: int
    summary: Mapping[str, Any]
    verdict: Verdict
    queries: tuple[Query, ...]
    suspects: tuple[Suspect, ...]
    columns: tuple[str, ...]
    number_columns: tuple[tuple[str, str], ...]
    audited: str
    differing: str
    found: str
    scatter: Scatter
    retrained: Retrained | None
    settings: tuple[tuple[str, str], ...]

    @property
    def pictured(self) -> bool:
        """Whether any suspect has a picture."""
        return any(suspect.picture for suspect in self.suspects)


def model_view(model: Mapping[str, Any], place: int) -> ModelView:
    """What the page shows of one model, the place-th.

    Raises:
        InputError: a picture is not a data URI.
        KeyError: a part is missing.

    Example:
        >>> view = model_view({"name": "m", "unit": "nats", "measure": "loss", "queries": [],
        ...     "helpful": 1, "change": True, "method": "exact", "damping": 0.0, "coverage": 1.0,
        ...     "removal": "mean"}, 1)
        >>> view.verdict.grade
        'unchecked'
    """
    suspects = model.get("suspects") or {}
    rows = suspects.get("rows") or []
    # Self-influence and loss are in the loss's unit, which the scores need not share.
    loss_unit = suspects.get("unit") or (model["unit"] if model["measure"] == "loss" else "")
    heads = [("self_influence", "Self-influence", loss_unit), ("loss", "Loss", loss_unit)]
    if any(row.get("margin") is not None for row in rows):
        heads.append(("margin", "Margin", ""))
    scales = {name: scale_of(row.get(name) for row in rows) for name, _, _ in heads}
    points = (model.get("evidence") or {}).get("points") or []
    return ModelView(
        place=place,
        summary=model,
        verdict=verdict(model),
        queries=tuple(_query(query, model) for query in model["queries"]),
        suspects=_suspects(rows, scales),
        columns=tuple(
            name
            for name in ("given", "predicted", "issue", "flipped")
            if any(row.get(name) is not None for row in rows)
        ),
        number_columns=tuple((head, scales[name].unit(unit).strip()) for name, head, unit in heads),
        audited=audit_heading(suspects),
        differing=differing(suspects),
        found=_found(suspects.get("found")),
        # Scores that only rank have no unit in common with what happened.
        scatter=scatter([] if model.get("per") else points, model["unit"]),
        retrained=retrained_view(model),
        settings=_settings(model),
    )


def sides(model: Mapping[str, Any]) -> dict[str, str]:
    """What the examples on either side of a query are called, by the side's name in the summary.

    Example:
        >>> sides({"change": True, "helpful": 0})
        {'helpful': 'Removal raises most', 'harmful': 'Removal lowers most'}
    """
    if not model["change"]:
        words = ("Largest", "Smallest")
    elif model["helpful"]:
        words = ("Most helpful", "Most harmful")
    else:
        words = ("Removal raises most", "Removal lowers most")
    return dict(zip(("helpful", "harmful"), words, strict=True))


def _query(query: Mapping[str, Any], model: Mapping[str, Any]) -> Query:
    heads, signed = sides(model), model["change"] and model["helpful"]
    examples = {side: query.get(side) or [] for side in heads}
    scores = [example["score"] for one in examples.values() for example in one]
    scale = scale_of(scores)
    most = max((abs(v) for v in map(finite, scores) if v is not None), default=0.0)
    return Query(
        id=str(query["id"]),
        picture=_checked(query.get("picture")),
        title=query["title"],
        measured=_measured(query, model) if model["change"] else "",
        unit=scale.unit(" per ".join(filter(None, (model["unit"], model.get("per"))))),
        sides=tuple(
            Side(
                side if signed else "",
                head,
                _direction(examples[side], _measure(model)) if signed else "",
                tuple(_example(example, scale, most) for example in examples[side]),
            )
            for side, head in heads.items()
        ),
        pictured=any(e.get("picture") for one in examples.values() for e in one),
    )


def _measure(model: Mapping[str, Any]) -> str:
    return str(model["measure"]).replace("_", " ")


def _measured(query: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    return f"{_measure(model)} {figure(query['measure'])} {model['unit']}"


def _direction(examples: Sequence[Mapping[str, Any]], measure: str) -> str:
    """What the sign of the scores says; nothing where it differs within the row."""
    scores = [finite(example["score"]) or 0.0 for example in examples]
    if scores and min(scores) > 0:
        return f"removing one raises this query’s {measure}"
    if scores and max(scores) < 0:
        return f"removing one lowers this query’s {measure}"
    return ""


def _example(example: Mapping[str, Any], scale: Scale, most: float) -> Example:
    return Example(
        id=str(example["id"]),
        picture=_checked(example.get("picture")),
        label=str(example["label"]),
        score=scale.signed(example["score"]),
        width=_width(example["score"], most),
    )


def _width(value: Any, most: float) -> float:
    """A bar in percent of the longest."""
    number = finite(value)
    return round(100 * abs(number) / most, 1) if number is not None and most else 0.0


def _suspects(
    rows: Sequence[Mapping[str, Any]], scales: Mapping[str, Scale]
) -> tuple[Suspect, ...]:
    values = [finite(row["self_influence"]) for row in rows]
    most = max((abs(value) for value in values if value is not None), default=0.0)
    return tuple(
        Suspect(
            rank=rank,
            id=str(row["id"]),
            picture=_checked(row.get("picture")),
            given=_text(row.get("given")),
            predicted=_text(row.get("predicted")),
            flipped=row.get("flipped"),
            issue=row.get("issue"),
            numbers=tuple(_number(row.get(name), scale) for name, scale in scales.items()),
            width=_width(row["self_influence"], most),
        )
        for rank, row in enumerate(rows, 1)
    )


def _number(value: Any, scale: Scale) -> Number:
    number = finite(value)
    return Number(scale.plain(value), "" if number is None else repr(number))


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def audit_heading(suspects: Mapping[str, Any]) -> str:
    """What an audit lists: no label is called suspicious where the model says all as they are.

    Example:
        >>> audit_heading({"differing": {"count": 0, "of": 9}}), audit_heading({})
        ('Most influential on themselves', 'Suspicious labels')
    """
    counts = suspects.get("differing")
    none = counts is not None and not counts["count"]
    return "Most influential on themselves" if none else "Suspicious labels"


def differing(suspects: Mapping[str, Any]) -> str:
    """How many labels are not what the model says; nothing where it says none.

    Example:
        >>> differing({"differing": {"count": 1, "of": 1200}})
        '1 of 1,200 labels differs from what the model says.'
    """
    counts = suspects.get("differing")
    if not counts:
        return ""
    verb = "differs" if counts["count"] == 1 else "differ"
    return f"{counts['count']:,} of {counts['of']:,} labels {verb} from what the model says."


def _found(found: Mapping[str, Any] | None) -> str:
    if not found:
        return ""
    share = found["found"] / found["total"] if found["total"] else 0.0
    return (
        f"{found['found']:,} of the {found['total']:,} labels known to be wrong are among the "
        f"first {found['checked']:,} checked ({percent(share)})."
    )


def _settings(model: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """How the scores were made, as labels and values."""
    residual = model.get("worst_residual")
    return (
        ("Method", str(model["method"])),
        ("Measure", f"{_measure(model)}, in {model['unit']}"),
        ("Removal", str(model["removal"])),
        ("Damping added", figure(model["damping"])),
        (
            "Largest residual",
            f"{figure(residual, 2)}, relative" if residual is not None else "no solve",
        ),
        ("Parameters covered", percent(model["coverage"])),
    )


def _checked(picture: Any) -> str | None:
    """A picture's URI, if nothing has to be fetched to show it."""
    if not picture:
        return None
    if not str(picture).startswith("data:image/"):
        raise InputError(
            f"A picture must be a data URI, so that the page needs no other file; got "
            f"{str(picture)[:40]!r}. Make it with upweight.report.picture(array)."
        )
    return str(picture)
