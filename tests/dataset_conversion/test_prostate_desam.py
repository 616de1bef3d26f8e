from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from trees import convert, image, label, read, refused, save, verify

from dataset_conversion import Dataset503_ProstateDeSAM as module
from nnunet_dgplugins.errors import BadInput, UserError

pytestmark = pytest.mark.usefixtures("nnunet_folders")
CENTERS = ("A-ISBI", "A-ISBI", "B-ISBI_1.5", "C-I2CVB", "D-UCL", "E-BIDMC", "F-HK")


def tree(root: Path, listed: bool = True) -> Path:
    for number in range(1, len(CENTERS) + 1):
        save(root / "raw_data" / "imagesTr" / f"prostate_{number:03d}_0000.nii.gz", image(number))
        save(root / "raw_data" / "labelsTr" / f"prostate_{number:03d}.nii.gz", label())
    if listed:
        write_list(root / "raw_data" / "prostate_patientid.csv")
    return root


def write_list(path: Path, centers: tuple[str, ...] = CENTERS) -> Path:
    lines = ["center,patientid", *(f"{center},{number}" for number, center in enumerate(centers, 1))]
    path.write_text("\n".join(lines))
    return path


def test_the_release_s_own_list_says_the_sites(tmp_path: Path) -> None:
    out = convert(module, tree(tmp_path / "in"), sources=("A-ISBI",))
    assert out.name == "Dataset503_ProstateDeSAM_RUNMC"
    assert sorted(path.name for path in (out / "imagesTr").iterdir()) == [
        "RUNMC_001_0000.nii.gz",
        "RUNMC_002_0000.nii.gz",
    ]
    cases = json.loads((out / "dataset.json").read_text())["dgplugins"]["cases"]
    assert cases["HK_007"] == {
        "site": "HK",
        "patient": "007",
        "labelled": True,
        "original": "raw_data/imagesTr/prostate_007_0000.nii.gz",
    }
    verify(out)


def test_the_published_center_numbers_name_sites(tmp_path: Path) -> None:
    assert convert(module, tree(tmp_path / "in"), sources=("2",)).name == "Dataset503_ProstateDeSAM_BMC"


def test_without_the_list_the_error_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--site-map"):
        convert(module, tree(tmp_path / "in", listed=False))


@pytest.mark.parametrize("kind", ["json", "csv", "spreadsheet"])
def test_a_site_map_may_be_given_instead(tmp_path: Path, kind: str) -> None:
    root = tree(tmp_path / "in", listed=False)
    if kind == "json":
        sites = tmp_path / "sites.json"
        sites.write_text(json.dumps({f"prostate_{number:03d}": site for number, site in enumerate(CENTERS, 1)}))
    elif kind == "csv":
        sites = tmp_path / "sites.csv"
        sites.write_text("case;site\n" + "\n".join(f"{n:03d};{site}" for n, site in enumerate(CENTERS, 1)))
    else:
        sites = tmp_path / "sites.csv"
        sites.write_bytes(b"\xef\xbb\xbf" + write_list(tmp_path / "plain.csv").read_bytes().replace(b",1\n", b",1.0\n"))
    out = convert(module, root, site_map=sites)
    assert len(list((out / "imagesTs").iterdir())) == 5


def test_every_fault_of_the_list_and_of_the_tree_is_reported_together(tmp_path: Path) -> None:
    root = tree(tmp_path / "in", listed=False)
    (root / "raw_data" / "labelsTr" / "prostate_006.nii.gz").unlink()
    (root / "raw_data" / "prostate_patientid.csv").write_text(
        "center,patientid\nA-ISBI,1\nA-ISBI,1\nB-ISBI,3\nA-ISBI,2\nC-I2CVB,four\nD-UCL,5\nE-BIDMC,6\nF-HK,7\nF-HK,8\n"
    )
    report = refused(module, root, sources=("A",))
    text = str(report)
    for part in (
        "line 3: case '1' is listed twice",
        "unknown site 'B-ISBI'",
        "case 'four'",
        "case 004 has no site",
        "case 006 has no label",
        "case 008 has no image and no label",
    ):
        assert part in text
    assert len(report.problems) == 6, text


def test_a_list_without_the_right_columns_is_refused(tmp_path: Path) -> None:
    root = tree(tmp_path / "in", listed=False)
    (root / "raw_data" / "prostate_patientid.csv").write_text("hospital,number\nA-ISBI,1\n")
    with pytest.raises(BadInput, match="a column called site or center or centre"):
        convert(module, root)


def test_a_label_of_two_belongs_to_the_prostate(tmp_path: Path) -> None:
    root = tree(tmp_path / "in")
    save(root / "raw_data" / "labelsTr" / "prostate_001.nii.gz", label((1, 2)))
    out = convert(module, root)
    assert np.array_equal(read(out / "labelsTr" / "RUNMC_001.nii.gz"), label((1, 2)) > 0)
