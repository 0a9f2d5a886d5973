"""Fitted factors: stored, loaded, merged, and exact where blocks are small."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import upweight as uw
from tests.cases import Tokens
from upweight import errors
from upweight.curvature import EKFAC, KFAC, Axes, Columns, GaussNewton, Gradient, merged
from upweight.factors import load_factors, save_factors
from upweight.linalg import Spectral
from upweight.methods import Method
from upweight.risk import Risk


def objective(l2=0.01):
    torch.manual_seed(0)
    return uw.Objective(Tokens().double(), "cross_entropy", l2=l2)


def examples(n=18, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(7, (n, 5), generator=generator)
    return uw.Data.of((tokens, torch.randint(2, (n,), generator=generator)))


def split(data, *sizes):
    places = torch.arange(len(data)).split(list(sizes))
    return [data.take(part) for part in places]


FITS = {
    "ekfac": EKFAC(slopes=Columns()),
    "kfac": KFAC(slopes=Columns()),
    "eshampoo": EKFAC(Gradient, slopes=Columns()),
    "diagonal": EKFAC(Axes, slopes=Columns()),
    "exact blocks": EKFAC(slopes=Columns(), exact=1000),
}


def close(found, wanted, tolerance=1e-10):
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


# Files.


@pytest.mark.parametrize("name", FITS)
def test_factors_come_back_as_they_were(name, tmp_path):
    fitted = FITS[name](Risk(objective(), examples()))
    save_factors(fitted, tmp_path / "f", "here")
    found = load_factors(tmp_path / "f", "here")
    for part, other in zip(found.blocks, fitted.blocks, strict=True):
        assert (part.block, part.flat) == (other.block, other.flat)
        for side in ("left", "right", "values"):
            ours, theirs = getattr(part, side), getattr(other, side)
            assert ours is theirs is None or torch.equal(ours, theirs)
    assert found.notes == fitted.notes
    assert found.mass == fitted.mass == 18
    assert sorted(p.name for p in (tmp_path / "f").iterdir()) == [
        "factors.safetensors",
        "manifest.json",
    ]


def test_factors_of_something_else_or_damaged_are_refused(tmp_path):
    fitted = FITS["ekfac"](Risk(objective(), examples()))
    save_factors(fitted, tmp_path / "f", "here")
    with pytest.raises(errors.StoreError, match="another run"):
        load_factors(tmp_path / "f", "there")
    with pytest.raises(errors.StoreError, match="another run"):
        save_factors(fitted, tmp_path / "f", "there")
    with pytest.raises(errors.StoreError, match="not a run"):
        load_factors(tmp_path / "g", "here")
    file = tmp_path / "f" / "factors.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(errors.StoreError, match="damaged"):
        load_factors(tmp_path / "f", "here")


def influence(damping=0.0, l2=0.01, data=None):
    return uw.Influence(objective(l2), data or examples(), method="ekfac", damping=damping)


def test_kept_factors_and_gradients_are_taken_by_the_next_process(tmp_path, monkeypatch):
    queries = examples(3, seed=1)
    wanted = influence().explain(queries).values
    places = {"factors": tmp_path / "f", "gradients": tmp_path / "g"}
    first = influence().keep(**places)
    np.testing.assert_array_equal(first.explain(queries).values, wanted)
    again = influence().keep(**places)
    again.risk  # noqa: B018 - checks the data, and then no example is looked at again
    monkeypatch.setattr(EKFAC, "__call__", None)
    monkeypatch.setattr(
        "upweight.gradients.training.per_example", lambda *a: pytest.fail("a pass was made")
    )
    np.testing.assert_array_equal(again.explain(queries).values, wanted)
    monkeypatch.undo()
    other = influence(damping=0.3).keep(**places)
    np.testing.assert_allclose(
        other.explain(queries).values, influence(damping=0.3).explain(queries).values, rtol=1e-12
    )


@pytest.mark.parametrize("change", ["l2", "data", "model"])
def test_stale_factors_are_refused(tmp_path, change):
    influence().keep(factors=tmp_path / "f").explain(examples(2, seed=1))
    inf = influence(l2=0.5 if change == "l2" else 0.01, data=examples(seed=3 * (change == "data")))
    if change == "model":
        model = Tokens().double()
        inf = uw.Influence(
            uw.Objective(model, "cross_entropy", l2=0.01), examples(), method="ekfac"
        )
    with pytest.raises(errors.StoreError, match="another run"):
        inf.keep(factors=tmp_path / "f").explain(examples(2, seed=1))


def test_a_place_that_cannot_be_taken_is_refused_before_the_fit(tmp_path, monkeypatch):
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "thesis.txt").write_text("mine")
    (tmp_path / "file").touch()
    monkeypatch.setattr(EKFAC, "__call__", lambda *a: pytest.fail("a fit was made"))
    for place, said in (("f", "not empty"), ("file", "is a file"), ("file/f", "Cannot write")):
        with pytest.raises(errors.StoreError, match=said):
            influence().keep(factors=tmp_path / place).explain(examples(2, seed=1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f", "file"]


def test_keeping_is_said_before_the_first_question(tmp_path):
    inf = influence()
    inf.explain(examples(2, seed=1))
    with pytest.raises(errors.InputError, match="before the first question"):
        inf.keep(factors=tmp_path / "f")
    dense = uw.Influence(objective(), examples(), method="ggn").keep(factors=tmp_path / "f")
    with pytest.raises(errors.InputError, match="no Kronecker-factored"):
        dense.explain(examples(2, seed=1))


# Merging.


@pytest.mark.parametrize("name", FITS)
def test_parts_in_one_basis_merge_to_the_fit_of_all(name):
    whole = examples()
    parts = split(whole, 4, 9, 5)
    if name == "kfac":
        pytest.skip("K-FAC has no Λ of its own to fit in a given basis")
    fit = FITS[name]
    first = merged([fit(Risk(objective(), part)) for part in parts])
    settings = {"slopes": Columns(), "exact": fit.exact, "basis": first}
    exact = merged([EKFAC(fit.moments, **settings)(Risk(objective(), part)) for part in parts])
    close(exact.to_dense(), fit(Risk(objective(), whole)).to_dense())
    assert exact.notes == ()
    assert exact.mass == 18


@pytest.mark.parametrize("name", ["ekfac", "eshampoo", "exact blocks"])
def test_merged_moments_are_those_of_all_and_the_diagonal_is_that_of_the_mean(name):
    whole, fit = examples(), FITS[name]
    fits = [fit(Risk(objective(), part)) for part in split(whole, 6, 12)]
    found = merged(fits)
    mean = (6 * fits[0].to_dense() + 12 * fits[1].to_dense()) / 18
    wanted = fit(Risk(objective(), whole))
    for part, other in zip(found.blocks, wanted.blocks, strict=True):
        for side in ("left", "right"):
            spectrum = getattr(part.spectra, side)
            close(spectrum, getattr(other.spectra, side))
            ours, theirs = getattr(part, side), getattr(other, side)
            if ours is not None:
                close(
                    (ours * spectrum[:, None]) @ ours.mT, (theirs * spectrum[:, None]) @ theirs.mT
                )
    inside = [part.turn(part.block.read(mean)) for part in found.blocks]
    for part, rows in zip(found.blocks, inside, strict=True):
        basis = part.turn(part.block.read(torch.eye(found.size, dtype=torch.float64)))
        diagonal = torch.einsum("pgoi,pgoi->goi", basis, rows)
        close(part.values, diagonal)
    assert "merged from 2 fits" in found.notes[-1]


def test_what_cannot_be_merged():
    risk = Risk(objective(), examples())
    with pytest.raises(errors.InputError, match="nothing to merge"):
        merged([])
    with pytest.raises(errors.InputError, match="different parameters"):
        merged([FITS["ekfac"](risk), FITS["exact blocks"](risk)])
    other = uw.Objective(nn.Linear(3, 2).double(), "cross_entropy")
    data = uw.Data.of((torch.eye(3).double(), torch.tensor([0, 1, 0])))
    with pytest.raises(errors.InputError, match="other parameters"):
        EKFAC(basis=FITS["ekfac"](risk))(Risk(other, data))


def test_merged_files_of_parts(tmp_path):
    parts = split(examples(), 9, 9)
    for number, part in enumerate(parts):
        save_factors(FITS["ekfac"](Risk(objective(), part)), tmp_path / f"{number}", f"{number}")
    loaded = [load_factors(tmp_path / f"{number}") for number in range(2)]
    direct = merged([FITS["ekfac"](Risk(objective(), part)) for part in parts])
    assert torch.equal(merged(loaded).to_dense(), direct.to_dense())
    assert json.loads((tmp_path / "0" / "manifest.json").read_text())["mass"] == 9


# Exact blocks.


def looped(asked, data):
    """Gradients of the losses one by one, by plain autograd."""
    found = []
    for place in range(len(data)):
        row = asked.space.row().requires_grad_()
        loss = asked.losses(asked.space.unflatten(row), asked.place(data.rows(place, place + 1)))
        found.append(torch.autograd.grad(loss.sum(), row)[0])
    return torch.stack(found)


def test_small_blocks_are_the_blocks_of_the_gauss_newton_matrix():
    risk = Risk(objective(), examples())
    found = FITS["exact blocks"](risk)
    dense = GaussNewton(risk).to_dense()
    for part in found.blocks:
        places = part.block.places().flatten()
        close(found.to_dense()[places][:, places], dense[places][:, places], 1e-9)


def test_exact_blocks_answer_everywhere_as_their_matrix():
    data, queries = examples(), examples(4, seed=1)
    fit = EKFAC(slopes=Columns(), exact=10)
    method = Method("some exact", "", curvature=fit, solver=Spectral(tolerance=0))
    inf = uw.Influence(objective(), data, method=method, damping=0.05)
    dense = (
        inf.method.fit(inf.risk).to_dense() + 0.05 * torch.eye(inf.objective.space.size).double()
    )
    rows, train = (looped(inf.objective, some) for some in (queries, data))
    l2 = inf.objective.l2 * inf.objective.space.row()
    wanted = rows @ torch.linalg.inv(dense) @ (train + l2).T / 18
    close(torch.from_numpy(inf.explain(queries).values), wanted)
    own = torch.einsum("np,pk,nk->n", train, torch.linalg.inv(dense), train + l2) / 18
    close(torch.from_numpy(inf.self_influence()), own)
    assert [part.flat for part in inf._made.curvature.blocks].count(True) >= 1
