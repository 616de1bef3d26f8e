from __future__ import annotations

from pathlib import Path

import numpy as np
from click.testing import CliRunner

from dataset_conversion import Dataset505_BraTS2019
from nnunet_dgplugins.files import read_json
from nnunet_dgplugins.lesion_phantom import CORE, OEDEMA, draw_case, main, make_lesion_phantom

CASES = [draw_case(0, number) for number in range(12)]


def slices(kind: str) -> tuple[list[np.ndarray], list[bool]]:
    """The brain's values of each slice, and whether it shows a lesion."""
    values, tags = [], []
    for case in CASES:
        image = getattr(case, kind)
        level = np.median(image[image > 0])  # of the case, whose units are arbitrary
        for z in range(image.shape[2]):
            values.append(image[..., z][image[..., z] > 0] / level)
            tags.append(bool(case.seg[..., z].any()))
    return values, tags


def test_slices_with_and_without_lesion_have_the_same_mean_and_spread():
    for kind in ("t1", "t2"):
        values, tags = slices(kind)
        for measure in (np.mean, np.std, np.median):
            found = np.array([measure(value) for value in values])
            positive, negative = found[np.array(tags)], found[~np.array(tags)]
            assert abs(positive.mean() - negative.mean()) < 0.3 * found.std(), (kind, measure.__name__)


def test_each_modality_shows_another_part_of_the_lesion():
    for case in CASES:
        for image, shown, hidden in ((case.t1, CORE, OEDEMA), (case.t2, OEDEMA, CORE)):
            brain = np.median(image[(image > 0) & (case.seg == 0)])
            bright, dark = np.median(image[case.seg == shown]), np.median(image[case.seg == hidden])
            assert bright > 1.4 * brain
            assert dark < 1.3 * brain


def test_about_half_of_the_slices_show_a_lesion_and_the_background_is_zero():
    tags = [case.seg[..., z].any() for case in CASES for z in range(case.seg.shape[2])]
    assert 0.35 < np.mean(tags) < 0.65
    assert all(not case.t1[0].any() and (case.t1 == 0).mean() > 0.3 for case in CASES)
    assert all((case.t1[case.seg > 0] > 0).all() for case in CASES)


def test_the_same_seed_writes_the_same_bytes_and_a_killed_run_goes_on(tmp_path: Path):
    done = CliRunner().invoke(main, [str(tmp_path / "a"), "--cases", "3"])
    assert done.exit_code == 0, done.output
    first = {path.relative_to(tmp_path / "a"): path.read_bytes() for path in (tmp_path / "a").rglob("*.nii.gz")}
    assert len(first) == 9
    missing = next(iter(first))
    (tmp_path / "a" / missing).unlink()
    make_lesion_phantom(tmp_path / "a", 3)
    assert (tmp_path / "a" / missing).read_bytes() == first[missing]
    make_lesion_phantom(tmp_path / "b", 4)
    assert all((tmp_path / "b" / name).read_bytes() == content for name, content in first.items())
    assert not np.array_equal(draw_case(1, 0).t1, CASES[0].t1)


def test_the_converter_of_brats_takes_the_tree(tmp_path: Path, nnunet_folders: Path):
    folder = make_lesion_phantom(tmp_path / "in", 5)
    words = [str(folder), "--id", "650", "--modalities", "T1,T2", "--val", "0.2", "--test", "0.2", "--jobs", "1"]
    done = CliRunner().invoke(Dataset505_BraTS2019.command, words)
    assert done.exit_code == 0, done.output
    out = nnunet_folders / "nnUNet_raw" / "Dataset650_BraTS2019_T1-T2_tags"
    cases = read_json(out / "dataset.json")["dgplugins"]["cases"]
    drawn = {f"BraTS19_2013_{number}_1": draw_case(0, number) for number in range(5)}
    for name, case in cases.items():
        if "tags" in case:
            assert case["tags"] == [int(drawn[name].seg[..., z].any()) for z in range(16)]
