"""A study file is read whole and refused whole."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from nnunet_dgplugins.budget import Budget
from nnunet_dgplugins.errors import BadInput, UserError
from nnunet_dgplugins.registry import TRAINERS
from nnunet_dgplugins.study.file import read_study, stock_trainers
from nnunet_dgplugins.study.tasks import Task, expand, refuse_taken_ids

GOOD = {
    "datasets": {
        "phantom": {
            "convert": "prostate-saml",
            "prepare": "python -m nnunet_dgplugins.phantom {download}",
            "first_id": 701,
            "sources": ["RUNMC", "BMC"],
        }
    },
    "methods": {
        "stock": {"trainer": "nnUNetTrainer"},
        "ResEnc M": {"trainer": "nnUNetTrainer", "plans": "nnUNetResEncUNetMPlans"},
        "DeSAM box": {"trainer": "DeSAMTrainer", "settings": {"field_of_view": "source"}},
    },
    "baseline": "stock",
    "seeds": [0, 1],
    "budget": {"minutes": 1.5},
}


def written(folder: Path, **changes: object) -> Path:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({**GOOD, **changes}, sort_keys=False))
    return path


def tasks_of(folder: Path, **changes: object) -> list[Task]:
    return expand(read_study(written(folder, **changes)), folder / "out", "cpu")


def test_a_good_file_is_read(tmp_path: Path):
    study = read_study(written(tmp_path))
    assert (study.name, study.seeds, study.baseline) == ("study", (0, 1), "stock")
    assert study.budget == Budget(minutes=1.5)
    assert study.budget.words() == ["--minutes", "1.5"]
    assert study.datasets[0].variants() == [("RUNMC", None, 701), ("BMC", None, 702)]
    assert dict(study.methods[2].settings) == {"field_of_view": "source"}


def test_every_problem_is_listed_at_once(tmp_path: Path):
    datasets = {
        "a": {"convert": "prostate-sml", "download": "nowhere", "first_id": 999, "sources": ["RUNMC", "BMC"]},
        "b": {"convert": "prostate-maxstyle", "first_id": 999, "sources": ["Oslo"], "ratios": [2.0], "extra": 1},
        "c": {"convert": "prostate-saml", "prepare": "make it", "first_id": "ten", "sources": ["UCL"]},
        "d": {
            "convert": "prostate-saml",
            "download": "$NOT_SET_AT_ALL/x",
            "first_id": 5,
            "sources": ["UCL", "ucl"],
            "spacing": [3.0, 1.0],
        },
    }
    methods = {
        "one": {"trainer": "DeSAMTraner", "plans": "nnUNetPlan"},
        "two": {"trainer": "nnUNetTrainer", "settings": {"sam": "vit_b"}},
        "three": {"trainer": "DeSAMTrainer", "settings": {"epochs": 3, "smm": 1, "grid_size": 0}},
        "four": {},
        "six": {"trainer": "DeSAMTrainer", "batch_size": 2},
        "seven": {"trainer": "nnUNetTrainer", "batch_size": 0},
    }
    path = written(
        tmp_path, datasets=datasets, methods=methods, budget={"minutes": 1, "epochs": 2}, seeds=[1, 1], baseline="five",
        device="gpu", protocol="dessam", jobs=3,
    )  # fmt: skip
    with pytest.raises(BadInput) as error:
        read_study(path)
    text = str(error.value)
    for part in (
        "no converter 'prostate-sml'; did you mean 'prostate-saml'?",
        "no folder",
        "id 1000 for a BMC; expected 1 to 999",
        "unknown site 'Oslo'",
        "has no --ratio",
        "shares above 0",
        "unknown key 'extra'",
        "exactly one of them",
        "'ten'; expected whole number",
        "NOT_SET_AT_ALL not set",
        "different sites",
        "[3.0, 1.0]; expected three lengths in mm",
        "no trainer 'DeSAMTraner'; did you mean 'DeSAMTrainer'?",
        "no plans 'nnUNetPlan'; did you mean 'nnUNetPlans'?",
        "nnUNetTrainer is not of this package",
        "epochs=3",
        "unknown setting 'smm'",
        "grid_size",
        "method four: no trainer",
        "method six: --batch-size 2; expected settings of DeSAMTrainer",
        "method seven, batch_size, patch_size, width_divisor: 0; expected 1 or more",
        "exactly one of minutes, epochs and iterations",
        "different whole numbers",
        "no method 'five'",
        "auto, cpu, cuda or mps",
        "no protocol 'dessam'; did you mean 'desam'?",
        "unknown key 'jobs'",
    ):
        assert part in text, part


@pytest.mark.parametrize("budget", [None, {}, {"minutes": 0}, {"epochs": -1}, {"epochs": 1.5}, {"hours": 1}])
def test_an_impossible_budget_is_refused(tmp_path: Path, budget: object):
    with pytest.raises(BadInput, match="budget"):
        read_study(written(tmp_path, budget=budget))


def test_something_else_than_a_study_is_refused(tmp_path: Path):
    (tmp_path / "a.yaml").write_text("- 1\n")
    with pytest.raises(UserError, match="expected a mapping"):
        read_study(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text("a: [")
    with pytest.raises(UserError, match="cannot be read"):
        read_study(tmp_path / "b.yaml")


def test_stock_trainers_are_found_without_importing_them():
    assert {"nnUNetTrainer", "nnUNetTrainerDA5"} <= stock_trainers()


def test_every_task_comes_behind_what_it_needs_and_has_a_name_of_its_own(tmp_path: Path):
    tasks = tasks_of(tmp_path)
    seen: set[str] = set()
    for task in tasks:
        assert set(task.needs) <= seen
        seen.add(task.key)
    assert len({task.name for task in tasks}) == len(tasks)
    kinds = [task.kind.split()[0] for task in tasks]
    # 2 sources x (3 methods x 2 seeds), and per source two plans, one configure, one embed
    assert [kinds.count(kind) for kind in ("prepare", "convert", "train", "predict", "evaluate")] == [1, 2, 12, 12, 24]
    assert [kinds.count(kind) for kind in ("plan", "preprocess", "configure", "embed")] == [4, 0, 2, 2]


def test_data_that_others_read_is_not_written_again(tmp_path: Path):
    """ResEnc presets share the first plans' data of 2d and 3d_fullres; other configurations have data of their own."""
    for configuration, count in (("2d", 0), ("3d_fullres", 0), ("3d_lowres", 2)):
        methods = {name: method for name, method in GOOD["methods"].items() if name != "DeSAM box"}
        tasks = tasks_of(tmp_path, configuration=configuration, methods=methods)
        assert sum(task.kind == "preprocess" for task in tasks) == count


def test_ids_that_moved_are_refused_before_anything_runs(tmp_path: Path):
    first = tasks_of(tmp_path)
    for raw in {task.run.raw for task in first if task.run}:
        raw.mkdir(parents=True)
    refuse_taken_ids(tasks_of(tmp_path))
    refuse_taken_ids(tasks_of(tmp_path, seeds=[0, 1, 2]))
    data = {"phantom": {**GOOD["datasets"]["phantom"], "sources": ["HK", "RUNMC", "BMC"]}}
    with pytest.raises(
        UserError, match=r"Dataset701_ProstateSAML_HK would get the id of Dataset701_ProstateSAML_RUNMC"
    ):
        refuse_taken_ids(tasks_of(tmp_path, datasets=data))


@pytest.mark.parametrize(
    ("prepare", "said"), [("sh -c 'cp {download}", "No closing quotation"), ("make", "{download} where the folder's")]
)
def test_a_command_that_no_shell_reads_is_refused(tmp_path: Path, prepare: str, said: str):
    data = {"phantom": {**GOOD["datasets"]["phantom"], "prepare": prepare}}
    with pytest.raises(BadInput, match=said):
        read_study(written(tmp_path, datasets=data))


def test_braces_of_a_shell_stay_in_a_command(tmp_path: Path):
    data = {"phantom": {**GOOD["datasets"]["phantom"], "prepare": "sh -c 'cp /x/{a,b} {download}'"}}
    (prepare,) = [task for task in tasks_of(tmp_path, datasets=data) if task.kind == "prepare"]
    assert prepare.command[2].startswith("cp /x/{a,b} /")


def test_every_source_and_method_has_its_first_seed_before_any_has_its_second(tmp_path: Path):
    seeds = [task.run.seed for task in tasks_of(tmp_path) if task.run]
    assert seeds == sorted(seeds)
    assert set(seeds) == {0, 1}


def test_a_changed_setting_changes_only_what_depends_on_it(tmp_path: Path):
    methods = {**GOOD["methods"], "DeSAM box": {"trainer": "DeSAMTrainer", "settings": {"field_of_view": "slice"}}}
    before, after = ({task.name: task.key for task in tasks_of(tmp_path, **c)} for c in ({}, {"methods": methods}))
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {name for name in before if "DeSAM box" in name}


def test_another_budget_trains_again_and_converts_nothing_again(tmp_path: Path):
    before, after = ({task.name: task for task in tasks_of(tmp_path, **c)} for c in ({}, {"budget": {"epochs": 2}}))
    changed = {task.kind.split()[0] for name, task in before.items() if task.key != after[name].key}
    assert changed == {"train", "predict", "evaluate"}


def test_another_seed_adds_runs_and_leaves_the_others(tmp_path: Path):
    before, after = ({task.key for task in tasks_of(tmp_path, seeds=seeds)} for seeds in ([0, 1], [0, 1, 2]))
    assert before < after


def test_commands_are_stock_nnunets_and_ours(tmp_path: Path):
    words = {task.command[0] for task in tasks_of(tmp_path)}
    assert {Path(word).name.rstrip("0123456789.") for word in words} == {
        "python", "dgplugins", "nnUNetv2_plan_and_preprocess", "nnUNetv2_plan_experiment", "nnUNetv2_predict",
    }  # fmt: skip
    train = next(task for task in tasks_of(tmp_path) if task.kind == "train stock")
    assert train.typed.startswith("nnUNet_raw=")
    assert train.typed.endswith("nnunet_dgplugins.budget 701 2d 0 -tr nnUNetTrainer -p nnUNetPlans -device cpu "
                                "--minutes 1.5 --seed 0")  # fmt: skip


def test_a_papers_protocol_reaches_the_evaluations_and_keeps_the_others_results(tmp_path: Path):
    standard, desam = tasks_of(tmp_path), tasks_of(tmp_path, protocol="desam")
    before, after = ([task for task in tasks if task.kind == "evaluate"] for tasks in (standard, desam))
    assert all(task.command[-2:] == ("--protocol", "desam") for task in after)
    assert not {task.run.folder for task in before if task.run} & {task.run.folder for task in after if task.run}
    trainings = [{task.key for task in tasks if task.kind.startswith("train")} for tasks in (standard, desam)]
    assert trainings[0] == trainings[1]


def test_a_coarser_spacing_reaches_every_planner_and_is_other_data(tmp_path: Path):
    coarse = {"phantom": {**GOOD["datasets"]["phantom"], "spacing": [10, 2.5, 2.5]}}  # type: ignore[index]
    fine, tasks = tasks_of(tmp_path), tasks_of(tmp_path, datasets=coarse)
    plans = [task for task in tasks if task.kind in ("plan", "plan again")]
    assert len(plans) == 4
    assert all(task.command[-4:] == ("-overwrite_target_spacing", "10", "2.5", "2.5") for task in plans)
    assert not {task.key for task in fine} & {task.key for task in tasks}


def test_smaller_batches_patches_and_networks_are_plans_of_their_own(tmp_path: Path):
    smaller = {"batch_size": 2, "patch_size": [64, 48], "width_divisor": 4}
    methods = {
        **GOOD["methods"],  # type: ignore[dict-item]
        "ResEnc M": {**GOOD["methods"]["ResEnc M"], **smaller},  # type: ignore[index]
        "EPL": {"trainer": "EPLTrainer", "settings": {"cps_weight": 2}, **smaller},
    }
    tasks = tasks_of(tmp_path, methods=methods)
    words = ("--batch-size", "2", "--patch-size", "64 48", "--width-divisor", "4")
    both = next(task for task in tasks if "EPL" in task.name and task.kind == "configure")
    assert both.command[-10:] == (*words, "-tr", "EPLTrainer", "--set", "cps_weight=2")
    configure = next(task for task in tasks if "ResEnc M" in task.name and task.kind == "configure")
    assert configure.command[-6:] == words
    train = next(task for task in tasks if task.kind == "train ResEnc M")
    assert train.command[train.command.index("-p") + 1] == configure.command[configure.command.index("-o") + 1]
    assert train.needs == (configure.key,)


def test_an_earlier_stage_is_trained_first_in_the_same_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    before = tasks_of(tmp_path)
    monkeypatch.setitem(TRAINERS, "DeSAMTrainer", replace(TRAINERS["DeSAMTrainer"], after="DeSAMGridTrainer"))
    tasks = tasks_of(tmp_path)
    assert len(tasks) == len(before) + 2 * 2  # sources x seeds
    first = next(task for task in tasks if task.kind == "train stage 1 DeSAM box")
    second = next(task for task in tasks if task.kind == "train DeSAM box")
    assert first.command[first.command.index("-tr") + 1] == "DeSAMGridTrainer"
    assert second.needs == (first.key,)
    assert first.environment["nnUNet_results"] == second.environment["nnUNet_results"]
    assert not any(task.kind == "predict DeSAM box" and first.key in task.needs for task in tasks)


def test_a_download_may_be_made_by_several_commands_in_order(tmp_path: Path):
    commands = ["python -m nnunet_dgplugins.phantom {download}", "touch {download}/ready"]
    datasets = {"phantom": {**GOOD["datasets"]["phantom"], "prepare": commands}}  # type: ignore[index]
    tasks = {task.name.removeprefix("phantom: "): task for task in tasks_of(tmp_path, datasets=datasets)}
    first, second = tasks["prepare"], tasks["prepare 2"]
    assert second.command == ("touch", f"{first.command[-1]}/ready")
    assert (first.needs, second.needs) == ((), (first.key,))
    assert tasks["convert RUNMC"].needs == (second.key,)
    wrong = {"phantom": {**datasets["phantom"], "prepare": [commands[0], "touch ready"]}}
    with pytest.raises(BadInput, match="touch ready"):
        tasks_of(tmp_path, datasets=wrong)


SAMSDG = {
    "stock": {"trainer": "nnUNetTrainer"},
    "SAM-SDG": {"trainer": "SAMSDGTrainer", "earlier_share": 0.25, "four_slices": True},
    "true boxes": {"trainer": "SAMSDGTrainer", "settings": {"boxes": "masks"}, "four_slices": True},
}


def test_two_stages_may_share_the_budget_and_slices_a_canvas(tmp_path: Path):
    tasks = {task.name.removeprefix("phantom: "): task for task in tasks_of(tmp_path, methods=SAMSDG)}
    minutes = {
        name: task.command[task.command.index("--minutes") + 1]
        for name, task in tasks.items()
        if name.startswith("train") and name.endswith("RUNMC SAM-SDG seed 0")
    }
    assert minutes == {"train stage 1 RUNMC SAM-SDG seed 0": "0.375", "train RUNMC SAM-SDG seed 0": "1.125"}
    runs = {task.run.method: task.run for task in tasks.values() if task.run}
    assert [fold.parent.name.split("__")[0] for fold in runs["SAM-SDG"].stages] == [
        "SAMSDGCoarseTrainer",
        "SAMSDGTrainer",
    ]
    assert [name for name, run in runs.items() if run.bound] == ["true boxes"]
    plain, bound = (tasks[f"predict RUNMC {name} seed 1"].command for name in ("SAM-SDG", "true boxes"))
    assert plain[:2] == bound[:2] == ("dgplugins", "predict")
    assert "--masks" not in plain
    assert bound[bound.index("--masks") + 1].endswith("labelsTs")
    assert tasks["predict RUNMC stock seed 1"].command[0] == "nnUNetv2_predict"
    assert not any(name.startswith("embed") for name in tasks)  # its trainer puts canvases together itself
    both = [tasks_of(tmp_path, methods={**SAMSDG, "SAM-SDG": {**SAMSDG["SAM-SDG"], "earlier_share": share}})
            for share in (0.25, 0.5)]  # fmt: skip
    first, other = ({task.key for task in tasks if "train RUNMC SAM-SDG seed 0" in task.name} for tasks in both)
    assert not first & other


def test_shares_and_canvases_belong_to_trainers_that_have_them(tmp_path: Path):
    methods = {
        "stock": {"trainer": "nnUNetTrainer", "earlier_share": 0.5, "four_slices": True},
        "all of it": {"trainer": "SAMSDGTrainer", "earlier_share": 1.0},
        "true boxes": {"trainer": "SAMSDGTrainer", "settings": {"boxes": "masks"}},
    }
    with pytest.raises(BadInput) as error:
        read_study(written(tmp_path, methods=methods))
    text = str(error.value)
    assert "method stock, earlier_share: nnUNetTrainer has no stage before" in text
    assert "method stock, four_slices: nnUNetTrainer sees one slice at a time" in text
    assert "method all of it, earlier_share: 1.0" in text
    assert "method true boxes, boxes: masks, and nnUNetv2_predict takes none" in text


def test_predictions_with_and_without_mirroring_do_not_meet(tmp_path: Path):
    outs = [
        {task.command[task.command.index("-o") + 1] for task in tasks_of(tmp_path, mirroring=mirroring)
         if task.kind.startswith("predict")}
        for mirroring in (True, False)
    ]  # fmt: skip
    assert len(outs[0]) == len(outs[1]) > 0
    assert not outs[0] & outs[1]


def test_the_studies_that_come_along_are_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("RANDOM_SAM", "/somewhere/random.safetensors")
    monkeypatch.setenv("DGPLUGINS_SAMPLE_DATA", str(tmp_path))
    files = sorted((Path(__file__).parents[2] / "studies").glob("*.yaml"))
    studies = {file.stem: read_study(file) for file in files}
    assert list(studies) == ["dcam", "demo", "desam", "encoders", "epl", "equivariant", "samsdg", "samsdg_full"]
    for study in studies.values():
        assert len(expand(study, tmp_path, "cpu")) > len(study.methods) * len(study.seeds)
    assert studies["encoders"].methods[1].settings["sam"] == "vit_tiny:/somewhere/random.safetensors"


def test_the_full_study_of_samsdg_is_the_short_one_with_every_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DGPLUGINS_SAMPLE_DATA", str(tmp_path))
    folder = Path(__file__).parents[2] / "studies"
    short, full = (yaml.safe_load((folder / f"{name}.yaml").read_text()) for name in ("samsdg", "samsdg_full"))
    beds = [
        {name: {**bed, "sources": None, "spacing": None} for name, bed in study.pop("datasets").items()}
        for study in (short, full)
    ]
    assert full == short
    assert beds[0] == beds[1]
    datasets = read_study(folder / "samsdg_full.yaml").datasets
    assert [len(bed.sources) for bed in datasets] == [6, 4]


# ---------------------------------------------------------------- tags and pseudo labels

LESIONS = {
    "datasets": {
        "lesions": {
            "convert": "brats",
            "prepare": "python -m nnunet_dgplugins.lesion_phantom {download}",
            "first_id": 740,
            "options": ["--modalities", "T1,T2"],
        }
    },
    "methods": {
        "CAM": {"trainer": "EquivariantCAMTrainer", "settings": {"width_divisor": 4}},
        "stage 2": {"trainer": "nnUNetTrainer", "pseudo_labels": "CAM", "pseudo_options": ["--threshold", "0.4"]},
    },
    "baseline": "CAM",
    "seeds": [0, 1],
    "budget": {"iterations": 10},
}


def lesions(folder: Path, **changes: object) -> list[Task]:
    path = folder / "lesions.yaml"
    path.write_text(yaml.safe_dump({**LESIONS, **changes}, sort_keys=False))
    return expand(read_study(path), folder / "out", "cpu")


def test_a_dataset_of_tags_is_converted_without_sites_and_scored_against_the_masks_kept_apart(tmp_path: Path):
    tasks = {task.name.removeprefix("lesions: "): task for task in lesions(tmp_path)}
    assert "--source" not in tasks["convert all"].command
    assert tasks["convert all"].command[-2:] == ("--modalities", "T1,T2")
    raw = "nnUNet_raw/Dataset740_BraTS2019_T1-T2_tags"
    source, predict = tasks["evaluate source all CAM seed 0"].typed, tasks["predict all CAM seed 0"].typed
    assert f"{raw}/labelsVal" in source
    assert "fold_0/validation_cam" in source
    assert f"{raw}/imagesTs" in predict


def test_pseudo_labels_are_a_dataset_of_each_seed_behind_the_training_they_come_from(tmp_path: Path):
    tasks = lesions(tmp_path)
    names = [task.name.removeprefix("lesions: ") for task in tasks]
    known = {task.key for task in tasks}
    done: set[str] = set()
    for task in tasks:
        assert set(task.needs) <= done, task.name  # each behind those it needs
        done.add(task.key)
    assert done == known
    for seed, number in ((0, 741), (1, 742)):
        made = tasks[names.index(f"pseudo-labels all stage 2 seed {seed}")]
        assert made.needs == (tasks[names.index(f"train all CAM seed {seed}")].key,)
        assert ("--out", str(number)) == made.command[made.command.index("--out") :][:2]
        assert made.command[-2:] == ("--threshold", "0.4")
        train = tasks[names.index(f"train all stage 2 seed {seed}")]
        assert train.needs == (tasks[names.index(f"plan all stage 2 seed {seed}")].key,)
        assert str(number) in train.command
        source = tasks[names.index(f"evaluate source all stage 2 seed {seed}")].typed
        assert f"Dataset{number}_BraTS2019_T1-T2_tags_pseudo/labelsVal" in source
        assert "fold_0/validation " in source


def test_methods_of_masks_and_of_tags_are_not_mixed_up(tmp_path: Path):
    methods = {
        "stock": {"trainer": "nnUNetTrainer"},
        "early": {"trainer": "nnUNetTrainer", "pseudo_labels": "CAM", "plans": "nnUNetResEncUNetMPlans"},
        "CAM": {"trainer": "EquivariantCAMTrainer"},
        "loose": {"trainer": "EquivariantCAMTrainer", "pseudo_options": ["--threshold", "0.4"]},
    }
    with pytest.raises(BadInput) as error:
        lesions(tmp_path, methods=methods)
    text = str(error.value)
    assert "nnUNetTrainer learns from masks, and brats has tags" in text
    assert "a method of tags named before it" in text
    assert "nnU-Net's own plans" in text
    assert "pseudo_labels too" in text
    with pytest.raises(BadInput, match="not every dataset has them"):
        tasks_of(tmp_path, methods={"stock": {"trainer": "nnUNetTrainer"}, "CAM": {"trainer": "EquivariantCAMTrainer"}})
    with_masks = {"lesions": {**LESIONS["datasets"]["lesions"], "options": ["--supervision", "masks"]}}
    twin = lesions(tmp_path, datasets=with_masks, methods={"stock": {"trainer": "nnUNetTrainer"}}, baseline="stock")
    assert any("Dataset740_BraTS2019_T1-T2_masks/labelsTr" in task.typed for task in twin)
    with pytest.raises(BadInput, match="splits its cases itself"):
        lesions(tmp_path, datasets={"lesions": {**LESIONS["datasets"]["lesions"], "sources": ["CBICA"]}})


# ---------------------------------------------------------------- two stages, and the ceiling

TISSUE = {
    "datasets": {
        "tissue": {
            "convert": "luad-histoseg",
            "prepare": "python -m nnunet_dgplugins.histology_phantom {download}",
            "first_id": 770,
            "options": ["--target", "bcss-wsss={download}_target"],
            "masks": ["--supervision", "masks", "--train-masks", "{download}/train_masks"],
        }
    },
    "methods": {
        "stage 1": {"trainer": "DCAMClassifierTrainer", "settings": {"width_divisor": 32}},
        "stage 2": {
            "trainer": "DCAMTrainer",
            "settings": {"network": "planned"},
            "earlier_settings": {"width_divisor": 16},
            "width_divisor": 4,
        },
        "stock": {"trainer": "nnUNetTrainer", "pseudo_labels": "stage 1", "width_divisor": 4},
        "ceiling": {"trainer": "nnUNetTrainer", "masks": True, "width_divisor": 4},
    },
    "baseline": "stock",
    "protocol": "dcam",
    "seeds": [0, 1],
    "budget": {"iterations": 10},
}


def tissue(folder: Path, **changes: object) -> dict[str, Task]:
    path = folder / "tissue.yaml"
    path.write_text(yaml.safe_dump({**TISSUE, **changes}, sort_keys=False))
    return {task.name.removeprefix("tissue: "): task for task in expand(read_study(path), folder / "out", "cpu")}


def test_both_stages_have_their_settings_in_one_plans_file(tmp_path: Path):
    tasks = tissue(tmp_path)
    own, before = tasks["configure all stage 2"].command, tasks["configure stage before all stage 2"].command
    plans = own[own.index("-o") + 1]
    assert own[-3:] == ("DCAMTrainer", "--set", "network=planned")
    assert own[own.index("--width-divisor") + 1] == "4"
    assert before[-3:] == ("DCAMClassifierTrainer", "--set", "width_divisor=16")
    assert before[before.index("-p") + 1] == before[before.index("-o") + 1] == plans
    first = tasks["train stage 1 all stage 2 seed 0"]
    assert first.needs == (tasks["configure stage before all stage 2"].key,)
    assert first.command[first.command.index("-p") + 1] == plans
    assert tasks["train all stage 2 seed 0"].needs == (first.key,)
    methods = {**TISSUE["methods"], "stage 2": {**TISSUE["methods"]["stage 2"], "earlier_settings": {}}}
    other = tissue(tmp_path, methods=methods)
    assert other["train stage 1 all stage 2 seed 0"].key != first.key
    assert other["train all stage 1 seed 0"].key == tasks["train all stage 1 seed 0"].key


def test_the_ceiling_trains_on_a_twin_with_masks_and_is_tested_on_the_same_patches(tmp_path: Path):
    tasks = tissue(tmp_path)
    convert, weak = tasks["convert all masks"], tasks["convert all"]
    download = weak.command[3]
    assert weak.command[-2:] == ("--target", f"bcss-wsss={download}_target")
    assert convert.command[-1] == f"{download}/train_masks"
    assert convert.command[convert.command.index("--id") :][:2] == ("--id", "771")
    source = tasks["evaluate source all masks ceiling seed 1"].typed
    assert "Dataset771_LUADHistoSeg_4classes_masks/labelsTr" in source
    assert "fold_0/validation " in source
    assert "--protocol dcam" in source
    runs = {tasks[name].run for name in ("train all masks ceiling seed 0", "train all stage 1 seed 0")}
    assert {(run.dataset, run.source) for run in runs if run} == {("tissue", "all")}
    assert not any("ceiling" in name for name in tasks if " masks" not in name)


def test_another_seed_moves_no_id_of_pseudo_labels_and_twins(tmp_path: Path):
    before = tissue(tmp_path)
    for raw in {task.run.raw for task in before.values() if task.run}:
        raw.mkdir(parents=True)
    after = tissue(tmp_path, seeds=[0, 1, 2])
    refuse_taken_ids(list(after.values()))
    assert {task.key for task in before.values()} < {task.key for task in after.values()}


def test_a_stock_trainer_on_pseudo_labels_may_be_smaller(tmp_path: Path):
    tasks = tissue(tmp_path)
    configured = tasks["configure all stock seed 0"]
    assert configured.needs == (tasks["plan all stock seed 0"].key,)
    assert configured.command[-2:] == ("--width-divisor", "4")
    train = tasks["train all stock seed 0"]
    assert train.needs == (configured.key,)
    assert train.command[train.command.index("-p") + 1].startswith("nnUNetPlans_small_")


def test_settings_of_a_stage_that_is_not_there_and_masks_that_are_not_there_are_refused(tmp_path: Path):
    methods = {
        "stage 1": {"trainer": "DCAMClassifierTrainer", "earlier_settings": {"width_divisor": 16}},
        "stage 2": {"trainer": "DCAMTrainer", "earlier_settings": {"widht": 16}, "width_divisor": 2},
        "ceiling": {"trainer": "DCAMTrainer", "masks": True},
    }
    datasets = {"tissue": {key: value for key, value in TISSUE["datasets"]["tissue"].items() if key != "masks"}}
    with pytest.raises(BadInput) as error:
        tissue(tmp_path, methods=methods, datasets=datasets, baseline="stage 1")
    text = str(error.value)
    assert "method stage 1, earlier_settings: DCAMClassifierTrainer has no stage before" in text
    assert "unknown setting 'widht'" in text
    assert "method stage 2: --width-divisor 2" in text
    assert "DCAMTrainer here learns from tags" in text
    assert "dataset tissue has none; expected masks" in text
