"""Shared set-up: few threads, no progress bars, the data folder if there is one."""

import os
from pathlib import Path

import pytest
import torch

os.environ["UPWEIGHT_PROGRESS"] = "0"
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    folder = os.environ.get("UPWEIGHT_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("UPWEIGHT_DATA does not name a folder with the data sets")
    return Path(folder)
