"""The real BraTS patients made small, and their leave-one-out folds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
from click.testing import CliRunner

from nnunet_dgplugins.cli.main import cli
from nnunet_dgplugins.files import read_json

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "brats_cases.py"


@pytest.fixture(scope="module")
def tree(sample_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("brats")
    subprocess.run([sys.executable, SCRIPT, sample_data / "brats", out], check=True)
    return out


def test_small_patients_keep_their_tumour_in_place_and_have_an_empty_background(tree: Path, sample_data: Path):
    source = next(sample_data.glob("brats/**/brats_2013_pat*/OTMultiClass.nii.gz"))
    number = source.parent.name.split("_")[2]
    mask, flair = (nibabel.load(next(tree.glob(f"HGG/*{number}*/*_{suffix}.nii.gz"))) for suffix in ("seg", "flair"))
    whole, small = (nibabel.load(source), mask)
    assert set(np.unique(small.dataobj)) <= {0, 1, 2, 4}
    centre = [
        image.affine[:3, :3] @ np.argwhere(np.asarray(image.dataobj) > 0).mean(0) + image.affine[:3, 3]
        for image in (whole, small)
    ]
    assert np.abs(centre[0] - centre[1]).max() < 1  # mm
    share = (np.asarray(whole.dataobj) > 0).sum() / (8 * (np.asarray(small.dataobj) > 0).sum())
    assert 0.95 < share < 1.05
    values = np.asarray(flair.dataobj)
    assert (values == 0).mean() > 0.2
    assert max(values.shape[:2]) < 100  # cropped to the brain


def test_every_patient_validates_in_one_fold_and_its_mask_is_apart(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    words = ["convert", "brats", str(tree), "--id", "505", "--modalities", "Flair,T1c", "--test", "0", "--jobs", "1"]
    patients = len(list(tree.glob("*/*")))
    done = CliRunner().invoke(cli, [*words, "--folds", str(patients)])
    assert done.exit_code == 0, done.output
    folder = next(tmp_path.iterdir())
    folds = read_json(folder / "splits_final.json")
    assert sorted(name for fold in folds for name in fold["val"]) == sorted(path.name for path in tree.glob("*/*"))
    assert all(len(fold["val"]) == 1 for fold in folds)
    assert len(list((folder / "labelsVal").iterdir())) == patients
    for path in (folder / "labelsTr").iterdir():  # tags, constant per slice
        tags = np.asarray(nibabel.load(path).dataobj)
        assert (tags == tags[:1, :1]).all()
    assert CliRunner().invoke(cli, [*words, "--folds", str(patients + 1)]).exit_code != 0
