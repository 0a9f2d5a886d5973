"""Gradients kept on disk, and methods that look at a part of the parameters."""

import gc
import weakref

import numpy as np
import pytest
import torch
from torch import nn

import upweight as uw
from tests.cases import Tokens
from upweight import errors
from upweight.gradients import TrainingGradients, last_layer, observe, per_example
from upweight.keepers import DirectoryKeeper
from upweight.linalg import DenseGradients
from upweight.risk import Risk


def influence(n=12, batch_size=5, **settings):
    torch.manual_seed(0)
    model = Tokens().double()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(7, (n, 5), generator=generator)
    labels = torch.randint(2, (n,), generator=generator)
    data = uw.Data.of((tokens, labels), batch_size=batch_size)
    settings = {"loss": "cross_entropy", "l2": 0.01, "method": "ekfac", **settings}
    return uw.Influence(model, data, **settings), (tokens[:3], labels[:3])


def kept(inf, place):
    first, _ = inf.risk.rows(0, 2)
    return DirectoryKeeper(place, "here", per_example(inf.objective, first))


def test_gradients_come_back_from_disk_as_they_were(tmp_path):
    inf, _ = influence()
    made = TrainingGradients(inf.risk, kept(inf, tmp_path / "g"))
    first = torch.cat(list(made.each(lambda seen: seen.gradients.dense(), "")))
    wanted = per_example(inf.objective, inf.risk.rows(0, 12)[0]).dense()
    torch.testing.assert_close(first, wanted, rtol=1e-12, atol=1e-14)
    again = TrainingGradients(inf.risk, kept(inf, tmp_path / "g"))
    second = torch.cat(list(again.each(lambda seen: seen.gradients.dense(), "")))
    assert torch.equal(first, second)
    names = sorted(path.name for path in (tmp_path / "g").iterdir())
    assert names[-1] == "manifest.json"
    assert len(names) == 4


def test_a_second_pass_looks_at_no_example(tmp_path, monkeypatch):
    inf, _ = influence()
    list(TrainingGradients(inf.risk, kept(inf, tmp_path / "g")).each(lambda seen: 0, ""))
    again = TrainingGradients(inf.risk, kept(inf, tmp_path / "g"))
    monkeypatch.setattr(Risk, "rows", None)
    assert list(again.each(lambda seen: seen.start, "")) == [0, 5, 10]


def test_a_directory_of_other_gradients_is_refused(tmp_path):
    inf, _ = influence()
    like = per_example(inf.objective, inf.risk.rows(0, 2)[0])
    DirectoryKeeper(tmp_path / "g", "here", like)
    with pytest.raises(errors.StoreError, match="another run"):
        DirectoryKeeper(tmp_path / "g", "there", like)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("mine")
    with pytest.raises(errors.StoreError, match="not a run"):
        DirectoryKeeper(tmp_path / "other", "here", like)
    with pytest.raises(errors.InputError, match="Only factored gradients"):
        DirectoryKeeper(tmp_path / "h", "here", DenseGradients(torch.eye(2)))


def test_a_damaged_file_is_named_and_a_killed_write_leaves_none(tmp_path, monkeypatch):
    inf, _ = influence()
    keeper = kept(inf, tmp_path / "g")
    list(TrainingGradients(inf.risk, keeper).each(lambda seen: 0, ""))
    path = next((tmp_path / "g").glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(errors.StoreError, match="damaged"):
        list(TrainingGradients(inf.risk, kept(inf, tmp_path / "g")).each(lambda seen: 0, ""))

    def full(tensors, place):
        place.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("upweight.keepers.save_file", full)
    with pytest.raises(errors.StoreError, match="No space left"):
        list(TrainingGradients(inf.risk, kept(inf, tmp_path / "h")).each(lambda seen: 0, ""))
    assert [p.name for p in (tmp_path / "h").iterdir()] == ["manifest.json"]


# The last layer.


def test_the_last_layer_is_what_is_used_last_not_what_is_named_last():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(4, 2)
            self.hidden = nn.Linear(3, 4)

        def forward(self, x):
            return self.out(torch.tanh(self.hidden(x))) * 2

    objective = uw.Objective(Backwards(), "cross_entropy")
    batch = uw.Data.of((torch.ones(1, 3), torch.tensor([1]))).rows()
    assert last_layer(objective, batch) == ("out.weight", "out.bias")


def test_last_layer_scores_are_those_of_the_head_alone():
    inf, queries = influence(method="last_layer")
    scores = inf.explain(queries)
    objective = uw.Objective(
        inf.objective.model,
        "cross_entropy",
        l2=0.01,
        parameters="head.*",
    )
    alone = uw.Influence(objective, inf.data, method="ggn").explain(queries)
    np.testing.assert_allclose(scores.values, alone.values, rtol=1e-10)
    assert scores.provenance.coverage == alone.provenance.coverage < 0.2
    assert inf.objective.space.size == 8
    assert inf.self_influence().shape == (12,)


def test_a_model_without_a_known_last_layer_is_refused():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 2))

        def forward(self, x):
            return torch.logsumexp(x[:, :, None] - torch.cos(self.weight), 1)

    inf = uw.Influence(
        Odd(), (torch.eye(3), torch.tensor([0, 1, 1])), loss="cross_entropy", method="last_layer"
    )
    with pytest.raises(errors.InputError, match="last layer was not found"):
        inf.explain((torch.eye(3), torch.tensor([0, 1, 1])))


def test_a_batch_leaves_nothing_behind():
    inf, _ = influence()
    batch, _ = inf.risk.rows(0, 5)
    per_example(inf.objective, batch)

    def live():
        gc.collect()
        return sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects())

    before = live()
    for _ in range(3):
        per_example(inf.objective, batch)
    assert live() <= before


class Attending(nn.Module):
    """Attention, a fused LSTM, a scale by hand and a transposed convolution."""

    def __init__(self):
        super().__init__()
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
        self.cells = nn.LSTM(4, 3, batch_first=True)
        self.wide = nn.ConvTranspose1d(3, 2, 2)
        self.scale = nn.Parameter(torch.ones(2))

    def forward(self, x):
        x = x + self.attend(x, x, x, need_weights=False)[0]
        return self.scale * self.wide(self.cells(x)[0].mT).mean(2)


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (Tokens(), torch.randint(7, (4, 5))),
        (Attending(), torch.randn(4, 5, 4)),
        (
            nn.Sequential(nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2), nn.Flatten()),
            torch.randn(4, 1, 4, 4),
        ),
    ],
    ids=["tokens", "attention", "pictures"],
)
def test_what_was_watched_is_freed_at_once_and_needs_no_collector(model, x):
    objective = uw.Objective(model, "cross_entropy")
    batch = uw.Data.of((x, torch.zeros(4).long())).rows()
    seen = observe(objective, batch)
    gradients = seen.gradients()
    watched = weakref.ref(seen.watch)
    gc.disable()
    try:
        del seen, gradients
        assert watched() is None
    finally:
        gc.enable()
