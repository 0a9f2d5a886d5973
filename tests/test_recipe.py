"""Recipes: loaded by name, refused with what is missing, and nothing left behind."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from upweight.data import Data
from upweight.errors import RecipeError, UpweightError
from upweight.recipe import Recipe, load

GOOD = """
import torch
from torch import nn

model = nn.Linear(2, 2)
train = (torch.zeros(4, 2), torch.tensor([0, 1, 0, 1]))
queries = train
loss = "cross_entropy"
"""


def refusal(tmp_path, line):
    """What is said of a good recipe with one more line."""
    with pytest.raises(RecipeError) as caught:
        load(written(tmp_path, GOOD + line + "\n"))
    return str(caught.value)


def written(folder: Path, text: str, name: str = "recipe.py") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def rows(count: int = 4):
    return torch.arange(2.0 * count).reshape(count, 2), torch.arange(count) % 2


def test_defaults_and_optional_names(tmp_path):
    recipe = load(written(tmp_path, GOOD))
    assert (recipe.l2, recipe.removal, recipe.measure) == (0.0, "mean", "loss")
    assert recipe.how is None
    text = (
        GOOD + "l2 = 0.5\nremoval = 'sum'\nparameters = ['weight']\ntitle = 'T'\nids = list('abcd')"
    )
    recipe = load(written(tmp_path, text))
    influence = recipe.influence("cg", 0.25)
    assert recipe.title == "T"
    assert influence.data.ids.tolist() == list("abcd")
    assert (influence.damping, influence.method.name) == (0.25, "cg")
    assert influence.objective.removal == "sum"
    assert influence.objective.space.size == 4
    assert influence.objective.l2.unique().tolist() == [0.5]


def test_missing_names_are_named_with_what_is_there(tmp_path):
    path = written(
        tmp_path, "import torch\nmodel = torch.nn.Linear(2, 2)\ntrian = 1\n_hidden = 2\n"
    )
    with pytest.raises(RecipeError) as caught:
        load(path)
    message = str(caught.value)
    assert "recipe.py does not define train, queries, loss." in message
    assert "this one defines model, trian." in message


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("a = 1\n\nb = a / 0\n", 3, "ZeroDivisionError: division by zero."),
        ("a = 1\ndef f(:\n", 2, "SyntaxError"),
        ("def f():\n    raise ValueError\nf()\n", 2, "ValueError: (no message)"),
        ("import sys\nsys.exit('stop here')\n", 2, "SystemExit: stop here."),
        ("import json\n\njson.loads('{')\n", 3, "JSONDecodeError"),
        ("import nowhere_to_be_found\n", 1, "ModuleNotFoundError"),
        ("import upweight as uw\nimport torch\nuw.Data.of(torch.zeros(0, 2))\n", 3, "DataError"),
    ],
)
def test_a_recipe_that_raises_is_located(tmp_path, text, line, says):
    with pytest.raises(RecipeError) as caught:
        load(written(tmp_path, text))
    assert f"recipe.py, line {line}: " in str(caught.value)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_interrupts_pass_through(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        load(written(tmp_path, "raise KeyboardInterrupt\n"))


@pytest.mark.parametrize("name", ["absent.py", "recipe.txt", "folder.py"])
def test_not_a_python_file(tmp_path, name):
    (tmp_path / "recipe.txt").write_text(GOOD)
    (tmp_path / "folder.py").mkdir()
    with pytest.raises(RecipeError, match="A recipe is a Python file"):
        load(tmp_path / name)


def test_the_interpreter_is_left_as_it_was(tmp_path):
    written(tmp_path, "value = 0.125\n", "neighbour.py")
    (tmp_path / "package").mkdir()
    written(tmp_path / "package", "from package.deep import value\n", "__init__.py")
    written(tmp_path / "package", "value = 'cross_entropy'\n", "deep.py")
    text = GOOD + "import neighbour, package\nl2 = neighbour.value\nloss = package.value\n"
    path, modules, search = written(tmp_path, text), set(sys.modules), list(sys.path)
    recipe = load(path)
    assert (recipe.l2, recipe.loss) == (0.125, "cross_entropy")
    assert sys.path == search
    assert set(sys.modules) == modules
    with pytest.raises(RecipeError):
        load(written(tmp_path, "import neighbour\nraise ValueError\n", "bad.py"))
    assert sys.path == search
    assert set(sys.modules) == modules
    assert not list(tmp_path.glob("__pycache__/recipe*"))


def test_neighbours_of_two_recipes_do_not_meet(tmp_path):
    found = []
    for name, value in (("a", 0.5), ("b", 0.75)):
        (tmp_path / name).mkdir()
        written(tmp_path / name, f"value = {value}\n", "settings.py")
        path = written(tmp_path / name, GOOD + "import settings\nl2 = settings.value\n")
        found.append(load(path).l2)
    assert found == [0.5, 0.75]


def test_a_recipe_may_define_dataclasses(tmp_path):
    text = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        + GOOD
        + "@dataclass\nclass Settings:\n    l2: float = 0.5\nl2 = Settings().l2\n"
    )
    assert load(written(tmp_path, text)).l2 == 0.5


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("model = 3", "model must be a torch.nn.Module, got int"),
        ("title = 3", "title must be a text, got int"),
        ("label_names = 'ab'", "label_names must be a list of texts, one per class, got str"),
        ("label_names = [1, 2]", "label_names must be a list of texts"),
        ("image_shape = (8.0, 8)", "image_shape must be a tuple of whole numbers"),
        ("image_shape = 64", "image_shape must be a tuple of whole numbers"),
    ],
)
def test_names_of_a_wrong_kind(tmp_path, line, says):
    assert f"recipe.py: {says}" in refusal(tmp_path, line)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("measures = 'margin'", "Write measure, or call the variable something else"),
        ("lable_names = ['a', 'b']", "Write label_names"),
        ("labels_names = ['a', 'b']", "Write label_names"),
        ("L2 = 0.05", "Write l2"),
        ("IDs = list('abcd')", "Write ids"),
        ("image_shapes = (1, 2)", "Write image_shape"),
        ("def Measure(outputs, targets):\n    return outputs[:, 0]", "Write measure"),
        ("def retrain_(positions, seed):\n    return model", "Write retrain"),
        ("weight_decay = 0.3", "State it as l2"),
        ("method = 'ekfac'", "Give it on the command line, as --method"),
        ("damping = 0.5", "Give it on the command line, as --damping"),
    ],
)
def test_misspelt_names_are_not_ignored(tmp_path, line, says):
    message = refusal(tmp_path, line)
    assert message.startswith("recipe.py: ")
    assert "is no name that a recipe reads" in message
    assert says in message


@pytest.mark.parametrize(
    "text",
    [
        # Used to say what is read under its own name.
        "L2 = 0.5\nl2 = L2",
        "weight_decay = 0.5\nl2 = {'weight': weight_decay}",
        "measures = ['loss', 'margin']\nmeasure = measures[1]",
        # Of another kind than the name that it looks like.
        "for parameter in model.parameters():\n    pass",
        "for id in range(4):\n    pass",
        "for label_name in ('a', 'b'):\n    pass",
        "titles = ['a', 'b']\nmeasured = torch.ones(3)\nimage_shapes = [(1, 2), (3, 4)]",
        "retrained = model\ntrainings = 3\nremovals = 20",
        # Ordinary names.
        "models = [model]\nlabels = train[1]\ntrain_x, train_y = train\nquery_ids = [0, 1]",
        "lr, epochs, batch_size, seed = 0.1, 5, 32, 0\ntrain_ids = [0, 1, 2, 3]\nkids = [1]",
        "params = dict(model.named_parameters())\nid_ = 3\nnames = ['a']\nshape = (1, 2)",
        "trained = True\ntrainset = train\ntest = train\ntile = 8\nmeasure_all = 'x'",
        "from torch.nn.utils import parametrize, parametrizations",
        "from upweight.demo import minimise\nfrom upweight.retraining import retrain as retrained",
        "from upweight import Influence, Training",
    ],
)
def test_ordinary_names_are_left_alone(tmp_path, text):
    load(written(tmp_path, GOOD + text + "\n"))


def test_the_example_uses_no_name_that_is_refused():
    examples = Path(__file__).parent.parent / "examples"
    assert "ids" in load(examples / "digits_recipe.py").stated


def test_what_was_read_is_known(tmp_path):
    recipe = load(written(tmp_path, GOOD + "l2 = 0.0\nids = torch.arange(4).numpy()\n"))
    assert recipe.stated == ("model", "train", "queries", "loss", "l2", "ids")


@pytest.mark.parametrize(
    "line",
    [
        "ids = [1, 2]",
        "ids = [1, 1, 2, 3]",
        "l2 = -1",
        "l2 = {'nothing*': 1.0}",
        "removal = 'gone'",
        "measure = 'beauty'",
        "parameters = ['nothing']",
        "loss = 'anger'",
        "loss = None",
        "train = 3",
    ],
)
def test_wrong_values_are_refused_by_the_library(tmp_path, line):
    with pytest.raises(UpweightError):
        load(written(tmp_path, GOOD + line + "\n")).influence("exact")


def test_labels_by_name_and_number():
    recipe = Recipe(nn.Linear(2, 2), rows(), rows(), "cross_entropy", label_names=["a", "b"])
    assert [recipe.name(v) for v in (0, 1, 2, -1, 1.0, 0.5)] == ["a", "b", "2", "-1", "b", "0.5"]
    assert recipe.name(torch.tensor([1])) == "b"
    assert recipe.name(torch.zeros(2)) == ""
    assert recipe.name(None) == ""


def test_examples_have_ids_labels_and_pictures():
    data = Data.of(rows(), ids=list("abcd"))
    recipe = Recipe(nn.Linear(2, 2), rows(), rows(), "cross_entropy", image_shape=(1, 2))
    look = recipe.look(data, 1)
    assert (look["id"], look["label"]) == ("b", "1")
    assert look["picture"].startswith("data:image/png;base64,")
    plain = Recipe(nn.Linear(2, 2), rows(), rows(), "cross_entropy")
    assert plain.look(data, 0)["picture"] is None
    wrong = Recipe(nn.Linear(2, 2), rows(), rows(), "cross_entropy", image_shape=[3, 3])
    with pytest.raises(RecipeError, match=r"image_shape \(3, 3\) does not hold the 2 values"):
        wrong.look(data, 0)
