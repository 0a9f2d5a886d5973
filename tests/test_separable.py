"""The inverse of a Kronecker-factored curvature, and the expansion that queries are turned by."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from upweight.errors import IndefiniteError, InputError
from upweight.linalg import (
    Block,
    BlockGradients,
    BlockRows,
    Dense,
    DenseGradients,
    Eigenblock,
    KroneckerEigen,
    KroneckerInverse,
    Outer,
    Spectral,
)
from upweight.linalg.blocks import Pair
from upweight.linalg.separable import LARGEST_RANK, separate

WIDE = Block("wide", 1, 14, 17, weight=0, bias=224)
STORED = Block("stored", 1, 12, 16, weight=238, transposed=True)
TOKENS = Block("tokens", 1, 15, 11, weight=430)
LONG = Block("long", 1, 5, 6, weight=595)
GROUPED = Block("grouped", 2, 3, 5, weight=625, bias=649)
UNUSED = Block("unused", 1, 1, 4, weight=655)
BLOCKS = [WIDE, STORED, TOKENS, LONG, GROUPED, UNUSED]
SIZE = 659
SHIFT = 0.03


def close(found, wanted, rtol=1e-10) -> None:
    assert found.shape == wanted.shape
    assert (found - wanted).norm() <= rtol * wanted.norm()


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def orthogonal(g, d):
    return torch.linalg.qr(normal(g, d, d))[0].contiguous()


def eigenblock(block) -> Eigenblock:
    """Eigenvalues over five decades, nearly a product of two sides."""
    g, o, i = block.shape
    sides = torch.logspace(0, -2.5, o).double()[:, None] * torch.logspace(0, -2.5, i).double()
    values = sides * torch.rand(g, o, i, dtype=torch.float64)
    left = None if block is TOKENS else orthogonal(g, o)
    return Eigenblock(block, left, orthogonal(g, i) if block is not UNUSED else None, values)


def operator(blocks=BLOCKS, size=SIZE) -> KroneckerEigen:
    torch.manual_seed(0)
    return KroneckerEigen([eigenblock(block) for block in blocks], size, ("a note",))


def outer(block, count, positions, *, ones=False) -> Outer:
    g, o, i = block.shape
    scale = torch.logspace(-3, 3, count).double()[:, None, None]  # queries of very different sizes
    return Outer(
        normal(g, count, positions, o) * scale, normal(g, count, positions, i - ones), ones
    )


def gradients(count=8, blocks=BLOCKS, seed=1) -> BlockGradients:
    torch.manual_seed(seed)
    term = {
        "wide": [outer(WIDE, count, 1, ones=True)],
        "stored": [outer(STORED, count, 1)],
        "tokens": [Outer(torch.randint(15, (count, 1)), normal(1, count, 1, 11))],
        "long": [outer(LONG, count, 3), outer(LONG, count, 1)],
        "grouped": [outer(GROUPED, count, 1, ones=True)],
        "unused": [],
    }
    like = torch.ones(1, dtype=torch.float64)
    return BlockGradients(blocks, [term[block.name] for block in blocks], count, like)


def inverse(tolerance=0.0, shift=SHIFT) -> KroneckerInverse:
    made = Spectral(tolerance).init(operator() + shift)
    assert isinstance(made, KroneckerInverse)
    return made


def shifted(shift=SHIFT):
    return operator().to_dense() + shift * torch.eye(SIZE, dtype=torch.float64)


# The inverse.


def test_every_parameter_has_its_place():
    places = torch.cat([block.places().flatten() for block in BLOCKS])
    assert torch.equal(places.sort().values, torch.arange(SIZE))
    dense = operator().to_dense()
    close(dense, dense.T)
    values = torch.cat([part.values.flatten() for part in operator().blocks])
    close(torch.linalg.eigvalsh(dense), values.sort().values)


def test_the_inverse_is_the_dense_one():
    made, dense, rows = inverse(), shifted(), normal(4, SIZE)
    eye = torch.eye(SIZE, dtype=torch.float64)
    close(made.to_dense() @ dense, eye)
    close(made.to_dense(), made.to_dense().T)
    solution = made.solve(rows)
    close(solution.value, torch.linalg.solve(dense, rows.T).T)
    close(made @ rows, solution.require())
    assert not solution.residual.any()
    assert made.notes == ("a note",)


def test_another_damping_is_another_fit():
    for shift in (0.001, 1.0):
        made, wanted = inverse().damped(shift), inverse(shift=shift)
        assert torch.equal(made.to_dense(), wanted.to_dense())
        assert (made.tolerance, made.shift) == (0.0, shift)
        close(made.to_dense(), torch.linalg.inv(shifted(shift)))


def test_quadratic_forms_are_dense_ones():
    made, dense, found = inverse(), torch.linalg.inv(shifted()), gradients()
    rows = found.dense()
    wanted = ((rows @ dense) * rows).sum(1)
    assert torch.allclose(made.quadratic(rows), wanted, rtol=1e-10)
    assert torch.allclose(made.self_products(found), wanted, rtol=1e-10)
    assert torch.allclose(made.self_products(DenseGradients(rows)), wanted, rtol=1e-10)


def test_without_tolerance_preconditioning_is_solving():
    made, found = inverse(), gradients()
    solution = made.precondition(found)
    assert isinstance(solution.value, BlockRows)
    assert all(isinstance(part, torch.Tensor) for part in solution.value.parts)
    wanted = torch.linalg.solve(shifted(), found.dense().T).T
    for row, other in zip(solution.value.dense(), wanted, strict=True):
        close(row, other)
    assert not solution.residual.any()
    close(made.precondition(DenseGradients(found.dense())).value, wanted)
    close(solution.value.dot(gradients(5, seed=2)), wanted @ gradients(5, seed=2).dense().T)


def test_products_do_not_depend_on_how_queries_are_stored():
    queries, found = normal(3, SIZE), gradients(5, seed=2)
    parts = [block.read(queries) for block in BLOCKS]
    by_row = [part.contiguous() for part in parts]
    by_column = [part.mT.contiguous().mT for part in parts]
    for kept in (by_row, by_column):
        rows = BlockRows(BLOCKS, kept, SIZE)
        close(rows.dense(), queries)
        close(rows.dot(found), queries @ found.dense().T)
    close(found.dot(queries), queries @ found.dense().T)


def test_preconditioned_matrices_keep_a_bias_apart():
    made, found = inverse(), gradients()
    for part in made.precondition(found).value.parts[:1]:
        weight = part[..., :-1].mT.flatten(1)
        assert weight.data_ptr() == part.data_ptr()  # a view: no batch copies the queries


@pytest.mark.parametrize("blocks", [BLOCKS, [WIDE]], ids=["mixed", "one layer"])
@pytest.mark.parametrize("tolerance", [0.3, 0.1, 0.03])
def test_the_residual_is_the_error_of_the_scores(tolerance, blocks):
    size = SIZE if blocks is BLOCKS else 238
    base, found = operator(blocks, size), gradients(blocks=blocks)
    solution = Spectral(tolerance).init(base + SHIFT).precondition(found)
    assert any(isinstance(part, Pair) for part in solution.value.parts)
    dense = base.to_dense()
    exact = torch.linalg.solve(dense + SHIFT * torch.eye(size).double(), found.dense().T).T
    gap = solution.value.dense() - exact

    def mean_square(rows):  # of scores over training gradients whose second moments are A
        return ((rows @ dense) * rows).sum(1)

    wanted = (mean_square(gap) / mean_square(exact)).sqrt()
    assert torch.allclose(solution.residual, wanted, rtol=1e-6)
    assert 0 < float(wanted.square().mean().sqrt()) <= tolerance
    assert set(solution.status) == {"converged"}


def test_the_residual_is_what_sampled_gradients_show():
    base, found = operator([WIDE], 238), gradients(blocks=[WIDE])
    solution = Spectral(0.2).init(base + SHIFT).precondition(found)
    root = torch.linalg.cholesky(base.to_dense())
    train = normal(20_000, 238) @ root.T
    exact = inverse_of(base) @ found.dense().T
    scores, approximate = train @ exact, train @ solution.value.dense().T
    shown = ((scores - approximate).square().mean(0) / scores.square().mean(0)).sqrt()
    assert torch.allclose(solution.residual, shown, rtol=0.05)


def inverse_of(base):
    return torch.linalg.inv(base.to_dense() + SHIFT * torch.eye(base.size).double())


def test_a_query_without_gradient_has_no_error():
    found = gradients(3, [WIDE])
    term = found.terms[0][0]
    left = term.left.clone()
    left[:, 1] = 0
    zero = BlockGradients([WIDE], [[Outer(left, term.right, ones=True)]], 3, found.like)
    for tolerance in (0.0, 0.1):
        solution = Spectral(tolerance).init(operator([WIDE], 238) + SHIFT).precondition(zero)
        assert torch.isfinite(solution.residual).all()
        assert float(solution.residual[1]) == 0
        assert not solution.value.dense()[1].any()


def test_other_operators_are_refused():
    with pytest.raises(InputError, match="Dense is not diagonal in a known basis"):
        Spectral().init(Dense(torch.eye(2)))
    with pytest.raises(InputError, match="Cholesky or CG"):
        Spectral().init(Dense(torch.eye(2)) + 0.1)


@pytest.mark.parametrize(
    ("values", "shift"),
    [([2.0, 0.0], 0.0), ([2.0, -0.5], 0.25), ([2.0, -0.5], 0.5), ([0.0, 0.0], 0.0)],
)
def test_eigenvalues_that_are_not_positive_are_refused(values, shift):
    block = Eigenblock(Block("w", 1, 1, 2, 0), None, None, torch.tensor([[values]]).double())
    with pytest.raises(IndefiniteError, match="damping"):
        Spectral().init(KroneckerEigen([block], 2) + shift)
    good = Spectral().init(KroneckerEigen([block], 2) + 1.0)
    assert isinstance(good, KroneckerInverse)
    with pytest.raises(IndefiniteError, match="damping"):
        good.damped(shift)
    close(good.to_dense(), torch.diag(1 / (torch.tensor(values).double() + 1)))


# The expansion.

shapes = st.tuples(st.integers(1, 12), st.integers(1, 12))


def problem(shape, seed):
    """1/(Λ + λ) and weights like those of queries."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(shape, generator=generator, dtype=torch.float64) ** 4
    weights = torch.rand(shape, generator=generator, dtype=torch.float64) ** 2
    return 1 / (values + 0.01), weights


def product(found, rank=None):
    return found.rows[:rank].T @ found.columns[:rank]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(shape=shapes, seed=st.integers(0, 99), share=st.sampled_from([0.5, 0.1, 1e-3]))
def test_the_least_rank_meets_the_allowed_error(shape, seed, share):
    matrix, weights = problem(shape, seed)
    allowed = share * float((weights * matrix).norm())
    found = separate(matrix, weights, allowed)
    assert found is not None
    rank = len(found.rows)
    assert 1 <= rank <= min(shape)
    assert found.rows.shape == (rank, shape[0])
    assert found.columns.shape == (rank, shape[1])
    gap = matrix - product(found)
    assert torch.allclose(gap, found.gap, atol=1e-9 * float(matrix.max()))
    error = float((weights * gap).norm())
    assert error == pytest.approx(found.error, abs=1e-9 * allowed / share)
    assert error <= allowed * (1 + 1e-9)
    if rank > 1:
        assert float((weights * (matrix - product(found, rank - 1))).norm()) > allowed


@settings(max_examples=40, deadline=None, derandomize=True)
@given(shape=shapes, seed=st.integers(0, 99))
def test_transposing_transposes(shape, seed):
    matrix, weights = problem(shape, seed)
    allowed = 0.05 * float((weights * matrix).norm())
    found, turned = separate(matrix, weights, allowed), separate(matrix.T, weights.T, allowed)
    assert found is not None
    assert turned is not None
    assert len(found.rows) == len(turned.rows)
    scale = float(matrix.max())
    assert torch.allclose(product(found), product(turned).T, atol=1e-7 * scale)
    assert torch.allclose(found.gap, turned.gap.T, atol=1e-7 * scale)
    assert found.error == pytest.approx(turned.error, rel=1e-6, abs=1e-9 * scale)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(shape=shapes, rank=st.integers(1, 3), seed=st.integers(0, 99))
def test_a_matrix_of_low_rank_is_exact(shape, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.rand(d, rank, generator=generator).double() + 0.1 for d in shape)
    matrix, weights = left @ right.T, problem(shape, seed)[1]
    found = separate(matrix, weights, 1e-9 * float((weights * matrix).norm()))
    assert found is not None
    assert len(found.rows) <= rank
    assert (weights * found.gap).norm() <= 1e-9 * (weights * matrix).norm()


def test_separable_weights_give_the_best_expansion():
    """Eckart and Young: no sum of as many products comes nearer in that norm."""
    torch.manual_seed(0)
    matrix = 1 / (torch.rand(9, 13).double() ** 4 + 0.01)
    row, column = torch.rand(9, 1).double() + 0.1, torch.rand(1, 13).double() + 0.1
    tails = torch.linalg.svdvals(row * matrix * column).square().flip(0).cumsum(0).flip(0).sqrt()
    for rank in range(1, 9):
        found = separate(matrix, row * column, float(tails[rank]) * 1.001)
        assert found is not None
        assert len(found.rows) == rank
        assert found.error == pytest.approx(float(tails[rank]), rel=1e-3)


def test_what_no_rank_reaches_is_none():
    many = LARGEST_RANK + 20
    eye, ones = torch.eye(many).double(), torch.ones(many, many).double()
    assert separate(eye, ones, 1.0) is None
    assert separate(eye[:, : many - 5], ones[:, : many - 5], 1.0) is None
    found = separate(eye, ones, 20**0.5 + 1e-9)
    assert found is not None
    assert len(found.rows) == LARGEST_RANK
    noise = problem((4, 5), 0)
    assert separate(*noise, 0.0) is None


def test_where_nothing_is_weighed_one_product_is_enough():
    found = separate(problem((4, 5), 0)[0], torch.zeros(4, 5).double(), 0.0)
    assert found is not None
    assert len(found.rows) == 1
    assert torch.isfinite(found.rows).all()
    assert torch.isfinite(found.columns).all()


def test_the_dtype_is_the_matrix_s():
    matrix, weights = problem((4, 5), 0)
    found = separate(matrix.float(), weights.float(), 0.1)
    assert found is not None
    assert {found.rows.dtype, found.columns.dtype, found.gap.dtype} == {torch.float32}


def test_expansions_of_unlike_rank_are_joined_as_they_are():
    torch.manual_seed(0)
    block = Block("w", 1, 4, 5, weight=0)
    pairs = [Pair(torch.randn(1, q, r, 4), torch.randn(1, q, r, 5)) for q, r in ((2, 3), (1, 2))]
    parts = [BlockRows([block], [pair], 20) for pair in pairs]
    wanted = torch.cat([part.dense() for part in parts])
    found = BlockRows.joined(list(parts))
    assert isinstance(found.parts[0], Pair)
    torch.testing.assert_close(found.dense(), wanted)
    formed = BlockRows([block], [pairs[0].dense()], 20)
    torch.testing.assert_close(BlockRows.joined([formed, parts[1]]).dense(), wanted)
