"""Four simulated vendors on the hearts of ACDC, as ``scripts/simulate_vendors.py`` writes them: one folder per site.

Tree: ``{SimA,SimB,SimC,SimD}/patientNNN_frameXX.nii.gz`` and ``patientNNN_frameXX_gt.nii.gz``, and ``README.txt``,
which is written last. No patient is at two sites; the two frames of a patient never end on two sides of a fold.
Labels are ACDC's: 1 right ventricle, 2 myocardium, 3 left ventricle (M&Ms has 1 and 3 the other way round).
"""

from __future__ import annotations

import re
from pathlib import Path

from dataset_conversion._command import make_command, run_as_script
from dataset_conversion._facts import (
    Facts,
    Listing,
    Request,
    Site,
    SourceCase,
    Trouble,
    entries,
    is_volume,
    site_folders,
    stem,
)
from nnunet_dgplugins.errors import Problem

FACTS = Facts(
    command="simulated-vendors",
    dataset_id=514,
    name="SimulatedVendors",
    sites=(Site("SimA", ("SimA", "A")), Site("SimB", ("SimB", "B")), Site("SimC", ("SimC", "C")),
           Site("SimD", ("SimD", "D"))),
    channel_names={"0": "cine_MR"},
    labels={"background": 0, "RV": 1, "MYO": 2, "LV": 3},
    mapping={0: 0, 1: 1, 2: 2, 3: 3},
    splits=("kfold", "labelled"),
    few_labels=True,
    reference="SIMULATED sites, scripts/simulate_vendors.py on ACDC, https://www.creatis.insa-lyon.fr/Challenge/acdc/",
    licence="as ACDC; public copies state CC BY-NC-SA 4.0",
    simulated=True,
)  # fmt: skip
FILE = re.compile(r"patient(?P<patient>\d+)_frame(?P<frame>\d+)(?P<label>_gt)?", re.IGNORECASE)
AGAIN = "Run scripts/simulate_vendors.py again, it continues"


def list_cases(root: Path, request: Request, listing: Listing) -> None:
    """Pair images and labels by patient and frame inside each site's folder."""
    folders = site_folders(root, FACTS, (), listing)
    listing.warnings = [text for text in listing.warnings if not text.endswith("left out: README.txt")]
    if not (root / "README.txt").is_file():
        found = "no such file, so the simulation was stopped before its end"
        listing.troubles.append(Trouble(Problem(str(root / "README.txt"), found, fix=f"{AGAIN}.")))
    homes: dict[int, str] = {}
    for site, folder in folders.items():
        files: dict[tuple[int, int], dict[str, list[Path]]] = {}
        for path in entries(folder):
            match = FILE.fullmatch(stem(path)) if is_volume(path) else None
            if match is None:
                listing.warnings.append(f"{path}: neither patientNNN_frameXX nor patientNNN_frameXX_gt, left out")
                continue
            pair = files.setdefault((int(match["patient"]), int(match["frame"])), {"image": [], "label": []})
            pair["label" if match["label"] else "image"].append(path)
        for (number, frame), pair in sorted(files.items()):
            patient = f"patient{number:03d}"
            name = f"{site}_{patient}_frame{frame:02d}"
            home = homes.setdefault(number, site)
            problem = _wrong(folder, f"{patient}_frame{frame:02d}", pair, name)
            if problem is None and home != site:
                problem = Problem(str(folder), f"{patient} is at {home} too", "one site for each patient",
                                  "Simulate into a new folder.")  # fmt: skip
            if problem is not None:
                listing.troubles.append(Trouble(problem, site, name))
                continue
            image, label = pair["image"][0], pair["label"][0]
            original = image.relative_to(root).as_posix()
            order = (number, f"{frame:04d}")
            listing.cases.append(SourceCase(name, (image,), label, site, patient, original, order))


def _wrong(folder: Path, plain: str, pair: dict[str, list[Path]], name: str) -> Problem | None:
    leave_out = f"leave the case out with --exclude {name}."
    for what, paths in pair.items():
        if not paths:
            return Problem(str(folder / plain), f"no {what}", fix=f"{AGAIN}, or {leave_out}")
        if len(paths) > 1:
            found = " and ".join(path.name for path in paths)
            return Problem(str(folder), f"{found}: two files for one {what}", "one", f"Remove one, or {leave_out}")
    return None


command = make_command(FACTS, list_cases, "Convert the four SIMULATED vendors at ROOT, made by simulate_vendors.py.")

if __name__ == "__main__":
    run_as_script(command)
