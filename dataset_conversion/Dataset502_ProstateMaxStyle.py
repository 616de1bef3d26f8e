"""The six prostate sites as the MaxStyle authors repackage them (Chen et al., MICCAI 2022): one folder per patient.

Tree: ``reorganized/{A-ISBI,B-ISBI_1.5,C-I2CVB,D-UCL,E-BIDMC,F-HK}/<patient>/t2_img_clipped.nii.gz`` and
``label_clipped.nii.gz``. Resampled to 0.625 x 0.625 x 3.6 mm, slices without prostate removed, labels 0 and 1.
A seventh folder, G-MedicalDecathlon, is none of the six sites and is used only when it is named.
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
from nnunet_dgplugins.data.names import safe_name
from nnunet_dgplugins.errors import Problem

FACTS = Facts(
    command="prostate-maxstyle",
    dataset_id=502,
    name="ProstateMaxStyle",
    sites=(
        Site("RUNMC", ("A-ISBI", "A", "ISBI", "RUNMC")),
        Site("BMC", ("B-ISBI_1.5", "B", "ISBI_1.5", "BMC")),
        Site("I2CVB", ("C-I2CVB", "C")),
        Site("UCL", ("D-UCL", "D")),
        Site("BIDMC", ("E-BIDMC", "E")),
        Site("HK", ("F-HK", "F")),
        Site("MSD", ("G-MedicalDecathlon", "G", "MedicalDecathlon"), default=False),
    ),
    channel_names={"0": "T2"},
    labels={"background": 0, "prostate": 1},
    mapping={0: 0, 1: 1, 2: 1},
    splits=("kfold", "desam"),
    neighbours=True,
    ends_left_out=True,  # with all slices that show no prostate
    reference="https://github.com/cherise215/MaxStyle",
    licence="as the public sources (NCI-ISBI 2013, I2CVB, PROMISE12): research use",
)
IMAGE, LABEL = "t2_img_clipped", "label_clipped"


def list_cases(root: Path, request: Request, listing: Listing) -> None:
    """Take every folder below a site that holds an image and a label, whatever the folder is called."""
    for site, folder in site_folders(root, FACTS, ("reorganized",), listing).items():
        for patient in entries(folder):
            if not patient.is_dir():
                listing.warnings.append(f"{patient}: not a patient's folder, left out")
                continue
            volumes = {stem(path).casefold(): path for path in entries(patient) if is_volume(path)}
            name = f"{site}_{safe_name(patient.name)}"
            missing = [what for what in (IMAGE, LABEL) if what not in volumes]
            if missing:
                fix = f"Download it again, or leave the case out with --exclude {name}."
                problem = Problem(str(patient), f"no {' and no '.join(missing)}.nii.gz", fix=fix)
                listing.troubles.append(Trouble(problem, site, name))
                continue
            numbers = re.findall(r"\d+", patient.name)
            image = volumes[IMAGE]
            listing.cases.append(
                SourceCase(
                    name=name,
                    images=(image,),
                    label=volumes[LABEL],
                    site=site,
                    patient=patient.name,
                    original=image.relative_to(root).as_posix(),
                    order=(int(numbers[-1]) if numbers else 0, patient.name),
                )
            )


command = make_command(
    FACTS, list_cases, "Convert the MaxStyle release at ROOT (the folder reorganized, or the one above)."
)

if __name__ == "__main__":
    run_as_script(command)
