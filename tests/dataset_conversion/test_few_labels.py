"""Labelled shares, leave-one-site-out names, and the two together on the simulated vendors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from trees import convert as convert_any
from trees import image, label, read, saml, save, verify

from dataset_conversion import Dataset501_ProstateSAML, Dataset502_ProstateMaxStyle, Dataset507_MnMs
from dataset_conversion import Dataset514_SimulatedVendors as module
from dataset_conversion._facts import Request, SourceCase
from dataset_conversion._labelled import choose, count, groups
from nnunet_dgplugins.data.case_table import CaseTable
from nnunet_dgplugins.errors import UserError

PUBLISHED = {  # specs of the released code: patients of A, B centre 2, B centre 3, C, D
    0.02: (3, 3, 3, 2, 2),
    0.05: (6, 5, 4, 4, 4),
    0.1: (11, 9, 7, 6, 6),
    0.2: (20, 16, 12, 11, 11),
    1.0: (95, 74, 51, 50, 50),
}
RELEASE = (("A", "1", 95), ("B", "2", 74), ("B", "3", 51), ("C", "4", 50), ("D", "5", 50))


def open_release() -> list[SourceCase]:
    """One case per annotated patient of the open release, and the 25 without masks."""
    mask = Path("mask")
    cases = [
        SourceCase(f"{site}{centre}_{n}", (Path("x"),), mask, site, f"{centre}-{n:03d}", "", centre=centre)
        for site, centre, number in RELEASE
        for n in range(number)
    ]
    return cases + [SourceCase(f"C_{n}", (Path("x"),), None, "C", f"x{n}", "", centre="4") for n in range(25)]


@pytest.mark.parametrize(("ratio", "expected"), PUBLISHED.items())
def test_the_published_protocol_labels_the_published_numbers_of_patients(
    ratio: float, expected: tuple[int, ...]
) -> None:
    request = Request(Path(), ratio=ratio, count="published")
    found = list(groups(open_release(), "ABCD", request))
    assert [name for name, _, _ in found] == [f"{site} centre {centre}" for site, centre, _ in RELEASE]
    assert tuple(number for _, _, number in found) == expected


@pytest.mark.parametrize(("target", "two", "five"), [("A", 10, 17), ("B", 7, 14), ("C", 11, 19), ("D", 11, 19)])
def test_the_published_totals_of_each_target_come_out(target: str, two: int, five: int) -> None:
    sources = "ABCD".replace(target, "")
    for ratio, total in ((0.02, two), (0.05, five)):
        request = Request(Path(), ratio=ratio, count="published")
        chosen = choose(open_release(), sources, request)
        assert sum(case.masks != () and case.site in sources for case in chosen) == total


def test_an_honest_share_is_rounded_up_per_site_and_never_by_a_binary_fraction() -> None:
    numbers = [number for _, _, number in groups(open_release(), "ABCD", Request(Path(), ratio=0.02))]
    assert numbers == [2, 3, 1, 1]
    assert count(100, Request(Path(), ratio=0.07)) == 7
    assert count(3, Request(Path(), labelled=5)) == 3


def test_a_larger_share_holds_the_smaller_one() -> None:
    def labelled(ratio: float) -> set[str]:
        return {case.name for case in choose(open_release(), "ABC", Request(Path(), ratio=ratio)) if case.masks}

    assert labelled(0.02) < labelled(0.05) < labelled(0.2)


@pytest.mark.parametrize("options", [{"ratio": 0.5, "labelled": 1}, {"ratio": 0.0}, {"ratio": 1.5}, {"labelled": 0}])
def test_shares_that_make_no_sense_are_refused(options: dict[str, float], tmp_path: Path, nnunet_folders: Path) -> None:
    with pytest.raises(UserError, match=r"--ratio|--labelled"):
        convert_any(Dataset507_MnMs, tmp_path, sources=("A",), **options)


@pytest.fixture
def vendors(tmp_path: Path, nnunet_folders: Path) -> Path:
    """Three patients of two frames at each simulated vendor."""
    root, number = tmp_path / "in", 0
    for site in ("SimA", "SimB", "SimC", "SimD"):
        for _ in range(3):
            number += 1
            for frame in (1, 9):
                plain = f"patient{number:03d}_frame{frame:02d}"
                save(root / site / f"{plain}.nii.gz", image(100 * number + frame))
                save(root / site / f"{plain}_gt.nii.gz", label((1, 2, 3)))
    (root / "README.txt").write_text("simulated")
    return root


def table_of(folder: Path) -> CaseTable:
    table = CaseTable.from_dataset_json(json.loads((folder / "dataset.json").read_text()))
    assert table is not None
    return table


@pytest.mark.parametrize(("number", "patients"), [(1, 1), (2, 2)])
def test_n_labelled_patients_of_each_other_vendor_and_the_target_is_unseen(
    vendors: Path, number: int, patients: int
) -> None:
    out = convert_any(module, vendors, sources=(), targets=("SimD",), labelled=number)
    assert out.name == "Dataset514_SimulatedVendors_without_SimD"
    table = table_of(out)
    names = [path.name[:-7] for path in (out / "labelsTr").iterdir()]
    assert len(names) == 18
    for site in ("SimA", "SimB", "SimC"):
        own = {table.cases[name].patient for name in names if name.startswith(site) and table.cases[name].labelled}
        assert len(own) == patients
    for name in names:
        values = set(np.unique(read(out / "labelsTr" / f"{name}.nii.gz")))
        assert values == ({0, 1, 2, 3} if table.cases[name].labelled else {4})
    assert {path.name[:4] for path in (out / "imagesTs").iterdir()} == {"SimD"}
    verify(out)


def test_a_source_without_a_site_is_the_target_spelt_for_study_files(vendors: Path) -> None:
    assert module.FACTS.site("without_d").name == "without_SimD"
    by_target = convert_any(module, vendors, sources=(), targets=("SimD",), ratio=0.3)
    assert convert_any(module, vendors, sources=("without_D",), ratio=0.3) == by_target
    with pytest.raises(UserError, match="leave out the other"):
        convert_any(module, vendors, sources=("without_D", "SimA"))
    with pytest.raises(UserError, match="unknown site 'SimX'"):
        convert_any(module, vendors, sources=("without_SimX",))


def test_a_single_source_can_have_few_labels_too(vendors: Path) -> None:
    out = convert_any(module, vendors, sources=("SimB",), ratio=0.5)
    assert out.name == "Dataset514_SimulatedVendors_SimB"
    assert sum(case.labelled for case in table_of(out).cases.values() if case.site == "SimB") == 4


def test_a_whole_patient_can_be_left_out(vendors: Path) -> None:
    out = convert_any(module, vendors, sources=("SimA",), exclude=("SimA_patient001",))
    assert {path.name.split("_")[1] for path in (out / "labelsTr").iterdir()} == {"patient002", "patient003"}


def test_the_prostate_sites_have_few_labels_too_and_merged_zones(tmp_path: Path, nnunet_folders: Path) -> None:
    out = convert_any(Dataset501_ProstateSAML, saml(tmp_path / "in"), sources=(), targets=("HK",), labelled=1)
    assert out.name == "Dataset501_ProstateSAML_without_HK"
    table = table_of(out)
    assert table.sources == ["RUNMC", "BMC", "I2CVB", "UCL", "BIDMC"]
    names = [path.name[:-7] for path in (out / "labelsTr").iterdir()]
    labelled = [name for name in names if table.cases[name].labelled]
    assert sorted(table.cases[name].site for name in labelled) == sorted(table.sources)
    for name in names:
        assert set(np.unique(read(out / "labelsTr" / f"{name}.nii.gz"))) == ({0, 1} if name in labelled else {2})
    verify(out)


def test_converters_of_masks_only_can_leave_one_site_out() -> None:
    options = [option.opts for option in Dataset502_ProstateMaxStyle.command.params]
    assert ["--target"] in options
    assert ["--ratio"] not in options


def test_one_of_source_and_target_must_be_given(vendors: Path) -> None:
    ran = CliRunner().invoke(module.command, [str(vendors)])
    assert ran.exit_code == 2
    assert "'--source'" in ran.output
    assert "'--target'" in ran.output


def test_the_command_takes_target_and_number_of_labelled_patients(vendors: Path, nnunet_folders: Path) -> None:
    words = [str(vendors), "--id", "640", "--target", "SimA", "--labelled", "1", "--jobs", "1"]
    ran = CliRunner().invoke(module.command, words)
    assert ran.exit_code == 0, ran.output
    assert "SimB: 1 of 3 annotated patients labelled" in ran.output
    assert "12 training cases are unlabelled" in ran.output
    assert (nnunet_folders / "nnUNet_raw" / "Dataset640_SimulatedVendors_without_SimA").is_dir()
