"""Small slices of Figures 4 and 5: photographs through a real network."""

import dataclasses

import numpy as np
import pytest
import torch

from reproduce import fig4_photos, fig5_cats
from reproduce.campaign import Campaign, Plan
from reproduce.datasets.cats import cats
from reproduce.datasets.photos import photos
from reproduce.experiment import Steps
from reproduce.extractor import Extractor, published


@pytest.fixture(scope="module")
def figure_4(data_folder):
    del data_folder
    small = dataclasses.replace(
        fig4_photos.Settings(), train=40, test=15, removals=6, nearest=20, temperatures=(0.001,)
    )
    return fig4_photos.run(small, Steps())


def test_the_files_hold_what_they_should(data_folder):
    del data_folder
    some = photos(3, 2)
    assert some.train_x.shape == (6, 3, 224, 224)
    assert some.test_y.tolist() == [0, 0, 1, 1]
    small = cats()
    assert small.train_x.shape == (1000, 3, 32, 32)
    assert np.bincount(small.train_y).tolist() == [500, 500]
    assert np.bincount(small.test_y).tolist() == [200, 200]


def test_folded_normalisation_changes_no_feature(data_folder):
    del data_folder
    image = torch.from_numpy(photos(1, 1).train_x).float()
    with torch.no_grad():
        wanted = published().extract_features((image - 127) / 128).mean((2, 3))
    torch.testing.assert_close(Extractor()(image), wanted, rtol=1e-4, atol=1e-4)


def test_figure_4_on_a_slice(figure_4):
    values = figure_4.values
    assert values["accuracy"]["deep"] >= 0.9
    assert values["rbf"]["spearman"] < values["deep"]["spearman"]
    assert values["deep"]["proof"]["most influential, newton, r"] > 0.99


def test_an_attack_raises_the_loss_it_aims_at(data_folder):
    """Small network, few images: every target's loss rises, inside the box."""
    del data_folder
    settings = dataclasses.replace(
        fig5_cats.Settings(), train=20, test=10, learn=100, epochs=2, targets=3
    )
    everything = cats()
    data = fig5_cats._cut(everything, settings)
    net = fig5_cats.SmallNet().eval().requires_grad_(False)
    torch.manual_seed(0)
    for p in net.parameters():
        p.copy_(torch.randn(p.shape) * (2 / max(1, p[0].numel())) ** 0.5)
    features = [
        fig5_cats.features_of(net, x, "features").astype(np.float64) / 10
        for x in (data.train_x, data.test_x)
    ]

    class Tenth(torch.nn.Module):
        def forward(self, levels):
            return net(levels) / 10

    hurt = fig5_cats.victim(
        Tenth(), (data.train_x, data.train_y), (*features, data.test_y), settings.l2
    )
    right = np.flatnonzero(hurt.margins > 0)[:3].tolist()
    found = Campaign(hurt, right, Steps()).run("two", Plan(2, radius=2.0, step=0.5, rounds=4))
    assert (found["loss"] > found["clean_loss"]).all()
    assert (found["pixels"] <= 2.0 * (3 * 32 * 32) ** 0.5 + 1e-3).all()
    assert (found["rank"] >= 1).all()
