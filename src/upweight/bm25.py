"""BM25, the words that a query and a training example share: a baseline for token ids."""

import torch
from torch import Tensor

from upweight.data import Batch, Data
from upweight.errors import InputError
from upweight.neighbours import Likeness
from upweight.objective import Measure
from upweight.risk import Risk
from upweight.sources import leaves

__all__ = ["bm25"]

# As Robertson & Zaragoza (2009) advise where nothing is tuned.
K1, B = 1.2, 0.75
STEP = 4096


def bm25(risk: Risk, queries: Data, measure: Measure) -> Likeness:
    """Σ_t idf(t) f_ti / (f_ti + k₁ (1 − b + b |i| / mean length)), over the tokens t of a query.

    f_ti counts token t in example i, idf(t) = ln(1 + (N − n_t + ½) / (n_t + ½)) for the n_t of N
    examples that hold it, k₁ = 1.2 and b = 0.75; a token that is twice in the query counts twice.
    From Robertson & Zaragoza (2009), except that the 1 + in idf keeps tokens of more than half of
    the examples from counting against an example.

    Token ids are whole numbers ``[n, s]``: the input ``input_ids``, or the only input. Negative
    ids are padding (−100), and so are those that ``attention_mask`` marks 0; without such a mask,
    id 0 is padding too.

    Raises:
        InputError: the inputs are not token ids, or no query has a token.

    Example:
        >>> from upweight import Data, Objective
        >>> data = Data.of((torch.tensor([[3, 4], [5, 0]]), torch.tensor([0, 1])))
        >>> risk = Risk(Objective(torch.nn.EmbeddingBag(6, 2), "cross_entropy"), data)
        >>> bm25(risk, data, "loss")(data.rows()).round(decimals=2)
        tensor([[0.5500, 0.0000],
                [0.0000, 0.3600]], dtype=torch.float64)
    """
    del measure
    read = [_tokens(batch) for batch in queries.batches(STEP)]
    terms = torch.cat([ids[counted] for ids, counted in read]).unique()
    if not len(terms):
        raise InputError("No query has a token: all ids are padding (0 or negative), or masked.")
    asked = torch.cat([_counts(ids, counted, terms).to_dense() for ids, counted in read])
    data = risk.data
    holding, words = torch.zeros(len(terms), dtype=torch.float64, device="cpu"), 0
    for batch in data.batches(STEP):
        ids, counted = _tokens(batch)
        holding += torch.bincount(_counts(ids, counted, terms).indices()[1], minlength=len(terms))
        words += int(counted.sum())
    rarity = torch.log1p((len(data) - holding + 0.5) / (holding + 0.5))
    weights = (asked * rarity).T.contiguous()
    mean = words / len(data) or 1.0

    def likeness(batch: Batch) -> Tensor:
        ids, counted = _tokens(batch)
        counts = _counts(ids, counted, terms)
        places, often = counts.indices(), counts.values()
        length = 1 - B + B * counted.sum(1).double() / mean
        shares = often / (often + K1 * length[places[0]])
        found: Tensor = torch.sparse.mm(_sparse(places, shares, counts.shape), weights)
        return found.T

    return likeness


def _tokens(batch: Batch) -> tuple[Tensor, Tensor]:
    """Token ids ``[n, s]``, and which of them count."""
    inputs, mask = batch.inputs, None
    if isinstance(inputs, dict) and "input_ids" in inputs:
        found, mask = [inputs["input_ids"]], inputs.get("attention_mask")
    else:
        found = list(leaves(inputs))
    whole = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    if len(found) != 1 or found[0].dim() != 2 or found[0].dtype not in whole:
        forms = ", ".join(f"{leaf.dtype} {tuple(leaf.shape)}" for leaf in found)
        raise InputError(
            "The baseline 'bm25' counts token ids: one input of whole numbers [n, s], or one named "
            f"'input_ids'; got {forms}. Use method='embedding' or 'euclidean'."
        )
    ids = found[0].cpu().long()
    counted = ids > 0 if mask is None else (ids >= 0) & (mask.cpu() != 0)
    return ids, counted


def _counts(ids: Tensor, counted: Tensor, terms: Tensor) -> Tensor:
    """How often each term is in each row, sparse ``[n, terms]``."""
    column = torch.searchsorted(terms, ids).clamp_max(len(terms) - 1)
    row, place = (counted & (terms[column] == ids)).nonzero(as_tuple=True)
    ones = torch.ones(len(row), dtype=torch.float64, device="cpu")
    shape = torch.Size((len(ids), len(terms)))
    return _sparse(torch.stack([row, column[row, place]]), ones, shape).coalesce()


def _sparse(places: Tensor, values: Tensor, shape: torch.Size) -> Tensor:
    return torch.sparse_coo_tensor(places, values, shape, check_invariants=False)
