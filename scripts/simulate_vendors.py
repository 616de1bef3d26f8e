"""Four simulated vendors on real anatomy: a folder of ACDC patients becomes a set with a known shift between sites.

python scripts/simulate_vendors.py ACDC OUT
dgplugins convert simulated-vendors OUT --id 514 --source SimA

Hearts and outlines are those of real patients. What tells the sites apart is computed, see :data:`VENDORS`; real
scanners differ in more than that, so numbers measured here are always shown as simulated. Killed? Run it again: what is
there is kept, and the bytes are those of an uninterrupted run.
"""

from __future__ import annotations

import gzip
import os
import sys
import zlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import numpy.typing as npt

from dataset_conversion._acdc import Frame, Patient, find_patients
from dataset_conversion._facts import SourceCase, entries, is_volume
from nnunet_dgplugins.errors import BadInput, Problem, UserError
from nnunet_dgplugins.files import content_hash, human_bytes, replacing, require_disk, write_bytes

if TYPE_CHECKING:
    from dataset_conversion._volumes import Checked

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Vendor:
    """How one simulated scanner shows a heart.

    Args:
        curve: contrast curve: signal shown for 0, 1/4, 1/2, 3/4 and 1 of the original's full signal, smooth in between.
        bias: strength of the smooth multiplicative field, as the standard deviation of its logarithm.
        blur: in-plane Gaussian blur in the original's pixels.
        coarse: in-plane pixel size of the acquisition relative to the original's; interpolated back to its grid.
        noise: standard deviation of the complex noise at acquisition, relative to full signal.
        scale: arbitrary intensity units of a full signal.
    """

    curve: tuple[float, float, float, float, float]
    bias: float
    blur: float
    coarse: float
    noise: float
    scale: float


# The shift between the sites, one line each. SimA is nearly as acquired.
VENDORS: dict[str, Vendor] = {
    "SimA": Vendor(curve=(0.00, 0.25, 0.50, 0.75, 1.00), bias=0.03, blur=0.0, coarse=1.0, noise=0.008, scale=1000.0),
    "SimB": Vendor(curve=(0.00, 0.42, 0.66, 0.85, 1.00), bias=0.20, blur=0.4, coarse=1.4, noise=0.035, scale=300.0),
    "SimC": Vendor(curve=(0.00, 0.16, 0.36, 0.66, 1.00), bias=0.32, blur=0.0, coarse=1.0, noise=0.045, scale=2500.0),
    "SimD": Vendor(curve=(0.08, 0.38, 0.52, 0.64, 0.90), bias=0.15, blur=0.7, coarse=2.0, noise=0.020, scale=255.0),
}  # fmt: skip

GROUPS = ("", "DCM", "HCM", "MINF", "NOR", "RV")  # unknown, and ACDC's; each starts its round one site later
LABELS = (0, 1, 2, 3)  # background, right ventricle, myocardium, left ventricle
FULL = (0.5, 99.8)  # percentiles of the original that count as no signal and as full signal
RECIPE = 1  # to be raised with every change that alters bytes: files of an older recipe are made again
README = "README.txt"
NOTE = """\
SIMULATED VENDORS. The four sites SimA, SimB, SimC and SimD are no hospitals and no scanners: each is a contrast curve,
a bias field, a resolution and a noise level computed onto real cine MR. Say so wherever images or numbers are shown.

Made from: ACDC (Bernard et al., IEEE Transactions on Medical Imaging 2018; one hospital), annotated frames, by
scripts/simulate_vendors.py of nnunet_dgplugins. Seed: {seed}, recipe {recipe}.
Labels: copies of ACDC's; 0 background, 1 right ventricle, 2 myocardium, 3 left ventricle.
Licence: that of ACDC, which these images are derived from. Public copies state CC BY-NC-SA 4.0 (no commercial use, name
the source, pass on alike); what counts is the text that came with your download.

Sites (contrast curve at 0, 1/4, 1/2, 3/4 and 1; bias as standard deviation of the logarithm; blur and coarse in the
original's pixels; noise relative to full signal):"""


@dataclass(frozen=True)
class Job:
    """One frame as one vendor shows it: where it goes, and the mark that says what it was made of."""

    frame: Frame
    vendor: str
    seed: int
    image: Path
    label: Path
    mark: str


# ---------------------------------------------------------------- who goes where


def assign(patients: Sequence[Patient]) -> dict[str, str]:
    """Return the site of each patient: the members of a group, sorted by name, take turns.

    A patient that is added behind the others of the group leaves every other patient where it is.
    """
    members: dict[str, list[str]] = defaultdict(list)
    for patient in patients:
        members[patient.group].append(patient.name)
    others = sorted(set(members) - set(GROUPS))
    sites = list(VENDORS)
    return {
        name: sites[(start + turn) % len(sites)]
        for start, group in enumerate((*GROUPS, *others))
        for turn, name in enumerate(sorted(members.get(group, ())))
    }


# ---------------------------------------------------------------- the simulated scanner


def scan(image: Array, vendor: Vendor, rng: np.random.RandomState) -> npt.NDArray[np.int16]:
    """Return what a vendor's scanner makes of an image.

    Args:
        image: (x, y, z), any intensity unit, at least 0 where there is signal.
        vendor: the scanner.
        rng: source of the bias field, the noise and the gain.

    Returns:
        The image on the same grid.
    """
    from scipy.interpolate import PchipInterpolator
    from scipy.ndimage import gaussian_filter

    low, high = np.percentile(image, FULL)
    signal = np.clip((image - low) / max(high - low, 1e-12), 0, 1)
    signal = PchipInterpolator(np.linspace(0, 1, len(vendor.curve)), vendor.curve)(signal)
    field = gaussian_filter(rng.standard_normal(image.shape), (*(size / 4 for size in image.shape[:2]), 2.0))
    field -= field.mean()
    signal = signal * np.exp(vendor.bias * field / (field.std() + 1e-12))
    # a coarser grid holds no finer detail: half a coarse pixel of blur keeps it from folding back
    sigma = float(np.hypot(vendor.blur, 0.5 * np.sqrt(vendor.coarse**2 - 1)))
    signal = gaussian_filter(signal, (sigma, sigma, 0.0))
    acquired = (*(max(1, round(size / vendor.coarse)) for size in image.shape[:2]), image.shape[2])
    signal = resample(signal, acquired, order=1)
    noise = vendor.noise * rng.standard_normal((2, *acquired))
    measured = np.sqrt((signal + noise[0]) ** 2 + noise[1] ** 2)  # magnitude images have Rician noise
    measured = resample(measured, image.shape, order=3)
    return np.clip(np.rint(measured * vendor.scale * rng.uniform(0.8, 1.25)), 0, 32767).astype(np.int16)


def resample(image: Array, shape: Sequence[int], order: int) -> Array:
    """Return the image on a grid of ``shape`` over the same field of view: edges, not pixel centres, coincide."""
    from scipy.ndimage import affine_transform

    if tuple(shape) == image.shape:
        return image
    step = np.array(image.shape) / np.array(shape)
    return np.asarray(affine_transform(image, step, step / 2 - 0.5, tuple(shape), order=order, mode="nearest"))


def random_state(job: Job) -> np.random.RandomState:
    """Return the frame's own generator: no other patient, and no order, has a say in it."""
    site = list(VENDORS).index(job.vendor)
    # RandomState's stream is frozen for ever, so the bytes survive a new NumPy
    return np.random.RandomState([job.seed, site, zlib.crc32(job.frame.patient.encode()), job.frame.number])


# ---------------------------------------------------------------- writing


def write(job: Job) -> bool:
    """Write a frame's image and label where they are not there yet; returns whether the image was made."""
    import nibabel

    content = job.frame.label.read_bytes()
    if content[:2] != b"\x1f\x8b":
        content = gzip.compress(content, mtime=0)
    if not job.label.is_file() or job.label.read_bytes() != content:
        write_bytes(job.label, content)  # never opened, never changed
    if mark_of(job.image) == job.mark:
        return False
    source: Any = _load(job.frame.image)
    values = np.asarray(source.dataobj, dtype=np.float64)
    made = scan(values.reshape(values.shape[:3]), VENDORS[job.vendor], random_state(job)).reshape(values.shape)
    header = source.header.copy()
    header.set_data_dtype(np.int16)
    header.set_slope_inter(1, 0)
    header["cal_min"] = header["cal_max"] = 0  # display range of the original
    header["descrip"] = job.mark
    with replacing(job.image) as temporary:
        nibabel.save(type(source)(made, source.affine, header), temporary)  # gzip without name and time
    return True


def _load(path: Path) -> Any:
    """Return a NIfTI image whatever the file's ending says about compression."""
    import nibabel

    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        content = gzip.decompress(content)
    second = 540 in (int.from_bytes(content[:4], "little"), int.from_bytes(content[:4], "big"))
    return (nibabel.Nifti2Image if second else nibabel.Nifti1Image).from_bytes(content)


def mark_of(path: Path) -> str:
    """Return the description in a volume's header, '' where there is no such file."""
    import nibabel

    if not path.is_file():
        return ""
    try:
        header: Any = nibabel.load(path).header
    except (nibabel.filebasedimages.ImageFileError, OSError, EOFError, zlib.error):
        return ""  # damaged by others: it is made again
    return bytes(header["descrip"].item()).decode("ascii", "replace")


def plan(patients: Sequence[Patient], reports: Mapping[Path, Checked], out: Path, seed: int) -> list[Job]:
    """Return what is to be written, in the order of patients and frames."""
    sites = assign(patients)
    jobs = []
    for frame in (frame for patient in patients for frame in patient.frames):
        site = sites[frame.patient]
        inputs = [RECIPE, seed, FULL, asdict(VENDORS[site]), frame.patient, frame.number, reports[frame.image].files[0]]
        name = f"{frame.patient}_frame{frame.number:02d}"
        mark = f"simulated vendor {site}, no real scanner; {content_hash(inputs)}"
        image, label = out / site / f"{name}.nii.gz", out / site / f"{name}_gt.nii.gz"
        jobs.append(Job(frame, site, seed, image, label, mark))
    return jobs


def check(patients: Sequence[Patient], jobs: int, problems: list[Problem]) -> dict[Path, Checked]:
    """Read every frame completely; return the reports by image, and add what is wrong to ``problems``."""
    from dataset_conversion._volumes import Recipe, check_case
    from nnunet_dgplugins import parallel

    recipe = Recipe({value: value for value in LABELS})
    cases = [
        SourceCase(f"{frame.patient}_frame{frame.number:02d}", (frame.image,), frame.label, "", frame.patient, "")
        for patient in patients
        for frame in patient.frames
    ]
    reports = parallel.run("Checking", check_case, [(case, recipe) for case in cases], jobs)
    for report in reports:
        problems += report.problems
        for warning in report.warnings:
            click.echo(f"Note: {warning}", err=True)
    return {case.images[0]: report for case, report in zip(cases, reports, strict=True)}


def strangers(out: Path, jobs: Sequence[Job]) -> list[Problem]:
    """Return the volumes in the sites' folders that this run would not write, perhaps a patient at a second site."""
    own = {path for job in jobs for path in (job.image, job.label)}
    found = [path for site in VENDORS if (out / site).is_dir() for path in entries(out / site) if is_volume(path)]
    fix = "Choose a new folder, or remove it."
    return [Problem(str(path), "not made from these patients", fix=fix) for path in found if path not in own]


def describe(patients: Sequence[Patient], seed: int) -> str:
    """Return the text of the README: what this is, from what, under which licence, and who went where."""
    sites = assign(patients)
    lines = [NOTE.format(seed=seed, recipe=RECIPE)]
    for site, vendor in VENDORS.items():
        lines.append(f"  {site}: " + ", ".join(f"{key} {value}" for key, value in asdict(vendor).items()))
    lines += ["", "Patients (none is at two sites; known groups are spread evenly):"]
    for site in VENDORS:
        own = [patient for patient in patients if sites[patient.name] == site]
        groups = Counter(patient.group or "group unknown" for patient in own)
        mix = ", ".join(f"{count} {group}" for group, count in sorted(groups.items()))
        lines.append(f"  {site}: {len(own)} ({mix or 'none'}): {' '.join(patient.name for patient in own)}")
    return "\n".join(lines) + "\n"


def simulate(data: Path, out: Path, seed: int = 0, jobs: int = 1) -> Path:
    """Write the four-site set; the same input and seed give the same bytes.

    Args:
        data: folder of ACDC or of its patients.
        out: receives ``<site>/patientNNN_frameXX.nii.gz``, ``..._gt.nii.gz`` and, at the very end, ``README.txt``.
        seed: of everything random, 0 to 2 ** 32 - 1.
        jobs: processes.

    Returns:
        ``out``.

    Raises:
        BadInput: every problem of the input; nothing is written.
        UserError: no patients, not enough disk, or the disk failed.
    """
    from nnunet_dgplugins import parallel

    problems: list[Problem] = []
    patients = find_patients(data, problems)
    reports = check(patients, jobs, problems)
    tasks = [] if problems else plan(patients, reports, out, seed)
    problems += strangers(out, tasks) if not problems else []
    if problems:
        raise BadInput(f"simulate_vendors, {data}", problems)
    size = sum(2 * int(np.prod(report.shape)) for report in reports.values())
    size += sum(frame.label.stat().st_size for patient in patients for frame in patient.frames)
    click.echo(f"{len(patients)} patients, {len(tasks)} frames; at most {human_bytes(size)} in {out}.")
    require_disk(out, size, "the simulated vendors")
    text = describe(patients, seed).encode()
    try:
        if any(mark_of(task.image) != task.mark or not task.label.is_file() for task in tasks):
            (out / README).unlink(missing_ok=True)  # it is what tells a finished set from one that was stopped
        for half_written in out.glob("Sim*/.tmp-*"):  # by a run that was killed
            half_written.unlink(missing_ok=True)
        made = parallel.run("Simulating", write, [(task,) for task in tasks], jobs)
        write_bytes(out / README, text)
    except OSError as error:
        raise UserError(f"{out}: writing stopped ({error}). Run the same command again, it continues.") from error
    click.echo(f"{sum(made)} images made, {len(made) - sum(made)} were there. Sites are simulated, see {out / README}.")
    click.echo(f"Next: dgplugins convert simulated-vendors {out} --id 514 --source SimA")
    return out


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("data", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True)
@click.option("--jobs", type=click.IntRange(1), default=min(8, os.cpu_count() or 1), show_default=True)
def command(data: Path, out: Path, seed: int, jobs: int) -> None:
    """Turn the ACDC patients in DATA into a set of four simulated vendors in OUT."""
    simulate(data, out, seed, jobs)


if __name__ == "__main__":
    try:
        command()
    except UserError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(1)
