"""The matrix, its spread, and paired differences, from runs' files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pandas
import pytest
from PIL import Image

from nnunet_dgplugins.budget import Budget
from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.evaluation.comparison import by_class, by_seed, differences, matrix
from nnunet_dgplugins.evaluation.report.page import write_report
from nnunet_dgplugins.files import PANELS, write_json
from nnunet_dgplugins.study.definition import Data, Method, Study
from nnunet_dgplugins.study.report import read_study_results
from nnunet_dgplugins.study.results import collect, markdown, printed, write_results
from nnunet_dgplugins.study.state import State
from nnunet_dgplugins.study.tasks import Run, Task
from nnunet_dgplugins.trainers.costs import TRAINING

STUDY = Study(
    name="made",
    datasets=(Data("d", "prostate-saml", 701, ("A",), prepare="x {download}"),),
    methods=(Method("stock", "nnUNetTrainer"), Method("ours", "DeSAMTrainer")),
    budget=Budget(epochs=1),
    seeds=(0, 1),
    baseline="stock",
)
SITES = {"B": 4, "C": 2}
GAIN = {"B": 0.1, "C": 0.3}


def made(out: Path, skip: tuple[str, int] | None = None) -> list[Task]:
    """Runs of two methods and seeds whose Dice is known by hand."""
    tasks = []
    for method in ("stock", "ours"):
        for seed in (0, 1):
            folder = out / "runs" / method / str(seed)
            run = Run(method, "d", "A", None, seed, folder)
            tasks.append(Task(f"{method} {seed}", "train", ("true", method, str(seed)), run=run))
            if (method, seed) == skip:
                continue
            folder.mkdir(parents=True)
            rows = []
            for site, count in {"A": 2, **SITES}.items():
                for number in range(count):
                    value = 0.5 + 0.01 * number + 0.02 * seed + (GAIN.get(site, 0) if method == "ours" else 0)
                    rows += [
                        (f"{site}{number}", site, f"{site}/{number}", "organ", "dice", value),
                        (f"{site}{number}", site, f"{site}/{number}", "organ", "hd95", 10 * value),
                    ]
            table = pandas.DataFrame(rows, columns=["case", "site", "patient", "class", "metric", "value"])
            table[table["site"] == "A"].to_csv(folder / "source.csv", index=False)
            table[table["site"] != "A"].to_csv(folder / "unseen.csv", index=False)
    return tasks


def test_every_value_is_one_line_with_its_run(tmp_path: Path):
    table = collect(made(tmp_path))
    assert len(table) == 2 * 2 * (2 + 4 + 2) * 2
    assert set(table["split"]) == {"validation", "unseen"}
    assert not table.duplicated(["method", "seed", "case", "class", "metric"]).any()


def test_a_site_whose_name_is_a_number_is_text(tmp_path: Path):
    tasks = made(tmp_path)
    for file in tmp_path.rglob("*.csv"):
        written = pandas.read_csv(file)
        written.assign(site=written["site"].map({"A": 2012, "B": 2013, "C": 2014})).to_csv(file, index=False)
    assert set(collect(tasks)["target"]) <= {"2012", "2013", "2014"}


def test_sites_classes_and_cases_whose_names_look_like_nothing_are_text(tmp_path: Path):
    tasks = made(tmp_path)
    for file in tmp_path.rglob("*.csv"):
        written = pandas.read_csv(file)
        written["site"] = written["site"].map({"A": "NA", "B": "None", "C": "nan"})
        written = written.assign(**{"class": "null"}).replace({"case": {"B0": "NaN"}, "patient": {"B/0": None}})
        written.loc[written["case"] == "B1", "value"] = None
        written.to_csv(file, index=False)
    table = write_results(tasks, STUDY, tmp_path)
    assert set(table["target"]) == {"NA", "None", "nan"}
    assert set(table["class"]) == {"null"}
    assert (table["case"] == "NaN").sum() == table["patient"].isna().sum() == 2 * 2 * 2
    assert table["value"].isna().sum() == 2 * 2 * 2
    report = read_study_results(tmp_path)
    assert sorted(report.table["target"].unique()) == ["NA", "None", "nan"]
    pandas.testing.assert_series_equal(report.table["value"], table["value"])


def test_the_matrix_has_mean_and_spread_over_seeds(tmp_path: Path):
    lines = matrix(collect(made(tmp_path))).set_index(["method", "target"])
    # site B, stock: cases 0.50 to 0.53, seeds 0.02 apart
    assert lines.loc[("stock", "B"), "mean"] == pytest.approx(0.525)
    assert lines.loc[("stock", "B"), "sd"] == pytest.approx(0.02 / 2**0.5)
    assert lines.loc[("stock", "B"), "seeds"] == 2
    # sites weigh equally however many cases they have
    assert lines.loc[("ours", "mean unseen"), "mean"] == pytest.approx((0.525 + 0.1 + 0.515 + 0.3) / 2)
    assert lines.loc[("ours", "A"), "split"] == "validation"


def test_differences_are_paired_by_case_and_weigh_sites_equally(tmp_path: Path):
    (row,) = differences(collect(made(tmp_path)), "stock").to_dict("records")
    assert row["method"] == "ours"
    assert row["difference"] == pytest.approx(0.2)
    # the gain is the same for all cases of a site, so drawing patients changes nothing
    assert row["low"] == pytest.approx(0.2)
    assert row["high"] == pytest.approx(0.2)
    assert row["cases"] == 6


def test_an_interval_covers_the_spread_of_patients(tmp_path: Path):
    tasks = made(tmp_path)
    file = tmp_path / "runs" / "ours" / "0" / "unseen.csv"
    table = pandas.read_csv(file)
    table.loc[(table["case"] == "B3") & (table["metric"] == "dice"), "value"] -= 0.4
    table.to_csv(file, index=False)
    (row,) = differences(collect(tasks), "stock").to_dict("records")
    assert row["low"] < row["difference"] < row["high"]
    assert row["difference"] == pytest.approx(0.2 - 0.4 / 2 / 4 / 2)


def test_a_seed_that_only_one_method_has_is_not_compared(tmp_path: Path):
    (row,) = differences(collect(made(tmp_path, skip=("ours", 0))), "stock").to_dict("records")
    assert row["difference"] == pytest.approx(0.2)  # seed 1 against seed 1; both seeds' mean would give 0.21


def test_unfinished_runs_are_left_out(tmp_path: Path):
    table = collect(made(tmp_path, skip=("ours", 1)))
    counts = by_seed(table).groupby("method")["seed"].nunique().to_dict()
    assert counts == {"stock": 2, "ours": 1}
    assert "0.625 |" in markdown(table, STUDY).replace(" ± ", "±") or "0.615 |" in markdown(table, STUDY)


def test_the_files_hold_what_is_printed(tmp_path: Path):
    table = write_results(made(tmp_path), STUDY, tmp_path)
    assert len(pandas.read_csv(tmp_path / "results.csv")) == len(table)
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["differences"][0]["difference"] == pytest.approx(0.2)
    assert len(content["values"]) == len(table)
    text = (tmp_path / "results.md").read_text()
    assert "difference to stock" in text
    assert "(0.515 ± 0.014)" in text  # the source's own cases stand in brackets
    assert "+0.200 [+0.200, +0.200]" in text


def test_a_report_is_made_of_what_is_finished_wherever_the_folder_lies_now(tmp_path: Path):
    out = tmp_path / "here"
    tasks = []
    for task in made(out):
        run = task.run
        assert run
        fold = run.folder / "results" / "Trainer__nnUNetPlans__2d" / "fold_0"
        placed = replace(
            run, stages=(fold.parent.parent / "Earlier" / "fold_0", fold), predictions=run.folder / "predictions",
            raw=out / "raw", bound=run.method == "ours",
        )  # fmt: skip
        tasks.append(replace(task, run=placed))
        State(out).set(tasks[-1], "done", 90.0)
        curves = {"train_losses": [1.0, 0.5], "val_losses": [1.1, 0.7], "ema_fg_dice": [0.1, 0.4]}
        memory = {"peak_memory_bytes": 3 << 30, "peak_gpu_memory_bytes": None}
        for stage in placed.stages:
            write_json(stage / TRAINING, {"minutes": 2.5, **memory, "curves": curves})
        block = {"2d": {"dgplugins": {"Trainer": {"rate": 0.1}}}}
        write_json(fold.parent / "plans.json", {"configurations": block})
    write_results(tasks, STUDY, out)
    moved = out.rename(tmp_path / "there")
    report = read_study_results(moved)
    assert (report.title, report.baseline, report.metric, report.budget) == ("made", "stock", "dice", "1 epochs")
    assert len(report.entries) == 4
    costs = report.entries[0].costs
    assert (costs.minutes, costs.memory, costs.gpu_memory) == (5.0, 3 << 30, None)  # both stages
    assert costs.disk
    assert report.entries[0].settings == {"rate": 0.1}
    page = write_report(report, tmp_path / "report.html")[-1].read_text()
    for text in ("made images", "Learning curves", "5.0 min", "3.0 GiB", "2/0/0", "+0.200", "0.625 ±", "1 setting"):
        assert text in page
    assert "best mean on unseen sites 0.520 (stock, Dice)" in page  # a bound is never called the best
    content = json.loads((moved / "results.json").read_text())
    (moved / "results.json").write_text(json.dumps({**content, "format": 1}))
    with pytest.raises(UserError, match="Run the study again"):
        read_study_results(moved)


def test_panels_stand_with_the_method_that_drew_them_and_with_the_one_that_learnt_from_them(tmp_path: Path):
    tasks = []
    for task in made(tmp_path):
        run = task.run
        assert run
        teaches = run.method == "stock"
        raw = tmp_path / ("raw" if teaches else f"pseudo{run.seed}")
        fold = run.folder / "nnUNet_results" / "Dataset701_d" / f"{run.method}__nnUNetPlans__2d" / "fold_0"
        placed = replace(run, raw=raw, stages=(fold,), predictions=run.folder / "predictions")
        tasks.append(replace(task, run=placed))
        State(tmp_path).set(tasks[-1], "done", 1.0)
        origin = {} if teaches else {"pseudo_labels": {"model": "Dataset701_d/stock__nnUNetPlans__2d/fold_0/x.pth"}}
        write_json(
            raw / "dataset.json", {"file_ending": ".png", "labels": {"organ": 1}, "dgplugins": {"protocol": origin}}
        )
        if not teaches:
            Image.new("L", (60, 60)).save(raw / PANELS)
    write_results(tasks, STUDY, tmp_path)
    report = read_study_results(tmp_path)
    pages = {(entry.method, entry.seed): (entry.panels, entry.drawn) for entry in report.entries}
    for seed in (0, 1):
        assert pages["ours", seed] == (tmp_path / f"pseudo{seed}" / PANELS, None)
        assert pages["stock", seed] == (None, tmp_path / f"pseudo{seed}" / PANELS)
    page = write_report(report, tmp_path / "report.html")[-1].read_text()
    assert "Drawn by stock." in page
    assert "What ours learnt from." in page
    assert "cases without a picture: 5 whose prediction is not in its folder." in page  # 3 + 2


def test_nothing_finished_gives_an_empty_table(tmp_path: Path):
    tasks = [Task("t", "train", ("true",), run=Run("stock", "d", "A", None, 0, tmp_path / "none"))]
    assert write_results(tasks, STUDY, tmp_path).empty


def real(protocol: str, tmp_path: Path, **changes: object) -> Study:
    """The made study as if it ran on the public download, trained on RUNMC."""
    data = Data("d", "prostate-saml", 701, ("RUNMC",), download=str(tmp_path))
    return replace(STUDY, datasets=(replace(data, **changes),), protocol=protocol)  # type: ignore[arg-type]


def protocol_table(tmp_path: Path, metric: str) -> pandas.DataFrame:
    table = collect(made(tmp_path)).replace({"A": "RUNMC", "B": "BMC", "C": "HK"})
    return table.replace({"metric": {"dice": metric}})


def test_published_numbers_stand_beside_ours_where_data_and_protocol_are_the_papers(tmp_path: Path):
    text = markdown(protocol_table(tmp_path, "dice_samsdg"), real("samsdg", tmp_path))
    (line,) = [line for line in text.splitlines() if "SAM-SDG, Table 1 (published)" in line]
    assert "| 0.841 |" in line
    assert line.startswith("| RUNMC |")
    assert "epoch chosen on the mean Dice of the target sites" in text  # the caveat comes along
    (line,) = [line for line in text.splitlines() if "SAM-SDG, theta2 0.5; best epoch 80" in line]
    assert "| 0.884 | 0.893 | - | 0.841 |" in line  # BMC, HK, the source itself, mean


def test_desams_published_number_stands_in_the_pooled_column(tmp_path: Path):
    (one,) = printed(protocol_table(tmp_path, "dice_desam"), real("desam", tmp_path))
    where = one.heading.index("pooled unseen")
    values = {row[1]: row[where] for row in one.rows}
    assert values["stock"].startswith("0.522")  # all six cases as one group: (4 * 0.525 + 2 * 0.515) / 6
    assert values["DeSAM-P, grid of points; column A, main results (published)"] == "0.828"
    assert one.rows[-1][one.heading.index("mean unseen")] == "-"


@pytest.mark.parametrize("changes", [{"download": None, "prepare": "make {download}"}, {"convert": "simulated-vendors"},
                                     {"ratios": (0.5,)}, {"options": ("--exclude", "BMC_Case01")}])  # fmt: skip
def test_made_images_are_never_compared_with_papers(tmp_path: Path, changes: dict[str, object]):
    study = real("samsdg", tmp_path, **changes)
    assert "(published)" not in markdown(protocol_table(tmp_path, "dice_samsdg"), study)


def test_another_protocol_is_never_compared_with_papers(tmp_path: Path):
    assert "(published)" not in markdown(protocol_table(tmp_path, "dice"), real("standard", tmp_path))


def test_cases_that_train_are_never_called_held_out(tmp_path: Path):
    folds = tmp_path / "splits_final.json"
    folds.write_text(json.dumps([{"train": ["A0"], "val": ["A0"], "validates_on": "training cases"}]))
    tasks = [replace(task, run=replace(task.run, folds=folds)) for task in made(tmp_path) if task.run]
    table = collect(tasks)
    assert set(table["split"]) == {"training", "unseen"}
    text = markdown(table, STUDY)
    assert "(0.515 ± 0.014)" in text
    assert "In brackets: the source's labelled training cases." in text
    folds.write_text(json.dumps([{"train": ["A0"], "val": ["A1"]}]))
    assert "In brackets: the source's held-out cases." in markdown(collect(tasks), STUDY)


def test_simulated_sites_are_called_so_in_every_table(tmp_path: Path):
    data = replace(STUDY.datasets[0], convert="simulated-vendors")
    write_results(made(tmp_path), replace(STUDY, datasets=(data,)), tmp_path)
    assert "### d, SIMULATED sites" in (tmp_path / "results.md").read_text()
    assert "SIMULATED" in json.loads((tmp_path / "results.json").read_text())["datasets"]["d"]


# ---------------------------------------------------------------- numbers over all pixels

PIXELS = replace(STUDY, protocol="dcam", datasets=(Data("d", "luad-histoseg", 701, prepare="x {download}"),))
#: method: case: pixels right, of 10 of each of two classes; what is wrong is predicted as the other class
RIGHT = {"stock": {"B0": (5, 5), "B1": (5, 5)}, "ours": {"B0": (10, 10), "B1": (7, 9)}}


def counted(out: Path, seeds: dict[str, tuple[int, ...]] | None = None) -> list[Task]:
    """Runs of two methods whose pixels are known by hand; the second seed of ours is the first one's mirror."""
    tasks = []
    for method, cases in RIGHT.items():
        for seed in (seeds or {}).get(method, (0, 1)):
            folder = out / "runs" / method / str(seed)
            folder.mkdir(parents=True)
            rows: list[tuple[object, ...]] = []
            for case, (first, second) in cases.items():
                for name, right, other in (("x", first, second), ("y", second, first)):
                    values = (right, 10, right + 10 - other)
                    rows += [
                        (case, "B", case, name, f"pixels_{count}", value)
                        for count, value in zip(("right", "truth", "predicted"), values, strict=True)
                    ]
            rows.append(("", "B", "", "all classes", "miou", 0.123))  # what `evaluate` says of the site is not read
            table = pandas.DataFrame(rows, columns=["case", "site", "patient", "class", "metric", "value"])
            table.to_csv(folder / "unseen.csv", index=False)
            run = Run(method, "d", "all", None, seed, folder)
            tasks.append(Task(f"{method} {seed}", "train", ("true", method, str(seed)), run=run))
    return tasks


def test_the_matrix_of_pixels_is_pooled_over_a_sites_patches(tmp_path: Path):
    table = collect(counted(tmp_path))
    lines = matrix(table, "miou").set_index(["method", "target"])
    assert lines.loc[("stock", "B"), "mean"] == pytest.approx(10 / 30)
    ours = (17 / (20 + 18 - 17) + 19 / (20 + 22 - 19)) / 2  # not the mean of the two patches
    for target in ("B", "mean unseen", "pooled unseen"):
        assert lines.loc[("ours", target), "mean"] == pytest.approx(ours)
    assert lines.loc[("ours", "B"), "seeds"] == 2
    accuracy = matrix(table, "acc").set_index(["method", "target"])
    assert accuracy.loc[("ours", "B"), "mean"] == pytest.approx(36 / 40)


def test_differences_of_pixels_draw_patients_and_pair_seeds(tmp_path: Path):
    (row,) = differences(collect(counted(tmp_path, {"ours": (1,)})), "stock", "miou").to_dict("records")
    pooled = (17 / 21 + 19 / 23) / 2 - 1 / 3
    assert row["difference"] == pytest.approx(pooled)
    assert row["cases"] == 2
    # drawing one patient twice gives the ends
    assert row["low"] == pytest.approx((7 / (10 + 8 - 7) + 9 / (10 + 12 - 9)) / 2 - 1 / 3)
    assert row["high"] == pytest.approx(1 - 1 / 3)
    assert differences(collect(counted(tmp_path / "b", {"ours": (1,), "stock": (0,)})), "stock", "miou").empty


def test_differences_of_pixels_are_of_the_cases_that_both_methods_have(tmp_path: Path):
    table = collect(counted(tmp_path))
    lone = table[~((table["method"] == "stock") & (table["case"] == "B1"))]
    (row,) = differences(lone, "stock", "miou").to_dict("records")
    assert row["difference"] == pytest.approx(1 - 1 / 3)  # case B0 alone
    assert row["cases"] == 1
    assert row["low"] != row["low"]  # one patient has no spread
    half = table[~((table["method"] == "stock") & (table["case"] == "B1") & (table["seed"] == 1))]
    (row,) = differences(half, "stock", "miou").to_dict("records")
    pooled = (17 / 21 + 19 / 23) / 2
    assert row["difference"] == pytest.approx((pooled + 1) / 2 - 1 / 3)  # both cases of seed 0, one of seed 1


def test_classes_of_pixels_are_told_apart_by_site(tmp_path: Path):
    lines = by_class(collect(counted(tmp_path)), ["iou"]).set_index(["method", "target", "class"])
    assert lines.loc[("stock", "B", "x"), "mean"] == pytest.approx(1 / 3)
    assert lines.loc[("ours", "B", "x"), "mean"] == pytest.approx(17 / 21)
    assert lines.loc[("ours", "B", "y"), "mean"] == pytest.approx(19 / 23)
    assert lines.loc[("ours", "B", "x"), "seeds"] == 2


def test_the_table_of_a_dcam_study_shows_miou(tmp_path: Path):
    write_results(counted(tmp_path), PIXELS, tmp_path)
    text = (tmp_path / "results.md").read_text()
    assert "| all | stock | 0.333 ± 0.000 |" in text
    assert "| all | ours | 0.818 ± 0.000 |" in text


def test_a_dcam_study_has_a_report_also_before_it_is_finished(tmp_path: Path):
    tasks = counted(tmp_path)
    begun = Run("begun", "d", "all", None, 0, tmp_path / "runs" / "begun" / "0", raw=tmp_path, predictions=tmp_path)
    tasks = [replace(task, run=replace(task.run, raw=tmp_path, predictions=tmp_path)) for task in tasks if task.run]
    tasks.append(Task("begun 0", "train", ("true",), run=begun))
    for task in tasks:
        State(tmp_path).set(task, "done", 1.0)
    assert collect(tasks)["case"].notna().all()
    write_results(tasks, PIXELS, tmp_path)
    page = write_report(read_study_results(tmp_path), tmp_path / "report.html")[-1].read_text()
    assert "0.333" in page


def test_images_that_are_cut_from_real_ones_are_not_called_made(tmp_path: Path):
    table = collect(made(tmp_path))
    real = replace(STUDY, datasets=(replace(STUDY.datasets[0], made=False),))
    assert "made images" in markdown(table, STUDY)
    assert "made images" not in markdown(table, real)
