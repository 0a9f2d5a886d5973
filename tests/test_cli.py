"""The command line as a person types it: help, runs, refusals, and what is left after a kill."""

import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from upweight.cli.app import main
from upweight.evidence import Evidence
from upweight.methods import METHODS
from upweight.scores import Scores
from upweight.store import read_manifest

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"

# Sends itself a signal in the middle of the work: on a given call of the loss.
STRICKEN = """
import os, signal
from torch.nn import functional as F
exec(open({template!r}).read())
calls = 0

def loss(outputs, targets):
    global calls
    calls += 1
    if calls == {call}:
        os.kill(os.getpid(), signal.{signal})
    return F.cross_entropy(outputs, targets, reduction="none")
"""


@pytest.fixture(autouse=True)
def _inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def recipe(tmp_path) -> Path:
    assert main(["new", "my.py"]) == 0
    return tmp_path / "my.py"


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def only_error(capsys) -> str:
    caught = capsys.readouterr()
    lines = caught.err.splitlines()
    assert len(lines) == 1, caught.err
    assert lines[0].startswith("upweight: ")
    return lines[0]


@pytest.mark.parametrize(
    "command",
    [[], ["demo"], ["run"], ["validate"], ["tune"], ["doctor"], ["new"], ["export"], ["methods"]],
)
def test_help_is_quick_and_without_torch(command):
    code = (
        "import sys, time; from upweight.cli.app import main; "
        f"code = main({[*command, '--help']!r}); "
        "assert not {'torch', 'numpy'} & set(sys.modules); "
        "print(code, time.process_time())"
    )
    spent = []
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        *help_, last = done.stdout.splitlines()
        spent.append(float(last.split()[1]))
        assert last.split()[0] == "0"
        assert "Usage: upweight" in "\n".join(help_)
    assert min(spent) < 0.3


def test_the_entry_point_is_installed():
    program = Path(sys.executable).with_name("upweight")
    done = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0.1.0"
    failed = subprocess.run(
        [program, "run", "absent.py"], capture_output=True, text=True, check=False
    )
    assert failed.returncode == 1
    assert failed.stderr.count("\n") == 1
    assert "A recipe is a Python file" in failed.stderr


def test_new_run_and_run_again(recipe, capsys):
    assert main(["run", "my.py", "--out", "out"]) == 0
    said = capsys.readouterr().out
    for part in (
        "my: explained 6 queries by 150",
        "random: r = ",
        "Suspicious labels",
        "of 150 labels differ from what the model says.",
        "out/report",
    ):
        assert part in said
    assert {"manifest.json", "report.html", "audit.csv", "top.csv", "scores.npy"} <= left(
        Path("out")
    )
    assert Scores.load("out").shape == (6, 150)
    audit = Path("out/audit.csv").read_text().splitlines()
    assert sum(int(line.split(",")[0]) < 8 for line in audit[1:11]) >= 5
    assert main(["run", "my.py", "--out", "out"]) == 0
    capsys.readouterr()
    assert main(["run", "my.py", "--out", "out", "--top", "2"]) == 1
    assert "belongs to another run" in only_error(capsys)
    assert main(["run", "my.py", "--out", "out", "--top", "2", "--replace"]) == 0
    assert read_manifest("out")["settings"]["top"] == 2
    assert left(Path()) == {"my.py", "out"}


def test_run_options_reach_the_result(recipe):
    words = ["--method", "cg", "--damping", "0.5", "--top", "3", "--removals", "4", "--seed", "9"]
    assert main(["run", "my.py", *words]) == 0
    manifest = read_manifest("upweight-my")
    assert (manifest["method"], manifest["damping"]) == ("cg", 0.5)
    assert manifest["settings"] == {"top": 3, "removals": 4, "seed": 9}
    assert json.loads(Path("upweight-my/validation.json").read_text())["agreements"]


@pytest.mark.parametrize(
    ("line", "words", "says"),
    [
        ("", "", ["Good: Predictions can be taken at face value."]),
        ("", "--removals 0", ["Not checked: Nothing here shows that the scores come true."]),
        (
            "with torch.no_grad():\n    model.weight.mul_(2)",
            "--removals 3",
            ["The model: gradient norm", "more than 1e-05: not at a minimum. Train longer, or"],
        ),
    ],
)
def test_run_says_how_far_to_trust_it_and_whether_the_model_is_at_a_minimum(
    recipe, capsys, line, words, says
):
    recipe.write_text(recipe.read_text() + line + "\n")
    capsys.readouterr()
    assert main(["run", "my.py", "--out", "out", *words.split()]) == 0
    said = capsys.readouterr().out
    assert all(part in said for part in says)
    assert ("not at a minimum" in said) == bool(line)
    assert ("not at a minimum" in Path("out/report.html").read_text()) == bool(line)


def test_dry_run_prints_the_plan_and_writes_nothing(recipe, capsys):
    assert main(["run", "my.py", "--dry-run"]) == 0
    assert "memory_gib" in capsys.readouterr().out
    assert left(Path()) == {"my.py"}


@pytest.mark.parametrize(
    ("words", "audited", "removals"),
    [
        ("", True, "removals (40 refits of 9 parameters): not estimated; --removals 0 leaves"),
        ("--method ekfac --removals 5", True, "removals (10 refits of 9 parameters)"),
        ("--removals 0", True, None),
        ("--method relatif --removals 0", False, None),
        ("--method loss", False, None),
    ],
)
def test_a_run_says_beforehand_what_a_plan_leaves_out(recipe, capsys, words, audited, removals):
    for dry in (["--dry-run"], ["--out", "out"]):
        capsys.readouterr()
        assert main(["run", "my.py", *dry, *words.split()]) == 0
        before = capsys.readouterr().out.partition("explained")[0]
        assert ("audit (self-influence of 150 examples): not estimated" in before) == audited
        assert removals in before if removals else "removals (" not in before


def test_new_leaves_what_exists(recipe, capsys):
    recipe.write_text("mine")
    capsys.readouterr()
    assert main(["new", "my.py"]) == 1
    assert "exists and is left as it is" in only_error(capsys)
    assert recipe.read_text() == "mine"
    assert main(["new", "my.txt"]) == 1
    assert "ending in .py" in only_error(capsys)
    assert main(["new", "my.py/under.py"]) == 1
    assert "Cannot write" in only_error(capsys)
    assert main(["new", "absent/my.py"]) == 1
    assert "Cannot write" in only_error(capsys)


@pytest.mark.parametrize(
    ("line", "words", "says"),
    [
        ("del loss, train", "", "my.py does not define train, loss."),
        ("1 / 0", "", "ZeroDivisionError: division by zero."),
        ("loss = 'anger'", "", "The loss 'anger' is unknown."),
        ("ids = [1]", "", "1 ids for 150 rows."),
        ("train[1][0] = 7", "", "label"),
        ("train[0][3, 0] = float('nan')", "", "row 3"),
        ("queries = (queries[0][:, :1], queries[1])", "", "queries"),
        ("model.train(); model.append(nn.Dropout())", "", "model.eval()"),
        ("", "--method foo", "The method 'foo' is unknown."),
        ("", "--damping -1", "damping must be a finite number"),
        ("", "--top 0", "top must be at least 1"),
        ("", "--removals 2", "removals must be 0, or from 3"),
        ("l2 = 0.0", "", "is singular"),
    ],
)
def test_refusals_are_one_line_and_leave_nothing(recipe, capsys, line, words, says):
    text = recipe.read_text().replace(
        "model = nn.Linear(2, 3)", "model = nn.Sequential(nn.Linear(2, 3))"
    )
    recipe.write_text(text + line + "\n")
    capsys.readouterr()
    assert main(["run", "my.py", "--out", "out", *words.split()]) == 1
    assert says in only_error(capsys)
    assert left(Path()) == {"my.py"}


@pytest.mark.parametrize(
    "words",
    ["run", "nonsense", "run my.py --top many", "run my.py --unknown 3", "methods a.py b.py"],
)
def test_a_wrong_command_line_exits_with_2(words, capsys):
    assert main(words.split()) == 2
    assert capsys.readouterr().err


@pytest.mark.parametrize("out", ["file", "file/under", "other", "/proc/nowhere/out"])
@pytest.mark.parametrize("command", [["run", "my.py"], ["demo"]])
def test_places_that_cannot_be_written(recipe, capsys, command, out):
    Path("file").write_text("precious")
    Path("other").mkdir()
    Path("other/precious.txt").write_text("precious")
    before = left(Path())
    capsys.readouterr()
    assert main([*command, "--out", out, "--replace"]) == 1
    assert "Choose another" in only_error(capsys)
    assert left(Path()) == before
    assert Path("file").read_text() == "precious"
    assert left(Path("other")) == {"precious.txt"}


def test_an_error_of_the_recipe_in_the_middle_leaves_nothing(recipe):
    template = recipe.read_text()
    recipe.write_text(
        template + "calls = 0\ndef loss(outputs, targets):\n    global calls\n    calls += 1\n"
        "    if calls > 40:\n        raise KeyboardInterrupt\n"
        "    return F.cross_entropy(outputs, targets, reduction='none')\n"
    )
    assert main(["run", "my.py", "--out", "out"]) == 130
    assert left(Path()) == {"my.py"}


@pytest.mark.parametrize(
    ("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGKILL", -signal.SIGKILL)]
)
def test_a_signal_in_the_middle_leaves_no_run(recipe, name, code):
    text = STRICKEN.format(template=str(recipe), call=25, signal=name)
    Path("stricken.py").write_text(text)
    script = "import sys; from upweight.cli.app import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", script, "run", "stricken.py", "--out", "out"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert not Path("out").exists()
    if name != "SIGKILL":
        assert left(Path()) == {"my.py", "stricken.py"}
    # The same place is free for the next run, whatever a killed one left beside it.
    assert main(["run", "my.py", "--out", "out", "--removals", "0"]) == 0


def test_validate_spends_a_budget_and_a_longer_one_goes_on(recipe, capsys):
    # The least that makes an interval is finished even if the budget is gone.
    assert main(["validate", "my.py", "--budget", "0.000001 s"]) == 0
    said = capsys.readouterr().out
    for part in (
        "explained 6 queries by 150",
        "Trust the ranking: rank r",
        "best possible",
        "1e-09",
    ):
        assert part in said
    out = Path("upweight-my-evidence")
    assert {"evidence.json", "evidence.csv", "manifest.json", "report.html"} <= left(out)
    first = Evidence.load(out / "evidence.json")
    assert first.verdict.sentence in said
    page = (out / "report.html").read_text()
    assert "Models were really trained again" in page
    assert 'class="scatter ladder"' in page
    assert "Not proved by removal" not in page
    assert main(["validate", "my.py", "--budget", "20 s", "--method", "cg"]) == 1
    assert "belongs to another run" in only_error(capsys)
    # Another method is another run, and judged by the same truth.
    words = ["--budget", "20 s", "--method", "cg", "--replace"]
    assert main(["validate", "my.py", *words]) == 0
    second = Evidence.load(out / "evidence.json")
    assert first.points.actual.shape[1] == 16
    assert second.points.actual.shape[1] > 16
    shared = dict(zip(second.points.removed.tolist(), second.points.actual.T, strict=True))
    for name, column in zip(first.points.removed.tolist(), first.points.actual.T, strict=True):
        if name in shared:
            assert abs(shared[name] - column).max() == 0
    assert len(left(Path("upweight-my-truth"))) == 1
    assert left(Path()) == {"my.py", "upweight-my-evidence", "upweight-my-truth"}


TRAINED = """
del l2, title, label_names

def retrain(positions, seed):
    torch.manual_seed(seed)
    model = nn.Linear(2, 3, dtype=torch.float64)
    optimiser = torch.optim.SGD(model.parameters(), 0.3)
    for _ in range(5):
        optimiser.zero_grad()
        F.cross_entropy(model(train[0][positions]), train[1][positions]).backward()
        optimiser.step()
    return model

model = retrain(torch.arange(150), 0)
queries = draw(9)
"""


def test_validate_by_a_function_of_the_recipe(recipe, capsys):
    recipe.write_text(recipe.read_text() + TRAINED)
    words = ["--budget", "3", "--method", "ggn", "--damping", "0.1", "--truth", "kept"]
    assert main(["validate", "my.py", *words, "--out", "out"]) == 0
    said = capsys.readouterr().out
    assert "trained by retrain" in said
    assert "This model" in said
    assert left(Path()) == {"my.py", "out", "kept"}
    assert read_manifest("kept")["kind"] == "retraining"


@pytest.mark.parametrize(
    ("line", "words", "says"),
    [
        ("", "--budget soon", "A budget is a number of seconds"),
        ("", "--budget 9 --method embedding", "one of the baselines"),
        ("training = 3", "", "training must be a Training of upweight, got int"),
        ("retrain = 3", "", "retrain must be a function (positions, seed) -> model, got int"),
        (
            "from upweight import SGD, Training\ntraining = Training(1, 9, SGD(1.0))\n"
            "def retrain(positions, seed):\n    return model",
            "",
            "and not both",
        ),
        (
            "def retrain(positions, seed):\n    return model",
            "--budget 0.000001",
            "the smallest evidence takes 18 of them",
        ),
        (
            "def retrain(positions, seed):\n    return 7",
            "",
            "must return a torch.nn.Module, got int",
        ),
    ],
)
def test_validate_refuses_in_one_line_and_leaves_no_run(recipe, capsys, line, words, says):
    recipe.write_text(recipe.read_text() + line + "\n")
    capsys.readouterr()
    assert main(["validate", "my.py", *words.split()]) == 1
    assert says in only_error(capsys)
    assert left(Path()) <= {"my.py", "upweight-my-truth"}


def test_tune_chooses_by_models_trained_again(recipe, capsys):
    recipe.write_text(recipe.read_text() + TRAINED)
    words = ["--budget", "8 s", "--method", "ggn", "--method", "no_hessian", "--truth", "kept"]
    assert main(["tune", "my.py", *words]) == 0
    said = capsys.readouterr().out
    assert "trained by retrain" in said
    assert "tried 11 settings of 2 methods" in said
    assert said.splitlines()[-1].startswith("upweight run my.py --method ")
    assert left(Path()) == {"my.py", "kept"}
    # The setting that it names runs.
    chosen = said.splitlines()[-1].split()[1:]
    assert main([*chosen, "--removals", "0", "--out", "out"]) == 0


def test_tune_shares_its_truth_with_validate(recipe, capsys):
    recipe.write_text(recipe.read_text() + TRAINED)
    assert main(["tune", "my.py", "--budget", "8 s", "--method", "ggn"]) == 0
    kept = left(next(Path("upweight-my-truth").iterdir()))
    words = ["--budget", "3 s", "--method", "ggn", "--damping", "0.1"]
    assert main(["validate", "my.py", *words]) == 0
    assert left(next(Path("upweight-my-truth").iterdir())) >= kept
    assert len(left(Path("upweight-my-truth"))) == 1


@pytest.mark.parametrize("words", ["--method exat", "--method cosine", "--method relatif"])
def test_tune_refuses_a_method_before_it_trains(recipe, capsys, words):
    recipe.write_text(recipe.read_text() + "def retrain(positions, seed):\n    raise SystemExit\n")
    capsys.readouterr()
    assert main(["tune", "my.py", "--budget", "2 h", "--method", "exact", *words.split()]) == 1
    refusal = only_error(capsys)
    assert any(said in refusal for said in ("is unknown", "is a baseline", "an ablation"))
    assert left(Path()) == {"my.py"}


@pytest.mark.parametrize("command", ["validate", "tune"])
def test_a_wrong_budget_is_refused_before_anything_is_loaded(capsys, command):
    assert main([command, "absent.py", "--budget", "banana"]) == 1
    assert "got 'banana'" in only_error(capsys)


@pytest.mark.parametrize("command", ["validate", "tune"])
def test_an_interrupted_training_says_what_is_kept(recipe, capsys, command):
    recipe.write_text(
        recipe.read_text() + TRAINED + "again, calls = retrain, [0]\n"
        "def retrain(positions, seed):\n    calls[0] += 1\n    if calls[0] > 9:\n"
        "        raise KeyboardInterrupt\n    return again(positions, seed)\n"
    )
    capsys.readouterr()
    words = ["--method", "ggn", "--budget", "1 h", "--truth", "kept"]
    damping = ["--damping", "0.1"] if command == "validate" else []
    assert main([command, "my.py", *words, *damping]) == 130
    assert "Outcomes so far are kept in kept; the same command goes on" in only_error(capsys)
    assert read_manifest("kept")["kind"] == "retraining"
    assert left(Path()) == {"my.py", "kept"}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--budget 0.000001", "the smallest evidence takes 17 of them"),
        ("--budget never", "A budget is a number of seconds"),
        ("--budget 9 --method exact --method euclidean", "is a baseline"),
        ("--budget 9 --method nothing", "is unknown"),
    ],
)
def test_tune_refuses_in_one_line(recipe, capsys, words, says):
    capsys.readouterr()
    assert main(["tune", "my.py", *words.split()]) == 1
    assert says in only_error(capsys)


def test_help_says_the_defaults_of_its_own_command(capsys):
    assert main(["validate", "--help"]) == 0
    assert "of 'validate' upweight-NAME-evidence" in " ".join(capsys.readouterr().out.split())
    assert main(["tune", "--help"]) == 0
    assert "is tried with damping 'auto'" in " ".join(capsys.readouterr().out.split())


def test_interrupted_words(capsys, monkeypatch):
    def stop(*args, ruled):
        raise KeyboardInterrupt

    monkeypatch.setattr("upweight.cli.methods.table", stop)
    assert main(["methods"]) == 130
    assert "Interrupted" in only_error(capsys)


def test_methods_lists_the_table(capsys):
    assert main(["methods"]) == 0
    said = capsys.readouterr().out
    for name in (*METHODS, "baseline"):
        assert name in said
    for row in METHODS.values():
        assert row.assumes.split()[0] in said


def test_the_table_of_methods_fits_a_hundred_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) == 100
    for name in METHODS:  # no name is broken
        assert any(line.startswith(f"│ {name} ") for line in lines)


def test_methods_of_a_recipe_say_what_each_costs_or_why_not(recipe, capsys):
    capsys.readouterr()
    assert main(["methods", "my.py"]) == 0
    caught = capsys.readouterr()
    rows = {
        cells[0]: cells[1:]
        for cells in (
            [c.strip() for c in line.split("│")[1:-1]] for line in caught.out.splitlines()
        )
        if len(cells) == 5 and cells[0] in METHODS
    }
    assert set(rows) == set(METHODS)
    assert "6 queries, 150 training examples" in caught.out
    for name, (passes, seconds, mib, note) in rows.items():
        if name == "bm25":
            assert "refused: The baseline 'bm25' counts token ids" in note
            assert (passes, seconds, mib) == ("", "", "")
        elif not note:
            assert float(passes.replace(",", "")) > 0
            assert float(seconds.replace(",", "")) >= 0
            assert float(mib) > 0
    assert not caught.err


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_methods_of_a_recipe_go_on_where_torch_or_damping_stop_some(recipe, capsys):
    recipe.write_text(TOKENS.replace("l2 = 0.1", "l2 = 0.0"))
    capsys.readouterr()
    assert main(["methods", "my.py"]) == 0
    plain = capsys.readouterr().out
    assert "refused: The model has an operation without the second derivative" in plain
    assert "refused: The curvature is singular" in plain
    assert main(["methods", "my.py", "--damping", "0.1"]) == 0
    damped = capsys.readouterr().out
    assert "refused: The curvature is singular" not in damped
    assert "refused: The method 'no_hessian' has no curvature" in damped


def test_methods_of_a_recipe_that_is_none(capsys):
    assert main(["methods", "absent.py"]) == 1
    assert "A recipe is a Python file" in only_error(capsys)


def test_doctor_of_the_machine_and_of_a_recipe(recipe, capsys):
    assert main(["doctor"]) == 0
    assert torch.__version__ in capsys.readouterr().out
    assert main(["doctor", "my.py"]) == 0
    said = capsys.readouterr().out
    assert "reads model, train, queries, loss, l2, label_names, title; as by default" in said
    for part in ("two readings", "bit by bit", "at a minimum", "100.0%", "'exact' fits"):
        assert part in said
    assert "FAIL" not in said


@pytest.mark.parametrize(
    ("line", "code", "says"),
    [
        ("l2 = 0.5", 0, "not at a minimum"),
        ("parameters = ['weight']", 0, "66.7%"),
        ("loss = lambda outputs, targets: outputs.sum()", 1, "FAIL"),
        (
            "class Noise(nn.Module):\n    def forward(self, x):\n"
            "        return x + torch.rand_like(x)\nmodel = nn.Sequential(model, Noise())",
            1,
            "FAIL",
        ),
        (
            "class Moving(torch.utils.data.Dataset):\n    def __len__(self):\n        return 9\n"
            "    def __getitem__(self, i):\n        return torch.rand(2).double(), 1\n"
            "train = Moving()",
            1,
            "FAIL",
        ),
    ],
)
def test_doctor_finds(recipe, capsys, line, code, says):
    recipe.write_text(recipe.read_text() + line + "\n")
    capsys.readouterr()
    assert main(["doctor", "my.py"]) == code
    assert says in capsys.readouterr().out


def test_doctor_of_a_broken_recipe(recipe, capsys):
    recipe.write_text("model = 1\n")
    capsys.readouterr()
    assert main(["doctor", "my.py"]) == 1
    assert "does not define train, queries, loss" in only_error(capsys)


def test_the_demo_finds_the_wrong_labels_and_proves_both_models(capsys):
    threads = torch.get_num_threads()
    assert main(["demo", "--out", "demo"]) == 0
    assert torch.get_num_threads() == threads
    said = capsys.readouterr().out
    assert "Softmax regression" in said
    assert "Network 64-16-10" in said
    assert "not proved" not in said
    assert "Not proved" not in said
    assert left(Path("demo")) == {"manifest.json", "report.html", "softmax", "network"}
    for folder in ("softmax", "network"):
        proof = json.loads(Path("demo", folder, "validation.json").read_text())["agreements"]
        for found in proof.values():
            assert found["r"] > 0.999
            assert 0.95 < found["slope"] < 1.1
            assert found["count"] == 160
        assert read_manifest(Path("demo", folder))["worst_residual"] < 1e-10
    page = Path("demo/report.html").read_text()
    assert page.count("data:image/png") > 2 * 8 * 10
    assert not [part for part in page.split('"') if part.startswith(("http:", "https:", "//"))]
    assert len(page) < 5_000_000


def test_the_examples_run(capsys):
    assert main(["run", str(EXAMPLES / "digits_recipe.py"), "--out", "out"]) == 0
    assert "One or seven?" in Path("out/report.html").read_text()
    runpy.run_path(str(EXAMPLES / "first_answer.py"))
    assert "slope = 1.0" in capsys.readouterr().out


TOKENS = """
import torch
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.EmbeddingBag(9, 3), nn.Linear(3, 2)).double()
train = torch.randint(9, (30, 4)), torch.arange(30) % 2
queries = torch.randint(9, (3, 4)), torch.arange(3) % 2
loss = "cross_entropy"
l2 = 0.1
"""


@pytest.mark.parametrize(
    ("line", "words", "heads"),
    [
        ("", "--method loss", ("largest", "smallest")),
        (
            "def measure(outputs, targets):\n    return outputs.log_softmax(1)[:, 0]",
            "--removals 0",
            ("removal raises most", "removal lowers most"),
        ),
    ],
)
def test_run_calls_nothing_helpful_where_nothing_says_so(recipe, capsys, line, words, heads):
    recipe.write_text(recipe.read_text() + line + "\n")
    assert main(["run", "my.py", "--out", "out", *words.split()]) == 0
    said = capsys.readouterr().out
    assert all(head in said for head in heads)
    for text in (said, Path("out/top.csv").read_text()):
        assert "helpful" not in text
        assert "harmful" not in text


def test_a_method_that_does_not_suit_the_inputs_says_so(recipe, capsys):
    capsys.readouterr()
    assert main(["run", str(recipe), "--out", "out", "--method", "bm25"]) == 1
    assert "counts token ids" in only_error(capsys)
    assert not Path("out").exists()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_from_the_command_line(method, recipe):
    if method == "bm25":
        recipe.write_text(TOKENS)
    assert main(["run", str(recipe), "--out", "out", "--method", method, "--removals", "3"]) == 0
    assert read_manifest("out")["method"] == method
