"""Six-site prostate T2 MR as the SAML authors publish it (Liu et al., MICCAI 2020): one folder per site.

Tree: ``Processed_data_nii/{RUNMC,BMC,I2CVB,UCL,BIDMC,HK}/CaseNN.nii.gz`` and ``CaseNN_segmentation.nii.gz``, the latter
with a capital S at BMC. Numbers have gaps. Labels hold 1 = peripheral and 2 = central zone at RUNMC and BMC, and
1 = whole gland elsewhere. Header spacing is that of the release; it is kept.
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
    command="prostate-saml",
    dataset_id=501,
    name="ProstateSAML",
    sites=(  # name, then the names other papers use for it
        Site("RUNMC", ("RUNMC", "A", "ISBI", "A-ISBI", "Domain1")),
        Site("BMC", ("BMC", "B", "ISBI_1.5", "B-ISBI_1.5", "Domain2")),
        Site("I2CVB", ("I2CVB", "C", "C-I2CVB", "Domain3")),
        Site("UCL", ("UCL", "D", "D-UCL", "Domain4")),
        Site("BIDMC", ("BIDMC", "E", "E-BIDMC", "Domain5")),
        Site("HK", ("HK", "F", "F-HK", "Domain6")),
    ),
    channel_names={"0": "T2"},
    labels={"background": 0, "prostate": 1},
    mapping={0: 0, 1: 1, 2: 1},
    zone_labels={"background": 0, "PZ": 1, "TZ": 2},
    zone_mapping={0: 0, 1: 1, 2: 2},
    splits=("kfold", "desam", "labelled"),
    few_labels=True,
    neighbours=True,
    reference="https://liuquande.github.io/SAML/",
    licence="as the public sources (NCI-ISBI 2013, I2CVB, PROMISE12): research use",
)
FILE = re.compile(r"case(?P<number>\d{2,3})(?P<label>_segmentation)?", re.IGNORECASE)


def list_cases(root: Path, request: Request, listing: Listing) -> None:
    """Pair images and labels by number inside each site's folder."""
    for site, folder in site_folders(root, FACTS, ("Processed_data_nii",), listing).items():
        images: dict[int, list[Path]] = {}
        labels: dict[int, list[Path]] = {}
        for path in entries(folder):
            match = FILE.fullmatch(stem(path)) if is_volume(path) else None
            if match is None:
                listing.warnings.append(f"{path}: neither CaseNN nor CaseNN_segmentation, left out")
                continue
            (labels if match["label"] else images).setdefault(int(match["number"]), []).append(path)
        for number in sorted({*images, *labels}):
            name = f"{site}_Case{number:02d}"
            image, label = images.get(number, []), labels.get(number, [])
            problem = _unpaired(folder, number, image, label, name)
            if problem is not None:
                listing.troubles.append(Trouble(problem, site, name))
                continue
            original = image[0].relative_to(root).as_posix()
            patient = f"Case{number:02d}"
            listing.cases.append(SourceCase(name, (image[0],), label[0], site, patient, original, order=(number, "")))


def _unpaired(folder: Path, number: int, images: list[Path], labels: list[Path], name: str) -> Problem | None:
    leave_out = f"Leave the case out with --exclude {name}."
    for what, paths in (("image", images), ("label", labels)):
        if not paths:
            return Problem(str(folder / f"Case{number:02d}"), f"no {what}", fix=f"Download it again. {leave_out}")
        if len(paths) > 1:
            found = " and ".join(path.name for path in paths)
            return Problem(str(folder), f"{found}: two files for one {what}", "one", f"Remove one. {leave_out}")
    return None


command = make_command(
    FACTS, list_cases, "Convert the SAML download at ROOT (the folder of the site folders, or the one above it)."
)

if __name__ == "__main__":
    run_as_script(command)
