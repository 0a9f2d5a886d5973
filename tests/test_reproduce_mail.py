"""Figure 6 on a slice of the real mail, and its leave-one-out forms against real removal."""

import dataclasses
import io
import tarfile

import numpy as np
import pytest
from scipy.special import expit

from reproduce import datasets, fig6_mail, flips
from reproduce.datasets.files import members
from reproduce.datasets.mail import _letters
from reproduce.experiment import Steps
from reproduce.flips import BEST, CORRECTED, INFLUENCE, LOSS, OUTSIDE, RANDOM
from reproduce.sparse_logistic import leave_one_out, minimum

SMALL = dataclasses.replace(
    flips.Settings(), repeats=2, other_repeats=1, choice_repeats=1, mails=500, choice_l2=(3e-2,)
)


@pytest.fixture(scope="module")
def bag(data_folder):
    del data_folder
    return flips.bag_of_words(SMALL, SMALL.tokens)


@pytest.fixture(scope="module")
def found(bag):
    return fig6_mail.run(SMALL, Steps())


def test_mail_is_complete_and_split_as_in_the_paper(data_folder):
    del data_folder
    data = datasets.mail()
    assert [len(data.train), len(data.test)] == [4137, 1035]
    assert [data.train_y.sum(), data.test_y.sum()] == [1209, 291]
    assert all(text.startswith("Subject:") for text in data.train)


def test_an_archive_may_hold_a_summary_or_not():
    mails = {"enron1/ham/1.txt": b"a", "enron1/spam/2.txt": b"\xe9"}
    packs = []
    for extra in ({}, {"enron1/Summary.txt": b"about"}):
        with tarfile.open(fileobj=(buffer := io.BytesIO()), mode="w:gz") as archive:
            for name, value in {**extra, **mails}.items():
                item = tarfile.TarInfo(name)
                item.size = len(value)
                archive.addfile(item, io.BytesIO(value))
        packs.append(_letters(buffer.getvalue()))
    assert packs[0] == packs[1]
    assert members(packs[0]) == {"ham/1.txt": b"a", "spam/2.txt": b"\xe9"}


def test_tokens():
    text = "Subject: The re-routed hpl2 meters, in 2001; x"
    assert flips.TOKENS["all words"](text) == ["subject", "the", "re", "routed", "meters", "in"]
    assert flips.TOKENS["words without stop words"](text) == ["subject", "routed", "meters"]
    assert flips.TOKENS["stems without stop words"](text) == ["subject", "rout", "meter"]


def test_leave_one_out_is_what_removal_does(bag):
    """Leverage, self-influence and outside margin against H itself and against a refit."""
    _, signs = flips.flipped(bag, SMALL, 120)
    row = minimum(bag.x, signs, 1e-2, tolerance=1e-11)
    margin, n = signs * (bag.x @ row), len(signs)
    got = leave_one_out(bag.kernel, margin, 1e-2)
    x = bag.x.toarray()
    bend = expit(margin) * expit(-margin)
    inverse = np.linalg.inv((x.T * bend) @ x / n + 1e-2 * np.eye(x.shape[1]))
    quadratic = np.einsum("ij,jk,ik->i", x, inverse, x) / n
    np.testing.assert_allclose(got.leverage, bend * quadratic, atol=1e-11)
    np.testing.assert_allclose(got.self_influence, expit(-margin) ** 2 * quadratic, atol=1e-10)
    weights = np.linspace(-1, 1, n)
    np.testing.assert_allclose(got.carried(weights), x @ (inverse @ (x.T @ weights)), atol=1e-7)
    i = int(np.argsort(margin)[20])
    kept = np.delete(np.arange(n), i)
    # The sum of the losses of the rest with the same weight on L2.
    outside = minimum(bag.x[kept], signs[kept], 1e-2 * n / (n - 1), tolerance=1e-11)
    real = float(signs[i] * (bag.x[[i]] @ outside)[0])
    assert abs(got.outside_margin[i] - real) < 0.25 * abs(margin[i] - real)


def test_the_library_gives_the_same_self_influence(found):
    assert max(found.values["library"]["differ"]) < 1e-8


def test_scores_find_flips_in_the_order_of_the_paper(found):
    at_tenth = {name: one["mean"][1] for name, one in found.values["found"].items()}
    assert at_tenth[BEST] > at_tenth[CORRECTED] > at_tenth[INFLUENCE] > at_tenth[LOSS]
    assert at_tenth[LOSS] > at_tenth[RANDOM] + 0.1
    assert at_tenth[OUTSIDE] > at_tenth[INFLUENCE]
    assert 0.25 < at_tenth[INFLUENCE] < 0.5
    assert abs(at_tenth[RANDOM] - 0.1) < 0.06


def test_fixing_labels_helps_and_refits_are_done(found):
    values = found.values
    assert values["flipped_accuracy"] < values["accuracy"][BEST]["mean"][-1]
    assert values["accuracy"][BEST]["mean"][-1] > values["accuracy"][RANDOM]["mean"][-1] + 0.02
    assert values["tolerance"]["largest"] <= 0.006


def test_flips_are_drawn_as_in_2017(bag):
    wrong, signs = flips.flipped(bag, SMALL, 120)
    assert len(wrong) == 2 * (500 // 20)
    assert set(np.flatnonzero(signs != bag.signs)) == set(wrong)
    np.random.seed(120)
    assert (wrong == np.random.choice(500, 50, replace=False)).all()
