"""Four real BraTS patients of the sample data, small, in the tree of BraTS 2019: what a CPU can cross-validate.

python scripts/brats_cases.py DATA/brats OUT
dgplugins convert brats OUT --id 505 --modalities Flair,T1c --folds 4 --test 0

Taken: FLAIR and T1c, which all four have; cropped to the brain, every second slice, half the resolution in the plane.
Masks get the values of 2019 (the older necrosis and non-enhancing core become one); one of the four masks is the fused
output of five networks, no annotation. Grades are those of the folders' names, high where they say none.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt

from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.files import replacing

_CODE_2019 = np.array([0, 1, 2, 1, 4], np.uint8)


@dataclass(frozen=True)
class Patient:
    """Files of one patient and the name it gets.

    Args:
        name: ID as in BraTS 2019.
        grade: ``HGG`` or ``LGG``.
        flair: image.
        t1c: image.
        mask: values of 2015 or 2019.
    """

    name: str
    grade: str
    flair: Path
    t1c: Path
    mask: Path


def find_patients(data: Path) -> list[Patient]:
    """Return the patients in both kinds of folders.

    Raises:
        UserError: there are none.
    """
    found = [
        Patient(f"BraTS19_2013_{folder.name.split('_')[2]}_1", "HGG", flair, folder / "T1c_subtrMeanDivStd.nii.gz",
                folder / "OTMultiClass.nii.gz")
        for flair in sorted(data.glob("**/brats_2013_*/Flair_subtrMeanDivStd.nii.gz"))
        for folder in (flair.parent,)
    ]  # fmt: skip
    found += [
        Patient(f"BraTS19_TCIA01_{number:03d}_1", "LGG" if "lgg" in str(flair).lower() else "HGG", flair,
                Path(str(flair).replace("_fla_bet", "_t1c_bet")), flair.parent.parent / "fusion" / "simple.nii.gz")
        for number, flair in enumerate(sorted(data.glob("**/raw_bet/*_fla_bet.nii.gz")), 1)
    ]  # fmt: skip
    if not found:
        raise UserError(f"{data}: no brats_2013_* folder and no raw_bet/*_fla_bet.nii.gz in it.")
    return found


def small(patient: Patient) -> Iterator[tuple[str, npt.NDArray[np.generic], npt.NDArray[np.float64]]]:
    """Yield suffix, volume (x, y, z) and affine of a patient's files, cropped and halved."""
    import nibabel

    files = {"flair": patient.flair, "t1ce": patient.t1c, "seg": patient.mask}
    images = {suffix: nibabel.load(path) for suffix, path in files.items()}
    volumes = {suffix: np.asarray(image.dataobj) for suffix, image in images.items()}  # type: ignore[attr-defined]
    for suffix in ("flair", "t1ce"):  # 0 outside the brain, as in BraTS 2019: three were normalised, their 0 included
        volumes[suffix] = volumes[suffix] - volumes[suffix][0, 0, 0]
    brain = (volumes["flair"] != 0) | (volumes["t1ce"] != 0)
    box = []
    for axis in range(3):
        inside = np.flatnonzero(brain.any(tuple(other for other in range(3) if other != axis)))
        box.append(slice(inside[0], inside[-1] + 1 - (inside[-1] + 1 - inside[0]) % 2))
    affine = np.asarray(images["flair"].affine, np.float64).copy()  # type: ignore[attr-defined]
    affine[:3, 3] += affine[:3, :3] @ np.array([box[0].start + 0.5, box[1].start + 0.5, box[2].start])
    affine[:3, :3] *= 2
    for suffix, volume in volumes.items():
        part = volume[tuple(box)][:, :, ::2]
        if suffix == "seg":
            yield suffix, _CODE_2019[np.rint(part[::2, ::2]).astype(int)], affine
        else:
            width, height, depth = part.shape
            mean = part.reshape(width // 2, 2, height // 2, 2, depth).astype(np.float32).mean((1, 3))
            # partial volume at the rim of the brain is background, which is exactly 0 in BraTS
            yield suffix, np.where(part[::2, ::2] != 0, mean, 0).astype(np.float32), affine


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("data", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("out", type=click.Path(path_type=Path))
def command(data: Path, out: Path) -> None:
    """Write the patients of DATA, small, into OUT; files that are there are kept."""
    import nibabel

    patients = find_patients(data)
    for patient in patients:
        folder = out / patient.grade / patient.name
        paths = {suffix: folder / f"{patient.name}_{suffix}.nii.gz" for suffix in ("flair", "t1ce", "seg")}
        if all(path.is_file() for path in paths.values()):
            continue
        for suffix, volume, affine in small(patient):
            with replacing(paths[suffix]) as temporary:
                nibabel.save(nibabel.Nifti1Image(volume, affine), temporary)
    click.echo(f"{len(patients)} patients in {out}.")
    click.echo(f"Next: dgplugins convert brats {out} --id 505 --modalities Flair,T1c --folds {len(patients)} --test 0")


if __name__ == "__main__":
    try:
        command()
    except UserError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(1)
