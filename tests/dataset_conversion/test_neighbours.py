"""Neighbouring slices as channels: T2_below, T2, T2_above."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
from trees import convert, image, label, read, saml, save, verify

from dataset_conversion import Dataset501_ProstateSAML, Dataset502_ProstateMaxStyle, Dataset503_ProstateDeSAM

pytestmark = pytest.mark.usefixtures("nnunet_folders")


def channels(out: Path, case: str, part: str = "Tr") -> list[np.ndarray]:
    return [read(path) for path in sorted((out / f"images{part}").glob(f"{case}_000?.nii.gz"))]


def test_each_slice_comes_with_the_one_below_and_the_one_above(tmp_path: Path) -> None:
    root = saml(tmp_path / "in")
    out = convert(Dataset501_ProstateSAML, root, neighbours=True)
    source = read(root / "RUNMC" / "Case00.nii.gz")
    below, middle, above = channels(out, "RUNMC_Case00")
    assert np.array_equal(middle, source)
    assert np.array_equal(below[:, :, 1:], source[:, :, :-1])
    assert np.array_equal(above[:, :, :-1], source[:, :, 1:])
    content = json.loads((out / "dataset.json").read_text())
    assert content["channel_names"] == {"0": "T2_below", "1": "T2", "2": "T2_above"}
    assert content["dgplugins"]["protocol"]["neighbours"] == "slices z-1, z, z+1; edges repeated"
    verify(out)


def test_the_edge_slices_are_their_own_neighbours(tmp_path: Path) -> None:
    out = convert(Dataset501_ProstateSAML, saml(tmp_path / "in"), neighbours=True)
    below, middle, above = channels(out, "UCL_Case01", "Ts")
    assert np.array_equal(below[:, :, 0], middle[:, :, 0])
    assert np.array_equal(above[:, :, -1], middle[:, :, -1])


def test_all_channels_and_the_label_share_one_geometry(tmp_path: Path) -> None:
    out = convert(Dataset501_ProstateSAML, saml(tmp_path / "in"), neighbours=True)
    affines = [nibabel.load(path).affine for path in sorted(out.glob("*Ts/HK_Case00*.nii.gz"))]
    assert len(affines) == 4
    assert all(np.array_equal(affine, affines[0]) for affine in affines)


def test_nnunet_normalises_every_channel_as_it_does_t2(tmp_path: Path) -> None:
    from nnunetv2.preprocessing.normalization.map_channel_name_to_normalization import get_normalization_scheme

    out = convert(Dataset501_ProstateSAML, saml(tmp_path / "in"), neighbours=True)
    names = json.loads((out / "dataset.json").read_text())["channel_names"]
    assert {get_normalization_scheme(name) for name in names.values()} == {get_normalization_scheme("T2")}


def test_slices_that_are_dropped_are_still_neighbours_of_those_that_stay(tmp_path: Path) -> None:
    root = saml(tmp_path / "in")
    out = convert(Dataset501_ProstateSAML, root, neighbours=True, drop_empty_slices=True)
    source = read(root / "RUNMC" / "Case00.nii.gz")  # organ in slices 1 and 2 of 5
    below, middle, above = channels(out, "RUNMC_Case00")
    assert np.array_equal(middle, source[:, :, 1:3])
    assert np.array_equal(below, source[:, :, 0:2])
    assert np.array_equal(above, source[:, :, 2:4])


def test_with_links_only_the_middle_channel_is_one(tmp_path: Path) -> None:
    out = convert(Dataset501_ProstateSAML, saml(tmp_path / "in"), neighbours=True, link=True)
    links = [path.is_symlink() for path in sorted((out / "imagesTr").glob("RUNMC_Case00_*"))]
    assert links == [False, True, False]


def test_the_same_data_without_neighbours_are_another_conversion(tmp_path: Path) -> None:
    root = saml(tmp_path / "in")
    first = convert(Dataset501_ProstateSAML, root)
    inputs = [json.loads((first / "dataset.json").read_text())["dgplugins"]["protocol"]["input"]]
    convert(Dataset501_ProstateSAML, root, neighbours=True, overwrite=True)
    inputs.append(json.loads((first / "dataset.json").read_text())["dgplugins"]["protocol"]["input"])
    assert inputs[0] != inputs[1]
    assert len(list((first / "imagesTr").iterdir())) == 6


def test_the_other_prostate_releases_have_the_option_too(tmp_path: Path) -> None:
    for index, site in enumerate(("A-ISBI", "B-ISBI_1.5")):
        for number in range(2):
            folder = tmp_path / "reorganized" / site / f"patient_{number}"
            save(folder / "t2_img_clipped.nii.gz", image(10 * index + number))
            save(folder / "label_clipped.nii.gz", label())
            case = 2 * index + number
            save(tmp_path / "raw_data" / "imagesTr" / f"prostate_{case:03d}_0000.nii.gz", image(10 * index + number))
            save(tmp_path / "raw_data" / "labelsTr" / f"prostate_{case:03d}.nii.gz", label())
    rows = "".join(f"{'AB'[case // 2]},{case}\n" for case in range(4))
    (tmp_path / "raw_data" / "prostate_patientid.csv").write_text("center,patientid\n" + rows)
    for module, folder in ((Dataset502_ProstateMaxStyle, "reorganized"), (Dataset503_ProstateDeSAM, "raw_data")):
        out = convert(module, tmp_path / folder, neighbours=True)
        assert len(list((out / "imagesTr").iterdir())) == 6
        assert len(list((out / "imagesTs").iterdir())) == 6
