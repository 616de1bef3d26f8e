"""Finds the annotated frames of ACDC's patients, as the challenge's archives lay them out.

Tree: ``patientNNN/{Info.cfg, patientNNN_4d.nii.gz, patientNNN_frameXX.nii.gz, patientNNN_frameXX_gt.nii.gz}``, these
folders below ``training`` or ``testing``. Info.cfg names the end-diastolic and end-systolic frame and the patient's
group; some copies come without it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from dataset_conversion._facts import entries, is_volume, stem
from nnunet_dgplugins.errors import Problem, UserError

FOLDERS = {"database", "training", "testing"}  # of ACDC's archives, above the patients
PATIENT = re.compile(r"patient\d+", re.IGNORECASE)
FRAME = re.compile(r"(?P<patient>patient\d+)_frame(?P<frame>\d+)(?P<label>_gt)?", re.IGNORECASE)


@dataclass(frozen=True)
class Frame:
    """One annotated time point of a patient."""

    patient: str
    number: int
    image: Path
    label: Path


@dataclass(frozen=True)
class Patient:
    """A patient's annotated frames and, where Info.cfg says it, the group (else '')."""

    name: str
    group: str
    frames: tuple[Frame, ...]


def find_patients(data: Path, problems: list[Problem]) -> list[Patient]:
    """Return every patient below ``data``, sorted by name; what is wrong is added to ``problems``.

    Raises:
        UserError: there is no patient at all.
    """
    if not data.is_dir():
        raise UserError(f"{data}: no such folder.")
    folders: dict[str, Path] = {}
    above = [data]
    for place in above:
        for folder in (path for path in entries(place) if path.is_dir()):
            name = folder.name.lower()
            if name in FOLDERS:
                above.append(folder)
            elif PATIENT.fullmatch(name) and name in folders:
                problems.append(Problem(str(folder), f"a second folder of {name}, beside {folders[name]}"))
            elif PATIENT.fullmatch(name):
                folders[name] = folder
    if not folders:
        raise UserError(f"{data}: no folder patientNNN in it. Name ACDC's folder, or the one that holds the patients.")
    return [_read_patient(name, folders[name], problems) for name in sorted(folders)]


def _read_patient(name: str, folder: Path, problems: list[Problem]) -> Patient:
    """Return the patient's frames; those of Info.cfg must be there, the 4D file and scribbles are left out."""
    images: dict[int, Path] = {}
    labels: dict[int, Path] = {}
    for path in entries(folder):
        match = FRAME.fullmatch(stem(path)) if is_volume(path) else None
        if match is None:
            continue
        if match["patient"].lower() != name:
            problems.append(Problem(str(path), "the file of another patient", f"{name}_frame{match['frame']}"))
            continue
        first = (labels if match["label"] else images).setdefault(int(match["frame"]), path)
        if first != path:
            problems.append(Problem(str(path), f"the same frame as {first.name}", fix="Remove one of them."))
    info = read_info(folder / "Info.cfg", problems)
    wanted = {*images, *labels, *(int(info[key]) for key in ("ED", "ES") if key in info)}
    if not wanted:
        problems.append(Problem(str(folder), "no frame", f"{name}_frameNN.nii.gz", "Download the patient again."))
    frames = []
    for number in sorted(wanted):
        for what, kept, ending in (("image", images, ""), ("ground truth", labels, "_gt")):
            if number not in kept:
                fix = "Download the patient again, or name a folder of patients that all have ground truth."
                file = folder / f"{name}_frame{number:02d}{ending}.nii.gz"
                problems.append(Problem(str(file), f"no {what}", fix=fix))
        if number in images and number in labels:
            frames.append(Frame(name, number, images[number], labels[number]))
    return Patient(name, info.get("Group", ""), tuple(frames))


def read_info(path: Path, problems: list[Problem]) -> dict[str, str]:
    """Return the ``key: value`` lines of an Info.cfg, empty without the file; ED and ES are whole numbers."""
    if not path.is_file():
        return {}
    lines = (line.partition(":") for line in path.read_text(encoding="utf-8", errors="replace").splitlines())
    info = {key.strip(): value.strip() for key, colon, value in lines if colon and value.strip()}
    for key in ("ED", "ES"):
        if key in info and not info[key].isdecimal():
            problems.append(Problem(str(path), f"{key}: {info.pop(key)}", "the number of a frame"))
    return info
