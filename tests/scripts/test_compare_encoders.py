"""The table of encoders and seeds: its arithmetic, what a second start does again, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import compare_encoders
import pandas as pd
import pytest
import steps
from click.testing import CliRunner, Result
from compare_encoders import DATASET, command, equal_minutes, markdown, table
from demo_table import mean_dice
from steps import Step, claim, run_steps

from nnunet_dgplugins.errors import UserError

SITES = {"BMC": (0.2, 0.4), "UCL": (0.6,)}


def write_csv(path: Path, dice: dict[str, tuple[float, ...]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for site, values in dice.items():
        for number, value in enumerate(values):
            case = (f"{site}_{number}", site, f"{site}/{number}", "prostate")
            rows += [(*case, "dice", value), (*case, "hd95", 9.0)]
    columns = ["case", "site", "patient", "class", "metric", "value"]
    pd.DataFrame(rows, columns=columns).to_csv(path, index=False)


def finished(folder: Path, shift: float, source: float | None = None) -> Path:
    write_csv(folder / "unseen.csv", {site: tuple(v + shift for v in values) for site, values in SITES.items()})
    if source is not None:
        write_csv(folder / "source.csv", {"RUNMC": (source,)})
    return folder


def test_dice_is_the_mean_over_cases_of_a_site_and_other_metrics_do_not_count(tmp_path: Path):
    finished(tmp_path, 0)
    read = pd.read_csv(tmp_path / "unseen.csv")
    assert mean_dice(read, "BMC") == pytest.approx(0.3)
    assert mean_dice(read) == pytest.approx(0.4)


def test_every_site_counts_the_same_and_spread_is_over_seeds(tmp_path: Path):
    runs = [
        ("a", "0", finished(tmp_path / "a0", 0.0, source=0.8)),
        ("b", "0", finished(tmp_path / "b0", 0.1, source=0.9)),
        ("a", "1", finished(tmp_path / "a1", 0.2, source=0.6)),
        ("b", "1", tmp_path / "not_finished"),
        ("constant mask", "-", finished(tmp_path / "c", 0.05)),
    ]
    lines = table(runs)
    assert list(lines.columns) == ["encoder", "seed", "RUNMC (validation)", "BMC", "UCL", "mean unseen"]
    assert [*zip(lines["encoder"], lines["seed"], strict=True)] == [
        ("a", "0"), ("a", "1"), ("a", "mean"), ("a", "sd"), ("b", "0"), ("constant mask", "-"),
    ]  # fmt: skip
    assert lines["mean unseen"].tolist() == pytest.approx([0.45, 0.65, 0.55, 0.02**0.5, 0.55, 0.5])
    assert lines["RUNMC (validation)"].tolist()[:3] == pytest.approx([0.8, 0.6, 0.7])
    shown = markdown(lines).splitlines()
    assert shown[0] == "| encoder | seed | RUNMC (validation) | BMC | UCL | mean unseen |"
    assert shown[5] == "| a | sd | 0.141 | 0.141 | 0.141 | 0.141 |"
    assert shown[-1] == "| constant mask | - | - | 0.350 | 0.650 | 0.500 |"


def test_stock_gets_the_mean_training_time_of_the_encoders(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compare_encoders, "training_minutes", lambda fold: {"a": 2.0, "b": 3.0}[fold.name])
    assert equal_minutes([Path("a"), Path("b")]) == "2.500"


def step(folder: Path, name: str, code: str) -> Step:
    return Step(folder, name, [sys.executable, "-c", lambda: code], {"GREETING": "hello"})


def test_a_finished_step_is_not_done_again_and_a_failed_one_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    trace = tmp_path / "trace"
    write = f"import os; open({str(trace)!r}, 'a').write(os.environ['GREETING'] + ' ')"
    first, broken = step(tmp_path, "first", write), step(tmp_path, "second", "raise SystemExit('no disk')")
    with pytest.raises(UserError, match="no disk"):
        run_steps([first, broken], {})
    assert first.stamp.is_file()
    assert not broken.stamp.exists()
    run_steps([first, step(tmp_path, "second", write)], {})
    assert trace.read_text() == "hello hello "
    assert "[1/2] first, " in capsys.readouterr().out
    run_steps([first, broken], {})  # all done: not even the broken one is started
    assert capsys.readouterr().out.count("done before") == 2


def test_expected_time_is_what_steps_of_the_kind_took_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    done, later = step(tmp_path / "0", "train", ""), step(tmp_path / "1", "train", "")
    other = Step(tmp_path / "2", "train", [sys.executable, "-c", ""], {}, "stock train")
    done.stamp.parent.mkdir(parents=True)
    done.stamp.write_text("60\n")
    run_steps([done, later, other], {"train": 7, "stock train": 120})
    assert "train, " in (out := capsys.readouterr().out)
    assert "about 60 s; 0.0 min gone, about 3.0 min to go" in out


def test_a_folder_keeps_to_its_options(tmp_path: Path):
    claim(tmp_path, {"epochs": 20, "weights": "abc"})
    claim(tmp_path, {"epochs": 20, "weights": "abc"})
    with pytest.raises(UserError, match="weights=abc, now def"):
        claim(tmp_path, {"epochs": 20, "weights": "def"})


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands that would have been started; an evaluation leaves a table of numbers behind."""
    commands: list[list[str]] = []

    def run(words: list[str], env: dict[str, str], **_: object) -> SimpleNamespace:
        commands.append([*words, *(f"{k}={env.get(k)}" for k in ("DGPLUGINS_SETTINGS", "nnUNet_results"))])
        if "--csv" in words:
            source = {"RUNMC": (0.9, 0.9)}
            write_csv(Path(words[words.index("--csv") + 1]), source if "--labels" in words else SITES)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(steps, "subprocess", SimpleNamespace(run=run, STDOUT=subprocess.STDOUT))
    monkeypatch.setattr(compare_encoders, "training_minutes", lambda fold: 2.0)
    return commands


def demo_folder(tmp_path: Path) -> Path:
    (tmp_path / "demo" / "nnUNet_raw" / DATASET).mkdir(parents=True)
    (tmp_path / "demo" / "done").mkdir()
    (tmp_path / "demo" / "done" / "plan").touch()
    return tmp_path / "demo"


def start(*words: object) -> Result:
    return CliRunner().invoke(command, [*map(str, words), "--device", "cpu"], catch_exceptions=False)


def test_encoders_are_embedded_once_and_trained_once_per_seed_each_in_its_own_folder(
    tmp_path: Path, started: list[list[str]]
):
    demo = demo_folder(tmp_path)
    words = ("--sam", "a=vit_tiny", "--sam", "b=vit_tiny", "--out", tmp_path / "out", "--demo", demo, "--stock")
    result = start(*words, "--seeds", "0,1")
    assert result.exit_code == 0, result.output
    assert sum(words[:2] == ["dgplugins", "embed"] for words in started) == 2
    trainings = [words for words in started if words[0] == "nnUNetv2_train"]
    assert len(trainings) == 4
    assert len({words[-1] for words in trainings}) == len({words[-2] for words in trainings}) == 4
    stock = [words for words in started if "--minutes" in words]
    assert [(w[w.index("--minutes") + 1], w[w.index("--seed") + 1]) for w in stock] == [("2.000", "0"), ("2.000", "1")]
    assert (tmp_path / "out" / "b" / "seed1" / "settings.yaml").read_text().count('"seed": 1') == 1
    assert "| a | mean | 0.900 | 0.300 | 0.600 | 0.450 |" in result.output
    assert (tmp_path / "out" / "table.md").read_text() in result.output
    assert len(pd.read_csv(tmp_path / "out" / "table.csv")) == 3 * 4 + 1
    count = len(started)
    start(*words, "--seeds", "0,1,2")  # one seed more: only its own steps
    assert len(started) == count + 3 * 4
    with pytest.raises(UserError, match="epochs=8, now 3"):
        start(*words, "--epochs", "3")


def test_a_time_budget_takes_the_place_of_epochs_with_the_same_seed(tmp_path: Path, started: list[list[str]]):
    words = ("--sam", "a=vit_tiny", "--out", tmp_path / "out", "--demo", demo_folder(tmp_path), "--minutes", 0.5)
    assert start(*words, "--seeds", "7").exit_code == 0
    training = next(words for words in started if "DeSAMTrainer" in words)
    assert training[1:8] == ["-m", "nnunet_dgplugins.budget", "501", "2d", "0", "--seed", "7"]
    assert training[8:10] == ["--minutes", "0.5"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--sam", "vit_tiny"), "expected LABEL=NAME"),
        (("--sam", "a/b=vit_tiny"), "expected LABEL=NAME"),
        (("--sam", "..=vit_tiny"), "expected LABEL=NAME"),
        (("--sam", "a=vit_tiny", "--sam", "a=vit_b"), "a is given twice"),
        (("--sam", "a=vit_tiny", "--seeds", "0;1"), "expected whole numbers"),
        (("--sam", "a=vit_tiny", "--epochs", "0"), "epochs"),
        (("--sam", "a=vit_tiny", "--minutes", "0"), "minutes"),
        ((), "--sam"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_made(tmp_path: Path, words: tuple[str, ...], message: str):
    result = start(*words, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "out").exists()


def test_an_unknown_encoder_and_an_unfinished_demo_are_refused(tmp_path: Path, started: list[list[str]]):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="not a finished folder"):
        start("--sam", "a=vit_tiny", "--out", tmp_path / "out", "--demo", tmp_path / "empty")
    with pytest.raises(UserError, match="did you mean 'vit_tiny'"):
        start("--sam", "a=vit_tinny", "--out", tmp_path / "out", "--demo", demo_folder(tmp_path))
    assert not started
