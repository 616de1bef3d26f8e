from __future__ import annotations

import hashlib
import time
from pathlib import Path

import nibabel
import numpy as np
import pytest
from click.testing import CliRunner

from dataset_conversion import Dataset501_ProstateSAML as saml
from dataset_conversion._facts import Listing, Request
from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.phantom import SITES, main, make_phantom


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_phantom(tmp_path_factory.mktemp("small"), 3)


def read(path: Path) -> np.ndarray:
    return np.asanyarray(nibabel.load(path).dataobj)


def hashes(root: Path) -> dict[str, str]:
    files = sorted(root.rglob("*.nii.gz"))
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_same_seed_gives_the_same_bytes_at_another_time(tmp_path: Path) -> None:
    first = hashes(make_phantom(tmp_path / "a", 1, seed=3, size="tiny"))
    time.sleep(1.1)  # a time stamp in the gzip header has a resolution of one second
    assert hashes(make_phantom(tmp_path / "b", 1, seed=3, size="tiny")) == first
    assert hashes(make_phantom(tmp_path / "c", 1, seed=4, size="tiny")) != first


def test_a_case_does_not_depend_on_how_many_others_are_made(tmp_path: Path) -> None:
    few = hashes(make_phantom(tmp_path / "few", {"UCL": 1}, size="tiny"))
    many = hashes(make_phantom(tmp_path / "many", 2, size="tiny"))
    assert set(few.items()) <= set(many.items())


def test_the_tree_is_that_of_the_download(small: Path) -> None:
    assert sorted(path.name for path in small.iterdir()) == sorted(SITES)
    assert (small / "BMC" / "Case00_Segmentation.nii.gz").is_file()
    assert (small / "RUNMC" / "Case00_segmentation.nii.gz").is_file()
    assert [path.name for path in sorted((small / "BIDMC").glob("Case??.nii.gz"))] == [
        "Case00.nii.gz",
        "Case02.nii.gz",
        "Case03.nii.gz",
    ]
    listing = Listing()
    saml.list_cases(small, Request(small), listing)
    assert len(listing.cases) == 18
    assert not listing.troubles
    assert not listing.warnings


def test_zones_are_drawn_where_the_download_has_them(small: Path) -> None:
    for site in SITES:
        label = read(next(small.glob(f"{site}/Case02_?egmentation.nii.gz")))
        assert np.unique(label).tolist() == ([0, 1, 2] if site in ("RUNMC", "BMC") else [0, 1])


def test_every_volume_has_a_prostate_of_human_size_and_no_prostate_touches_the_border(small: Path) -> None:
    for path in small.glob("*/*egmentation.nii.gz"):
        volume = nibabel.load(path)
        gland = np.asanyarray(volume.dataobj) > 0
        millilitres = gland.sum() * np.prod(volume.header.get_zooms()) / 1000
        assert 8 < millilitres < 90, path
        assert 6 <= gland.shape[2] <= 20
        for border in (gland[0], gland[-1], gland[:, 0], gland[:, -1]):
            assert not border.any()


def test_the_peripheral_zone_lies_behind_the_transition_zone(small: Path) -> None:
    label = read(small / "RUNMC" / "Case00_segmentation.nii.gz")
    back = [np.argwhere(label == zone)[:, 1].mean() for zone in (1, 2)]  # y grows to the back
    assert back[0] > back[1]


def test_sites_differ_in_size_spacing_brightness_and_noise(small: Path) -> None:
    looks = set()
    for site in SITES:
        volume = nibabel.load(small / site / "Case00.nii.gz")
        looks.add((volume.shape[0], round(float(volume.header.get_zooms()[0]), 2)))
    assert len(looks) >= 5
    assert len({site.scale for site in SITES.values()}) == 6


def test_the_endorectal_coil_brightens_the_rectum_s_surroundings(small: Path) -> None:
    for site, coil in (("BIDMC", True), ("I2CVB", False)):
        image, label = read(small / site / "Case00.nii.gz"), read(small / site / "Case00_segmentation.nii.gz")
        near = image[:, label.any(axis=(0, 2)).nonzero()[0][-1]].max()
        assert (near > 2 * np.percentile(image, 90)) == coil


def test_unknown_sites_sizes_and_numbers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'UCL'"):
        make_phantom(tmp_path, {"UCLH": 2})
    with pytest.raises(UserError, match="Unknown size"):
        make_phantom(tmp_path, 2, size="huge")
    with pytest.raises(UserError, match="at least one"):
        make_phantom(tmp_path, 0)


def test_the_command_writes_the_tree(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, [str(tmp_path / "out"), "--cases", "1", "--size", "tiny"])
    assert result.exit_code == 0, result.output
    assert "6 made cases of 6 sites" in result.output
    assert len(list((tmp_path / "out").glob("*/*.nii.gz"))) == 12
