"""Linear maps: ``x Wᵀ + b``, and ``x W + b`` where the weight is stored the other way round."""

import torch
import torch.nn.functional as F
from torch import Tensor

from upweight.gradients.watch import Given, Use, Watch, rule
from upweight.linalg import Outer

__all__ = ["addmm", "bias_use", "linear", "matmul"]


def bias_use(watch: Watch, name: str | None, size: int) -> Use | None:
    """The use of a bias: the gradient in the output ``[n, ..., size]``, summed over positions."""
    if name is None:
        return None
    count = watch.count

    def factors(slope: Tensor) -> Outer:
        total = slope.reshape(count, -1, size).sum(1)
        return Outer(total.new_ones(1, 1, 1, 1).expand(1, len(total), 1, 1), total[None, :, None])

    return Use(name, (1, 1, size), factors)


def _weight_use(
    watch: Watch, weight: Tensor, x: Tensor, *, transposed: bool, bias: str | None
) -> Use | None:
    source, count = watch.source(weight), watch.count
    if source is None or source.turned is None:
        return None
    i, o = weight.shape if transposed else weight.shape[::-1]
    # Reading the input is put off until the gradient comes: a trial run needs no rows.
    right = watch.rows(x) if watch.axes is not None else None

    def factors(slope: Tensor) -> Outer:
        assert right is not None
        return Outer(slope.reshape(1, count, -1, o), right[None])

    return Use(source.name, (1, o, i), factors, bias, transposed != source.turned)


@rule(F.linear, takes={"input": None, "weight": None, "bias": None})
def linear(watch: Watch, given: Given) -> Tensor:
    """Σ_s g_s ⊗ x_s; the bias is the column of a constant 1."""
    out: Tensor = given.run()
    if given.weight.dim() != 2:
        return out
    known = watch.name(given.bias)
    use = _weight_use(watch, given.weight, given.input, transposed=False, bias=known)
    return watch.keep(out, (use, bias_use(watch, known, len(given.weight))))


@rule(
    *(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm),
    takes={"input": None, "mat2": None},
)
def matmul(watch: Watch, given: Given) -> Tensor:
    """``x W`` with a weight ``[i, o]``."""
    out: Tensor = given.run()
    if watch.source(given.mat2) is None or given.mat2.dim() != 2 or given.input.dim() < 2:
        return out
    use = _weight_use(watch, given.mat2, given.input, transposed=True, bias=None)
    return watch.keep(out, (use,))


@rule(torch.addmm, Tensor.addmm, takes={"input": None, "mat1": None, "mat2": None})
def addmm(watch: Watch, given: Given) -> Tensor:
    """``b + x W`` with a weight ``[i, o]``, as in the Conv1D of Hugging Face's GPT-2."""
    out: Tensor = given.run()
    known = watch.name(given.input) if given.input.dim() == 1 else None
    use = _weight_use(watch, given.mat2, given.mat1, transposed=True, bias=known)
    return watch.keep(out, (use, bias_use(watch, known, out.shape[-1])))
