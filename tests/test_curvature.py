"""Every curvature is linear, symmetric and equal to its dense definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cases import CASES, LINEAR_CASES, as_reference
from upweight import reference
from upweight.curvature import (
    CURVATURES,
    EmpiricalFisher,
    Fisher,
    GaussNewton,
    Hessian,
    LinearCurvature,
    Sketch,
    curvature,
)
from upweight.data import Data
from upweight.errors import InputError, LossError
from upweight.objective import Objective
from upweight.risk import Risk

all_cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
linear_cases = pytest.mark.parametrize("case", LINEAR_CASES, ids=lambda case: case.name)


@pytest.fixture(autouse=True)
def _plain_attention():
    """The references differentiate twice, which default attention kernels cannot."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        yield


def close(found: torch.Tensor, wanted: torch.Tensor, rtol: float = 1e-8) -> None:
    assert found.shape == wanted.shape
    assert (found - wanted).norm() <= rtol * wanted.norm()


@all_cases
def test_hessian_is_the_dense_autograd_matrix(case):
    risk = case.risk()
    problem, theta = as_reference(risk)
    close(Hessian(risk).to_dense(), reference.hessian(problem, theta))


@all_cases
def test_gauss_newton_is_its_definition(case):
    risk = case.risk()
    problem, theta = as_reference(risk)
    objective = risk.objective
    batch, _ = risk.at(torch.arange(len(risk.data)))

    def outputs(row, i):
        return objective.outputs(objective.space.unflatten(row), batch.part(slice(i, i + 1)))

    def output_loss(z, i):
        return objective.loss(z, batch.part(slice(i, i + 1)).targets)[0]

    dense = reference.gauss_newton(problem, theta, outputs, output_loss)
    close(GaussNewton(risk).to_dense(), dense)


@all_cases
def test_empirical_fisher_is_its_definition(case):
    risk = case.risk()
    close(EmpiricalFisher(risk).to_dense(), reference.empirical_fisher(*as_reference(risk)))


@all_cases
def test_fisher_is_the_mean_over_labels_or_refused(case):
    risk = case.risk()
    if not case.fisher:
        with pytest.raises(LossError, match="probability"):
            Fisher(risk).to_dense()
        return
    if risk.objective.loss.name == "mean_squared_error":
        close(Fisher(risk).to_dense(), GaussNewton(risk).to_dense())
        return
    close(Fisher(risk).to_dense(), _enumerated_fisher(risk))


def _enumerated_fisher(risk):
    """Σ_i share_i E_y[g g'] with every labelling of an example's positions, by brute force."""
    objective = risk.objective
    total = torch.diag(objective.l2)
    theta = objective.space.row()
    for i in range(len(risk.data)):
        batch, share = risk.at(torch.tensor([i]))
        outputs = objective.outputs(objective.space.unflatten(theta), batch)
        flat, counted = _labellings(objective, outputs, batch.targets)
        for labels, probability in flat:
            targets = batch.targets.clone()
            targets[counted] = labels.to(targets.dtype)

            def loss(row, batch=batch, targets=targets):
                z = objective.outputs(objective.space.unflatten(row), batch)
                return objective.loss(z, targets)[0]

            g = reference.gradient(loss, theta)
            total = total + share[0] * probability * torch.outer(g, g)
    return total


def _labellings(objective, outputs, targets):
    binary = objective.loss.name == "binary_cross_entropy"
    counted = torch.ones_like(targets, dtype=torch.bool) if binary else targets != -100
    if binary:
        p1 = torch.sigmoid(outputs.reshape(targets.shape))[counted]
        log_p = torch.stack([(1 - p1).log(), p1.log()], 1)
    else:
        log_p = torch.log_softmax(outputs, -1).reshape(*targets.shape, -1)[counted]
    m, c = log_p.shape
    if m == 0:
        return [(torch.empty(0, dtype=torch.long), 1.0)], counted
    labels = torch.cartesian_prod(*[torch.arange(c)] * m).reshape(-1, m)
    probabilities = log_p.gather(1, labels.T).sum(0).exp()
    return list(zip(labels, probabilities, strict=True)), counted


@linear_cases
@pytest.mark.parametrize("name", ["hessian", "ggn"])
def test_closed_form_equals_autograd(case, name):
    risk = case.risk()
    closed = curvature(name, risk)
    assert isinstance(closed, LinearCurvature)
    dense = Hessian(risk).to_dense()
    close(closed.to_dense(), dense)
    close(closed.apply(torch.eye(closed.size, dtype=torch.float64)), dense)


@all_cases
@pytest.mark.parametrize("name", list(CURVATURES))
def test_operators_are_linear_and_symmetric(case, name):
    if name == "fisher" and not case.fisher:
        pytest.skip("the loss has no likelihood")
    operator = curvature(name, case.risk())
    a, b = torch.randn(2, operator.size, dtype=torch.float64)
    assert torch.allclose(operator @ (2 * a - b), 2 * (operator @ a) - (operator @ b), atol=1e-10)
    assert torch.allclose(a @ (operator @ b), b @ (operator @ a), atol=1e-10)
    assert torch.allclose((operator + 0.5) @ a, (operator @ a) + 0.5 * a)
    assert torch.allclose((operator + 0.5).to_dense() @ a, (operator + 0.5) @ a, atol=1e-10)


@all_cases
@pytest.mark.parametrize("name", ["hessian", "ggn"])
def test_samples_of_every_row_average_to_the_whole(case, name):
    operator = curvature(name, case.risk())
    rows = torch.randn(2, operator.size, dtype=torch.float64)
    positions = torch.arange(operator.count)[:, None]
    sampled = operator.apply_sampled(rows.expand(operator.count, 2, -1), positions)
    close(sampled.mean(0), operator.apply(rows))


@linear_cases
def test_restricting_to_all_rows_changes_nothing(case):
    operator = curvature("hessian", case.risk())
    close(operator.restrict(torch.arange(operator.count)).to_dense(), operator.to_dense())


@pytest.mark.parametrize("name", ["hessian", "ggn", "empirical_fisher"])
@settings(max_examples=15, deadline=None)
@given(size=st.integers(1, 9), rows=st.integers(1, 5))
def test_batch_size_changes_nothing(name, size, rows):
    case = CASES[-len(CASES) + 13]
    whole = case.risk()
    split = Risk(whole.objective, Data(whole.data.source, whole.data.ids, batch_size=size))
    vectors = torch.randn(rows, whole.objective.space.size, dtype=torch.float64)
    close(curvature(name, split).apply(vectors), curvature(name, whole).apply(vectors), 1e-12)


def test_a_part_of_the_parameters_has_the_block_of_the_matrix():
    case = next(case for case in CASES if case.name == "mlp")
    whole, part = case.risk(), case.risk(parameters=["2.*"])
    block = Hessian(whole).to_dense()[15:, 15:]
    close(Hessian(part).to_dense(), block)
    assert isinstance(curvature("hessian", part), LinearCurvature)
    close(curvature("hessian", part).to_dense(), block)


@linear_cases
def test_the_sketch_of_everything_is_nearly_the_inverse(case):
    """With every feature leading and many draws, only the draws stand between sketch and A."""
    operator = curvature("hessian", case.risk()) + 0.1
    made = Sketch(size=200_000, rows=1)(operator, 1)
    vectors = torch.randn(3, operator.size, dtype=torch.float64)
    close(made.apply(operator.apply(vectors)), vectors, 0.1)
    close(made.to_dense(), made.to_dense().T, 1e-9)
    assert torch.linalg.eigvalsh(made.to_dense()).min() > 0


@linear_cases
def test_samples_estimate_the_curvature(case):
    operator = curvature("hessian", case.risk())
    x, bend = operator.sampled(200_000, 0)
    c, d = bend.shape[1], x.shape[1]
    blocks = torch.einsum("nkl,ni,nj->kilj", bend, x, x) / len(x)
    dense = operator._arranged(blocks.double().contiguous())
    dense.diagonal().add_(operator.risk.objective.l2)
    assert dense.shape == (c * d, c * d)
    close(dense, operator.to_dense(), 0.03)


def test_the_sketch_is_left_out_where_it_would_not_pay():
    operator = curvature("hessian", LINEAR_CASES[0].risk())
    assert Sketch(rows=8)(operator, 7) is None
    assert Sketch()(Hessian(LINEAR_CASES[0].risk()), 100) is None
    assert Sketch()(curvature("hessian", LINEAR_CASES[0].risk(l2=0.0)), 100) is None


def test_an_unknown_curvature_names_the_known_ones():
    with pytest.raises(InputError, match="hessian, ggn"):
        curvature("hesian", LINEAR_CASES[0].risk())


def test_bfloat16_curvature_is_near_the_float64_one():
    risk = LINEAR_CASES[0].risk()
    objective = Objective(risk.objective.model.bfloat16(), "cross_entropy", l2=0.03)
    low = curvature("hessian", Risk(objective, risk.data)).to_dense()
    close(low.double(), curvature("hessian", LINEAR_CASES[0].risk()).to_dense(), 5e-2)
