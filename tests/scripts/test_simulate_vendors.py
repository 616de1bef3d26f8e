"""The simulated vendors: who goes where, what is kept, what differs, and that the bytes come out the same."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import simulate_vendors as script
from click.testing import CliRunner
from scipy import ndimage

from dataset_conversion._acdc import Patient
from dataset_conversion.Dataset514_SimulatedVendors import command as convert
from nnunet_dgplugins.errors import BadInput, UserError

SHAPE = (40, 36, 4)
GROUPS = ("DCM", "HCM", "MINF", "NOR", "RV")


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    volume = nibabel.Nifti1Image(array, np.diag([-1.37, -1.37, 10, 1]))
    volume.header["qform_code"] = 1
    nibabel.save(volume, path)


def heart(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A bright disc in a dark ring, air at the left edge; int16 image and label."""
    rng = np.random.default_rng(seed)
    x, y = np.mgrid[: SHAPE[0], : SHAPE[1]]
    radius = np.hypot(x - 20 - rng.integers(-3, 4), y - 18)
    label = np.where(radius < 5, 3, np.where(radius < 8, 2, np.where((radius < 12) & (x > 22), 1, 0)))
    signal = np.array([300, 700, 220, 800])[label] * (x > 7)
    volume = signal[..., None] + rng.integers(0, 12, SHAPE)
    return volume.astype(np.int16), np.repeat(label[..., None], SHAPE[2], 2).astype(np.uint8)


def make_acdc(root: Path, count: int = 10, info: bool = True) -> Path:
    """ACDC's layout: ``count`` patients, two to a group, a 4D file and a scribble to be ignored."""
    for number in range(1, count + 1):
        name = f"patient{number:03d}"
        folder = root / "training" / name
        for frame in (1, number + 7):
            image, label = heart(100 * number + frame)
            save(folder / f"{name}_frame{frame:02d}.nii.gz", image)
            save(folder / f"{name}_frame{frame:02d}_gt.nii.gz", label)
        save(folder / f"{name}_4d.nii.gz", np.zeros((4, 4, 2, 3), np.int16))
        save(folder / f"{name}_frame01_scribble.nii.gz", np.full(SHAPE, 4, np.uint8))
        if info:
            group = GROUPS[(number - 1) // 2 % 5]
            text = f"ED: 1\nES: {number + 7}\nGroup: {group}\nHeight: 184.0\nNbFrame: 30\nWeight: 95.0\n"
            (folder / "Info.cfg").write_text(text)
    return root


@pytest.fixture
def acdc(tmp_path: Path) -> Path:
    return make_acdc(tmp_path / "ACDC")


def bytes_of(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def homes(out: Path) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for path in out.glob("*/*.nii.gz"):
        found.setdefault(path.name[:10], set()).add(path.parent.name)
    return found


def refused(data: Path, out: Path) -> BadInput:
    with pytest.raises(BadInput) as caught:
        script.simulate(data, out)
    assert not list(out.rglob("*.nii.gz"))
    return caught.value


def test_each_patient_is_at_one_site_with_both_frames_and_their_labels(acdc: Path, tmp_path: Path) -> None:
    out = script.simulate(acdc, tmp_path / "out")
    assert sorted(path.name for path in out.iterdir()) == ["README.txt", "SimA", "SimB", "SimC", "SimD"]
    assert all(len(sites) == 1 for sites in homes(out).values())
    assert len(homes(out)) == 10
    assert len(list(out.glob("*/*.nii.gz"))) == 10 * 4
    for name, (site,) in homes(out).items():
        frames = (1, int(name[-3:]) + 7)
        wanted = {f"{name}_frame{frame:02d}{ending}.nii.gz" for frame in frames for ending in ("", "_gt")}
        assert {path.name for path in (out / site).glob(f"{name}*")} == wanted


def test_the_groups_are_spread_evenly_over_the_sites() -> None:
    patients = [Patient(f"patient{n + 1:03d}", GROUPS[n // 20], ()) for n in range(100)]
    sites = script.assign(patients)
    for group in GROUPS:
        own = [sites[patient.name] for patient in patients if patient.group == group]
        assert [own.count(site) for site in script.VENDORS] == [5, 5, 5, 5]


def test_groups_smaller_than_the_number_of_sites_still_fill_every_site() -> None:
    patients = [Patient(f"patient{n + 1:03d}", GROUPS[n // 3], ()) for n in range(15)]
    sites = list(script.assign(patients).values())
    assert sorted(sites.count(site) for site in script.VENDORS) == [3, 4, 4, 4]


def test_patients_of_unknown_group_take_turns_by_name() -> None:
    names = [f"patient{n:03d}" for n in (45, 1, 90, 4, 15)]
    sites = script.assign([Patient(name, "", ()) for name in names])
    assert [sites[name] for name in sorted(names)] == ["SimA", "SimB", "SimC", "SimD", "SimA"]


def test_another_patient_behind_the_others_changes_nothing_of_theirs(tmp_path: Path) -> None:
    few = bytes_of(script.simulate(make_acdc(tmp_path / "few", 5, info=False), tmp_path / "a"))
    more = bytes_of(script.simulate(make_acdc(tmp_path / "more", 6, info=False), tmp_path / "b"))
    assert {name: more[name] for name in few if name != "README.txt"} == {
        name: value for name, value in few.items() if name != "README.txt"
    }
    assert len(more) == len(few) + 4


def test_a_patient_s_images_depend_on_no_other_patient(acdc: Path, tmp_path: Path) -> None:
    # patient009 and 010 are the group RV; without patient001 nothing of theirs moves
    whole = bytes_of(script.simulate(acdc, tmp_path / "a"))
    shutil.rmtree(acdc / "training" / "patient001")
    rest = bytes_of(script.simulate(acdc, tmp_path / "b"))
    own = [name for name in whole if "patient009" in name or "patient010" in name]
    assert len(own) == 8
    assert {name: rest[name] for name in own} == {name: whole[name] for name in own}


def test_labels_are_the_same_bytes_and_images_keep_their_grid(acdc: Path, tmp_path: Path) -> None:
    out = script.simulate(acdc, tmp_path / "out")
    for path in out.glob("*/*.nii.gz"):
        source = acdc / "training" / path.name[:10] / path.name
        if path.name.endswith("_gt.nii.gz"):
            assert path.read_bytes() == source.read_bytes()
            continue
        made, original = nibabel.load(path), nibabel.load(source)
        assert made.shape == original.shape
        assert made.header.get_zooms() == original.header.get_zooms()
        for form in ("get_qform", "get_sform"):
            matrices = [getattr(volume, form)(coded=True) for volume in (made, original)]
            assert matrices[0][1] == matrices[1][1]
            assert np.array_equal(matrices[0][0], matrices[1][0])
        assert b"simulated vendor" in made.header["descrip"].item()
        assert not np.array_equal(np.asanyarray(made.dataobj), np.asanyarray(original.dataobj))


def test_a_coarser_grid_and_back_does_not_move_the_anatomy() -> None:
    x, y = np.mgrid[:96, :80]
    image = np.exp(-((x - 40.3) ** 2 + (y - 33.6) ** 2) / 60)[..., None] * np.ones(3)
    coarse = script.resample(image, (44, 36, 3), order=1)
    centre = (np.array(ndimage.center_of_mass(coarse)) + 0.5) * np.array(image.shape) / coarse.shape - 0.5
    assert centre == pytest.approx(ndimage.center_of_mass(image), abs=0.05)
    back = script.resample(coarse, image.shape, order=3)
    assert ndimage.center_of_mass(back) == pytest.approx(ndimage.center_of_mass(image), abs=0.05)
    assert np.abs(back - image).max() < 0.05


def test_the_contrast_curves_of_the_table_are_rising_and_different() -> None:
    curves = [vendor.curve for vendor in script.VENDORS.values()]
    assert all(np.all(np.diff(curve) > 0) for curve in curves)
    assert len(set(curves)) == 4
    assert script.VENDORS["SimA"].curve == (0, 0.25, 0.5, 0.75, 1)


def test_the_first_vendor_is_nearly_as_acquired() -> None:
    image = heart(1)[0].astype(float)
    made = script.scan(image, script.VENDORS["SimA"], np.random.RandomState(0))
    assert np.corrcoef(made.ravel(), image.ravel())[0, 1] > 0.995


def test_an_image_without_any_signal_does_no_harm() -> None:
    for vendor in script.VENDORS.values():
        made = script.scan(np.zeros(SHAPE), vendor, np.random.RandomState(0))
        assert made.shape == SHAPE
        assert made.dtype == np.int16


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(acdc: Path, tmp_path: Path) -> None:
    first = bytes_of(script.simulate(acdc, tmp_path / "a"))
    assert bytes_of(script.simulate(acdc, tmp_path / "b")) == first
    other = bytes_of(script.simulate(acdc, tmp_path / "c", seed=1))
    changed = {name for name in first if other[name] != first[name]}
    assert changed == {name for name in first if not name.endswith("_gt.nii.gz")}


def test_two_processes_simulate_the_same_bytes_as_one(tmp_path: Path) -> None:
    acdc = make_acdc(tmp_path / "ACDC", 2)
    assert bytes_of(script.simulate(acdc, tmp_path / "a", jobs=2)) == bytes_of(script.simulate(acdc, tmp_path / "b"))


def test_a_second_run_makes_nothing_again_but_what_was_lost_or_is_of_another_seed(
    acdc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = script.simulate(acdc, tmp_path / "out")
    whole = bytes_of(out)
    script.simulate(acdc, out)
    assert "0 images made, 20 were there" in capsys.readouterr().out
    next(out.glob("SimB/*_gt.nii.gz")).unlink()
    damaged = next(path for path in out.glob("SimC/*.nii.gz") if "_gt" not in path.name)
    damaged.write_bytes(b"\x1f\x8b rubbish")
    script.simulate(acdc, out)
    assert "1 images made, 19 were there" in capsys.readouterr().out
    assert bytes_of(out) == whole
    script.simulate(acdc, out, seed=5)
    assert "20 images made" in capsys.readouterr().out
    assert bytes_of(out) == bytes_of(script.simulate(acdc, tmp_path / "new", seed=5))


def test_a_full_disk_stops_cleanly_and_leaves_no_readme(
    acdc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = script.simulate(acdc, tmp_path / "out")
    next(out.glob("SimB/*_gt.nii.gz")).unlink()

    def full(job: script.Job) -> bool:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(script, "write", full)
    with pytest.raises(UserError, match="Run the same command again"):
        script.simulate(acdc, out)
    assert not (out / "README.txt").exists()  # an earlier run's would call the set finished


SLOW = """
import sys, time
sys.path.insert(0, sys.argv[1])
import simulate_vendors as script
real = script.write
def slow(job):
    time.sleep(0.2)
    return real(job)
script.write = slow
script.command([sys.argv[2], sys.argv[3], "--jobs", "1"])
"""


def test_a_killed_simulation_finishes_with_the_same_bytes(acdc: Path, tmp_path: Path) -> None:
    out, scripts = tmp_path / "out", str(Path(script.__file__).parent)
    call = [sys.executable, "-c", SLOW, scripts, str(acdc), str(out)]
    process = subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while len(list(out.glob("*/patient*.nii.gz"))) < 5:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (out / "README.txt").exists()
    kept = next(path for path in out.glob("*/patient*.nii.gz") if "_gt" not in path.name)
    kept.with_name(f".tmp-123-4-{kept.name}").write_bytes(b"half a file")
    before = kept.stat().st_mtime_ns
    script.simulate(acdc, out)
    assert kept.stat().st_mtime_ns == before
    assert bytes_of(out) == bytes_of(script.simulate(acdc, tmp_path / "whole"))


def test_every_problem_of_the_patients_is_listed_and_nothing_is_written(acdc: Path, tmp_path: Path) -> None:
    folder = acdc / "training"
    (folder / "patient003" / "patient003_frame10_gt.nii.gz").unlink()
    for ending in ("", "_gt"):
        (folder / "patient004" / f"patient004_frame01{ending}.nii.gz").unlink()
    save(folder / "patient005" / "patient005_frame01_gt.nii.gz", np.full(SHAPE, 7, np.uint8))
    save(folder / "patient006" / "patient006_frame01_gt.nii.gz", np.zeros((4, 4, 4), np.uint8))
    (folder / "patient007" / "Info.cfg").write_text("ED: first\nES: 14\nGroup: NOR\n")
    report = refused(acdc, tmp_path / "out")
    text = str(report)
    for part in (
        "patient003_frame10_gt.nii.gz: no ground truth",
        "patient004_frame01.nii.gz: no image",  # Info.cfg says that it should be there
        "patient004_frame01_gt.nii.gz: no ground truth",
        "unknown label value 7",
        "shape 4x4x4",
        "ED: first; expected the number of a frame",
    ):
        assert part in text
    assert len(report.problems) == 6, text
    assert not (tmp_path / "out").exists()


def test_a_missing_ground_truth_is_found_without_info_too(tmp_path: Path) -> None:
    acdc = make_acdc(tmp_path / "ACDC", 2, info=False)
    (acdc / "training" / "patient002" / "patient002_frame09_gt.nii.gz").unlink()
    report = refused(acdc, tmp_path / "out")
    assert [Path(problem.where).name for problem in report.problems] == ["patient002_frame09_gt.nii.gz"]


def test_files_of_other_patients_in_the_output_are_refused(acdc: Path, tmp_path: Path) -> None:
    """A patient that moved to another site must not stay at the first as well."""
    out = script.simulate(acdc, tmp_path / "out")
    before = bytes_of(out)
    shutil.rmtree(acdc / "training" / "patient001")  # patient002, of the same group, would take its place
    with pytest.raises(BadInput, match="not made from these patients"):
        script.simulate(acdc, out)
    assert bytes_of(out) == before


def test_a_folder_without_patients_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder patientNNN"):
        script.simulate(tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match="no such folder"):
        script.simulate(tmp_path / "absent", tmp_path / "out")


def test_too_little_disk_is_said_before_the_start(
    acdc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1))
    with pytest.raises(UserError, match="Not enough disk for the simulated vendors"):
        script.simulate(acdc, tmp_path / "out")
    assert "10 patients, 20 frames; at most" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_the_output_says_what_it_is_and_converts(acdc: Path, tmp_path: Path, nnunet_folders: Path) -> None:
    out = tmp_path / "out"
    ran = CliRunner().invoke(script.command, [str(acdc), str(out), "--seed", "3", "--jobs", "1"])
    assert ran.exit_code == 0, ran.output
    assert "Next: dgplugins convert simulated-vendors" in ran.output
    text = (out / "README.txt").read_text()
    for part in ("SIMULATED", "ACDC", "Licence", "Seed: 3", "SimD: ", "patient010"):
        assert part in text
    assert str(tmp_path) not in text
    converted = CliRunner().invoke(convert, [str(out), "--source", "SimB", "--jobs", "1"])
    assert converted.exit_code == 0, converted.output
    folder = nnunet_folders / "nnUNet_raw" / "Dataset514_SimulatedVendors_SimB"
    assert len(list((folder / "imagesTr").iterdir())) + len(list((folder / "imagesTs").iterdir())) == 20


@pytest.fixture(scope="module")
def real(sample_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two real patients, and two runs over them."""
    root = tmp_path_factory.mktemp("real")
    for name in ("patient001", "patient015"):
        shutil.copytree(sample_data / "cardiac" / "ACDC" / "training" / name, root / "ACDC" / name)
    return root / "ACDC", script.simulate(root / "ACDC", root / "out")


def test_real_labels_and_geometry_are_kept_and_the_bytes_repeat(real: tuple[Path, Path], tmp_path: Path) -> None:
    data, out = real
    volumes = list(out.glob("*/*.nii.gz"))
    assert len(volumes) == 8
    for path in volumes:
        made, original = nibabel.load(path), nibabel.load(data / path.name[:10] / path.name)
        assert made.shape == original.shape
        assert np.array_equal(made.affine, original.affine)
        assert made.header.get_zooms() == original.header.get_zooms()
        if "_gt" in path.name:
            assert np.array_equal(np.asanyarray(made.dataobj), np.asanyarray(original.dataobj))
    assert bytes_of(script.simulate(data, tmp_path / "again")) == bytes_of(out)


def sharpness(image: np.ndarray) -> float:
    """Mean in-plane gradient relative to the image's spread."""
    return float(np.hypot(*np.gradient(image.astype(float), axis=(0, 1))).mean() / image.std())


def test_a_real_heart_looks_measurably_different_at_every_vendor(sample_data: Path) -> None:
    folder = sample_data / "cardiac" / "ACDC" / "training" / "patient001"
    image = np.asarray(nibabel.load(folder / "patient001_frame01.nii.gz").dataobj, dtype=float)
    label = np.asanyarray(nibabel.load(folder / "patient001_frame01_gt.nii.gz").dataobj)
    air = ndimage.binary_erosion(image < np.percentile(image, 15), np.ones((3, 3, 1)))
    assert air.sum() > 1000
    noise, sharp, muscle, contrast, seen = {}, {}, {}, {}, {}
    for name, vendor in script.VENDORS.items():
        made = script.scan(image, vendor, np.random.RandomState(0)).astype(float)
        noise[name] = float(made[air].std() / np.percentile(made, 99.5))
        seen[name] = float(made[label == 3].mean() / made[label == 2].mean())
        # contrast and resolution alone, without the chance of noise and field
        plain = script.scan(image, replace(vendor, noise=0, bias=0), np.random.RandomState(0)).astype(float)
        sharp[name] = sharpness(plain)
        muscle[name] = float(plain[label == 2].mean() / np.percentile(plain, 99.5))
        contrast[name] = float(plain[label == 3].mean() / plain[label == 2].mean())
    assert min(noise["SimB"], noise["SimC"], noise["SimD"]) > 2 * noise["SimA"]
    assert sharp["SimD"] < 0.9 * sharp["SimB"] < 0.81 * min(sharp["SimA"], sharp["SimC"])
    assert muscle["SimC"] < 0.8 * muscle["SimA"] < 0.6 * min(muscle["SimB"], muscle["SimD"])
    assert contrast["SimD"] < 0.95 * contrast["SimB"] < 0.8 * contrast["SimA"] < 0.65 * contrast["SimC"]
    assert min(seen.values()) > 1.3  # blood stays brighter than muscle: the anatomy can be read
