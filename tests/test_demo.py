"""The main job, as a person with a bare machine runs it, with a few epochs instead of fifty."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from nnunet_dgplugins.files import read_json

ROOT = Path(__file__).resolve().parent.parent
UNSEEN = ("BIDMC", "BMC", "HK", "I2CVB", "UCL")


def run(
    tmp_path: Path, settings: str, *options: str
) -> tuple[subprocess.CompletedProcess[str], subprocess.CompletedProcess[str]]:
    """Run the demo twice with these trial settings."""
    if not (ROOT / ".venv" / "bin" / "python").exists():
        pytest.skip("scripts/demo.sh would install .venv; scripts/test.sh has made one where this test counts")
    few = tmp_path / "few.yaml"
    few.write_text(settings)
    command = ["bash", str(ROOT / "scripts" / "demo.sh"), *options, "--out", str(tmp_path / "demo"), "--device", "cpu"]
    kept = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment = {**kept, "DGPLUGINS_SETTINGS": str(few), "COLUMNS": "120"}
    first, again = (
        subprocess.run(command, capture_output=True, text=True, env=environment, check=False) for _ in range(2)
    )
    assert first.returncode == 0, first.stdout + first.stderr
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.count("done before") >= 8
    return first, again


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_demo_prints_its_table_and_draws_one_overlay_per_site_and_runs_again_at_once(tmp_path: Path):
    first, _ = run(tmp_path, "DeSAMTrainer: {epochs: 3}\n")
    for word in ("DeSAM", "stock nnU-Net", "constant mask", "mean unseen", *UNSEEN):
        assert word in first.stdout
    pictures = {path.stem for path in (tmp_path / "demo" / "overlays").glob("*.png")}
    assert pictures == set(UNSEEN)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_demo_of_epl_trains_with_few_labels_and_predicts_the_site_left_out(tmp_path: Path):
    small = "EPLTrainer: {batch_size: 2, unlabelled_batch_size: 2}\n"
    first, _ = run(tmp_path, small, "epl", "--steps", "4")
    assert "4 steps each" in first.stdout
    assert "training cases" in first.stdout
    for word in ("EPL", "stock nnU-Net", "constant mask", "UCL"):
        assert word in first.stdout
    assert [path.stem for path in (tmp_path / "demo" / "overlays").glob("*.png")] == ["UCL"]
    dataset = tmp_path / "demo" / "nnUNet_raw" / "Dataset517_ProstateSAML_without_UCL"
    cases = read_json(dataset / "dataset.json")["dgplugins"]["cases"]
    assert sum(case["labelled"] for name, case in cases.items() if not name.startswith("UCL")) == 5


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_demo_of_equivariant_cams_trains_both_stages_from_tags(tmp_path: Path):
    quick = "EquivariantCAMTrainer: {width_divisor: 16, epochs: 2, initial_lr: 0.001, threshold: 0.1}\n"
    first, _ = run(tmp_path, quick, "equivariant")
    for word in ("maps from tags", "stock nnU-Net on their pseudo labels", "slice tags only"):
        assert word in first.stdout
    pseudo = tmp_path / "demo" / "nnUNet_raw" / "Dataset519_BraTS2019_T1-T2_tags_pseudo"
    assert (pseudo / "pseudo_labels.png").is_file()
    tested = {path.name.removesuffix(".nii.gz") for path in (pseudo / "labelsTs").glob("*.nii.gz")}
    assert len(tested) >= 4
    assert {path.stem.removeprefix("2013_") for path in (tmp_path / "demo" / "overlays").glob("*.png")} == tested


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_demo_of_dcam_trains_both_stages_from_tags_and_predicts_the_other_hospital(tmp_path: Path):
    quick = (
        "DCAMClassifierTrainer: {width_divisor: 32, epochs: 1, iterations_per_epoch: 2}\n"
        "DCAMTrainer: {network: planned, epochs: 1, iterations_per_epoch: 1, batch_size: 2}\n"
    )
    first, _ = run(tmp_path, quick, "dcam")
    for word in (
        "D-CAM stage 1",
        "D-CAM stage 2",
        "stock nnU-Net on the pseudo labels",
        "mIoU",
        "BCSS",
        "IoU necrosis",
    ):
        assert word in first.stdout
    pseudo = tmp_path / "demo" / "nnUNet_raw" / "Dataset521_LUADHistoSeg_4classes_to-BCSS_tags_pseudo"
    assert len(list((pseudo / "pseudo_b4_5").glob("*.png"))) == len(list((pseudo / "labelsTr").glob("*.png"))) > 400
    assert (tmp_path / "demo" / "overlays" / "patches.png").is_file()


def test_the_demo_refuses_options_of_the_other_method_before_it_installs_anything():
    for words in (
        ["epl", "--source", "HK"],
        ["--steps", "5"],
        ["equivariant", "--steps", "5"],
        ["dcam", "--source", "LUAD"],
        ["epl", "--data", "/nowhere"],
        ["study", "--device", "cpu"],
    ):
        done = subprocess.run(["bash", str(ROOT / "scripts" / "demo.sh"), *words], capture_output=True, text=True,
                              check=False)  # fmt: skip
        assert done.returncode == 2
        assert words[-2] in done.stderr
        assert not done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_demo_of_samsdg_trains_both_steps_and_predicts_in_both_ways(tmp_path: Path):
    # after so few steps a coarse network is sure of nothing: every pixel counts for a box
    small = (
        "SAMSDGCoarseTrainer: {network: planned, image_size: 64, epochs: 2}\n"
        "SAMSDGTrainer: {groupings: 1, epochs: 2, box_threshold: 0.0}\n"
    )
    first, _ = run(tmp_path, small, "samsdg", "--source", "HK")
    for word in ("SAM-SDG (vit_tiny)", "four slices per canvas", "its coarse network alone", "stock nnU-Net", "RUNMC"):
        assert word in first.stdout
    pictures = {path.stem for path in (tmp_path / "demo" / "overlays").glob("*.png")}
    assert pictures == {*UNSEEN, "RUNMC"} - {"HK"}


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_demo_of_a_study_ends_with_a_page(tmp_path: Path):
    if not (ROOT / ".venv" / "bin" / "python").exists():
        pytest.skip("scripts/demo.sh would install .venv; scripts/test.sh has made one where this test counts")
    small = (ROOT / "studies" / "demo.yaml").read_text()
    for whole, part in (
        ("{download}", "{download} --size tiny --cases 5"),
        ("[0, 1]", "[0]"),
        ("minutes: 2", "iterations: 2"),
    ):
        assert whole in small
        small = small.replace(whole, part)
    (tmp_path / "small.yaml").write_text(small)
    words = ["study", "--file", str(tmp_path / "small.yaml"), "--out", str(tmp_path / "out"), "--jobs", "1"]
    kept = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "demo.sh"), *words], capture_output=True, text=True, env=kept, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert str(tmp_path / "out" / "report.html") in done.stdout
    page = (tmp_path / "out" / "report.html").read_text()
    assert "DeSAM box" in page
    assert "Against stock" in page
