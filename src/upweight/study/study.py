"""A study: explain, audit and prove one recipe, and keep the result as a page and a directory."""

import json
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, final

import numpy as np
import torch

from upweight import __version__
from upweight.answers import Validation
from upweight.data import Data
from upweight.errors import IndefiniteError, NotConvergedError
from upweight.evidence import Evidence, too_large_for_refits
from upweight.fingerprints import fingerprint
from upweight.front import Influence
from upweight.methods import Baseline, Method
from upweight.recipe import Recipe
from upweight.scores import Scores
from upweight.store import plain, publish, write_manifest
from upweight.study.minimum import off_minimum
from upweight.study.page import removals, retrained, versions, write_page
from upweight.study.wish import Wish
from upweight.tables import Table, atomic_write

__all__ = ["SHOWN_QUERIES", "Study", "summary"]

SHOWN_QUERIES, SHOWN_SUSPECTS = 12, 30
CHECKED_SHARE = 0.1


@final
class Study:
    """A recipe and everything that is asked of it, computed when first asked for and then kept.

    Args:
        recipe: model, data and loss.
        wish: method and amounts.
        name: of the model on the page.
        facts: more (label, value) pairs for the page.
        flipped: ids of training examples whose labels are known to be wrong, if any are known.

    Attributes:
        evidence: what a budget of retraining found, if one was spent; set by whoever spent it.

    Raises:
        InputError: of the kind that tells which part of the recipe is at fault.

    Example:
        >>> rows = (torch.randn(12, 3), torch.arange(12) % 2)
        >>> recipe = Recipe(torch.nn.Linear(3, 2), rows, rows, "cross_entropy", l2=0.1)
        >>> study = Study(recipe, Wish(removals=0))
        >>> study.scores.shape, study.notes[-1]
        ((12, 12), 'Not proved by removal: no removals were asked for.')
    """

    def __init__(
        self,
        recipe: Recipe,
        wish: Wish | None = None,
        *,
        name: str = "Your model",
        facts: Iterable[tuple[str, str]] = (),
        flipped: Iterable[Any] | None = None,
    ) -> None:
        self.recipe, self.wish, self.name = recipe, wish or Wish(), name
        self.influence: Influence = recipe.influence(self.wish.method, self.wish.damping)
        self.queries = Data.of(recipe.queries)
        self.removals = self.wish.count(len(self.influence.data))
        self.flipped = None if flipped is None else frozenset(flipped)
        self.evidence: Evidence | None = None
        self._facts = tuple(facts)
        # Labels and pictures are looked up once before the long work, where they can still be wrong
        # cheaply.
        for data in (self.influence.data, self.queries):
            recipe.look(data, 0)

    @cached_property
    def identity(self) -> str:
        """Hash of model, data, queries and settings: what a run directory belongs to."""
        of = (self.influence.identity, self.queries.fingerprint())
        settings = (self.wish.top, self.removals, self.wish.seed)
        return fingerprint((*of, *settings))

    @cached_property
    def scores(self) -> Scores:
        """Scores of every training example for every query.

        Raises:
            NumericalError: the method cannot answer; its message says what to change.
        """
        return self.influence.explain(self.queries)

    @cached_property
    def audit(self) -> Table | None:
        """Suspicious labels, worst first; None where the method has no self-influence."""
        return self.influence.audit() if self.audited else None

    @property
    def audited(self) -> bool:
        """Whether there is an audit: a baseline or an ablation has none."""
        method = self.influence.method
        return isinstance(method, Method) and method.rescale is None

    @property
    def refits(self) -> int:
        """How often the model is fitted again without an example."""
        return 0 if self._unproved else 2 * self.removals

    @property
    def _baseline(self) -> bool:
        """Whether the scores are a baseline's: no unit of the measure, no sign."""
        return isinstance(self.influence.method, Baseline)

    @property
    def proof(self) -> Validation | None:
        """Predicted against really refitted; None where the notes say why."""
        return self._proved if isinstance(self._proved, Validation) else None

    @property
    def notes(self) -> list[str]:
        """What a reader must know of the model, and why a part is missing."""
        off, found = None if self._baseline else off_minimum(self.slope), []
        if off is not None:
            found.append(f"The model: {off}")
        if not self.audited:
            name = self.influence.method.name
            found.append(f"No suspicious labels: {name!r} has no self-influence.")
        if not (self.proof or self.evidence):
            found.append(f"Not proved by removal: {self._proved}")
        return found

    @property
    def _unproved(self) -> str | None:
        """Why nothing is removed, as far as that is known before."""
        if self._baseline:
            return "a baseline predicts no change."
        if not self.removals:
            few = self.wish.removals is None
            return "too few training examples." if few else "no removals were asked for."
        remedy = "Train again instead: 'upweight validate RECIPE.py'."
        return too_large_for_refits(self.influence.objective.space.size, remedy)

    @cached_property
    def _proved(self) -> Validation | str:
        """The proof, or the reason why there is none."""
        if self._unproved is not None:
            return self._unproved
        shown = self.queries
        if len(shown) > SHOWN_QUERIES:
            shown = shown.take(torch.arange(SHOWN_QUERIES, device="cpu"))
        # Where all queries are shown, their scores are there already.
        scores = self.scores if shown is self.queries else self.influence.explain(shown)
        try:
            return self.influence.validate(
                shown,
                top=self.removals,
                random=self.removals,
                seed=self.wish.seed,
                scores=scores,
            )
        except (NotConvergedError, IndefiniteError) as error:
            return str(error)

    @cached_property
    def slope(self) -> float:
        """‖∇R‖ at the model's parameters: 0 at a minimum."""
        return float(self.influence.risk.gradient().norm())

    @property
    def facts(self) -> list[tuple[str, str]]:
        """(label, value) pairs about model and data."""
        objective, asked = self.influence.objective, len(self.queries)
        shares = sorted(set(objective.l2.tolist()))
        more = f" (the first {SHOWN_QUERIES} shown)" if asked > SHOWN_QUERIES else ""
        return [
            *self._facts,
            ("Training examples", f"{len(self.influence.data):,}"),
            ("Queries", f"{asked:,}{more}"),
            ("Parameters", f"{objective.space.size:,}"),
            ("Loss", objective.loss.name.replace("_", " ")),
            ("L2", ", ".join(f"{value:g}" for value in shares[:4])),
            ("Gradient norm of the objective", f"{self.slope:.1e}"),
        ]

    def found(self, column: str = "self_influence") -> dict[str, int] | None:
        """How many known wrong labels are in the first tenth of the audit, sorted by a column.

        None where none are known, or the method has no audit.
        """
        if self.flipped is None or self.audit is None:
            return None
        order = np.argsort(-self.audit[column], kind="stable")
        checked = max(1, round(CHECKED_SHARE * len(order)))
        first = self.audit["id"][order[:checked]].tolist()
        hits = sum(key in self.flipped for key in first)
        return {"checked": checked, "found": hits, "total": len(self.flipped)}

    def summary(self) -> dict[str, Any]:
        """The model's part of the report's summary: plain values, None for what is not finite."""
        says = self.scores.summary()
        kept = ("sentence", "method", "damping", "worst_residual", "coverage", "removal")
        part: dict[str, Any] = plain(
            {
                "name": self.name,
                "facts": self.facts,
                **{key: says[key] for key in kept},
                "caveats": [*says["caveats"], *self.notes],
                "unit": self.scores.meaning.unit,
                "per": self.scores.meaning.per,
                "measure": self.scores.meaning.measure,
                "helpful": self.scores.meaning.helpful,
                "change": self.scores.meaning.change,
                "queries": list(self._query_views()),
                "suspects": self._suspects(),
                "evidence": None if self.proof is None else removals(self.proof),
                "retrained": None if self.evidence is None else retrained(self.evidence),
            }
        )
        return part

    def _query_views(self) -> Iterator[dict[str, Any]]:
        objective = self.influence.objective
        measure = objective.measured(objective.measure)
        for place in range(min(len(self.queries), SHOWN_QUERIES)):
            batch = objective.place(self.queries.at(torch.tensor([place])))
            with torch.no_grad():
                value = measure(objective.space.values(), batch).item()
                outputs = objective.outputs(objective.space.values(), batch)
                predicted = objective.loss.predict(outputs)
            looks = self.recipe.look(self.queries, place)
            titles = [f"labelled {looks['label']}"] if looks["label"] else []
            if predicted is not None:
                titles.append(f"predicted {self.recipe.name(predicted)}")
            yield {
                "id": looks["id"],
                "picture": looks["picture"],
                "title": ", ".join(titles) or f"query {looks['id']}",
                "measure": None if self._baseline else value,
                "helpful": self._beside(place, helpful=True),
                "harmful": self._beside(place, helpful=False),
            }

    def _beside(self, place: int, *, helpful: bool) -> list[dict[str, Any]]:
        """The training examples with the largest effect of one sign on a query.

        A baseline has no sign: its nearest and its farthest examples.
        """
        scores, query = self.scores, self.queries.ids[place].item()
        table = (scores.top if helpful else scores.bottom)(query, self.wish.top)
        signed = table[scores.meaning.column] * (scores.meaning.helpful or 1)
        train = self.influence.data
        positions = train.positions(table["train"]).tolist()
        return [
            {**self.recipe.look(train, position), "score": float(score)}
            for position, score, size in zip(
                positions, table[scores.meaning.column], signed, strict=True
            )
            if self._baseline or ((size > 0) == helpful and size)
        ]

    def _suspects(self) -> dict[str, Any] | None:
        if self.audit is None:
            return None
        rows, train = [], self.influence.data
        issues = self.audit["is_label_issue"] if "is_label_issue" in self.audit.columns else None
        for row in self.audit.head(SHOWN_SUSPECTS).records():
            looks = self.recipe.look(train, int(train.positions([row["id"]])))
            rows.append(
                {
                    "id": row["id"],
                    "picture": looks["picture"],
                    "given": looks["label"] or None,
                    "predicted": self.recipe.name(row.get("predicted_label")) or None,
                    "self_influence": row["self_influence"],
                    "loss": row["loss"],
                    "margin": row.get("margin"),
                    "issue": row.get("is_label_issue"),
                    "flipped": None if self.flipped is None else row["id"] in self.flipped,
                }
            )
        unit = self.influence.objective.loss.unit
        differing = None if issues is None else {"count": int(issues.sum()), "of": len(issues)}
        return {
            "caption": self.audit.caption,
            "rows": rows,
            "found": self.found(),
            "unit": unit,
            "differing": differing,
        }

    def write_into(self, directory: Path) -> None:
        """Write arrays, tables and ``manifest.json`` into a directory that exists."""
        says = self.scores.summary()
        self.scores.write_into(directory)
        self._top().to_csv(directory / "top.csv")
        if self.audit is not None:
            self.audit.to_csv(directory / "audit.csv")
        if self.proof is not None:
            self.proof.table().to_csv(directory / "validation.csv")
            evidence = {name: found.as_dict() for name, found in self.proof.agreements.items()}
            content = {"truth": self.proof.truth, "agreements": plain(evidence)}
            text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
            atomic_write(directory / "validation.json", text.encode())
        if self.evidence is not None:
            self.evidence.table().to_csv(directory / "evidence.csv")
            self.evidence.save(directory / "evidence.json")
        manifest = {
            "kind": "study",
            **says,
            "scores_identity": says["identity"],
            "identity": self.identity,
            "name": self.name,
            "facts": self.facts,
            "notes": self.notes,
            "settings": {"top": self.wish.top, "removals": self.removals, "seed": self.wish.seed},
            "versions": versions(),
        }
        write_manifest(directory, plain(manifest))

    def _top(self) -> Table:
        """The most helpful and most harmful examples of every query, in long form."""
        scores, k = self.scores, self.wish.top
        pieces = [
            (query, table)
            for query in scores.query_ids.tolist()
            for table in (scores.top(query, k), scores.bottom(query, k))
        ]
        columns = {"query": np.repeat([q for q, _ in pieces], [len(t) for _, t in pieces])}
        for name in pieces[0][1].columns:
            columns[name] = np.concatenate([table[name] for _, table in pieces])
        return Table(columns, scores.meaning.sentence())

    def save(self, path: str | PathLike[str], *, replace: bool = False) -> Path:
        """Compute what is missing and write the run directory with its page: complete or absent.

        Raises:
            StoreError: the place belongs to another run or cannot be written; nothing is
                computed then.
            NumericalError: the method cannot answer.
        """
        with publish(path, self.identity, replace=replace) as part:
            self.write_into(part)
            write_page(part, summary(self.recipe.title, [self], self.identity))
        return Path(path)


def summary(title: str, studies: Iterable[Study], identity: str) -> dict[str, Any]:
    """The report's summary of one or several studies, as ``upweight.report.render`` takes it."""
    return {
        "title": title,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": __version__,
        "identity": identity,
        "models": [study.summary() for study in studies],
    }
