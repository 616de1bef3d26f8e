"""Four abdominal organs in CT and MR as the cross-modality papers process them.

CT: BTCV / Synapse, 30 cases; MR: CHAOS T2-SPIR, 20 cases (Ouyang et al., CSDG, TMI 2022; Su et al., SLAug, AAAI 2023).

Tree: ``{SABSCT,CHAOST2}/processed/image_<k>.nii.gz`` and ``label_<k>.nii.gz`` with labels 1 liver, 2 right kidney,
3 left kidney, 4 spleen. The published CT is windowed to [-125, 275] HU already; volumes still in Hounsfield units are
windowed here. The channel is never called CT: nnU-Net would normalise the other modality by the statistics of this one.
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
    command="abdomen-ctmr",
    dataset_id=504,
    name="AbdomenCTMR",
    sites=(Site("CT", ("SABSCT", "SABS", "BTCV")), Site("MR", ("CHAOST2", "CHAOS", "MRI"))),
    channel_names={"0": "image"},
    labels={"background": 0, "liver": 1, "right_kidney": 2, "left_kidney": 3, "spleen": 4},
    mapping={0: 0, 1: 1, 2: 2, 3: 3, 4: 4},
    window=(-125, 275),
    window_sites=("CT",),
    splits=("kfold", "published"),
    reference="https://github.com/cheng-01037/Causality-Medical-Image-Domain-Generalization",
    licence="BTCV: registration at Synapse; CHAOS: CC BY-NC-SA 4.0",
)
FILE = re.compile(r"(image|label)_(\d+)", re.IGNORECASE)


def list_cases(root: Path, request: Request, listing: Listing) -> None:
    """Pair images and labels by number; numbers count as numbers, so 10 comes after 9."""
    for site, folder in site_folders(root, FACTS, (), listing).items():
        inner = folder / "processed"
        found: dict[str, dict[int, Path]] = {"image": {}, "label": {}}
        for path in entries(inner if inner.is_dir() else folder):
            match = FILE.fullmatch(stem(path)) if is_volume(path) else None
            if match is None:
                listing.warnings.append(f"{path}: neither image_<number> nor label_<number>, left out")
                continue
            kind, number = match[1].casefold(), int(match[2])
            if number in found[kind]:
                problem = Problem(
                    str(path), f"the same {kind} as {found[kind][number].name}", fix="Remove one of them."
                )
                listing.troubles.append(Trouble(problem, site, f"{site}_{number:03d}"))
            found[kind].setdefault(number, path)
        for number in sorted({*found["image"], *found["label"]}):
            name = f"{site}_{number:03d}"
            missing = [kind for kind, paths in found.items() if number not in paths]
            if missing:
                fix = f"Process it again, or leave the case out with --exclude {name}."
                problem = Problem(str(folder), f"case {number} has no {missing[0]}", fix=fix)
                listing.troubles.append(Trouble(problem, site, name))
                continue
            image, label = found["image"][number], found["label"][number]
            original = image.relative_to(root).as_posix()
            listing.cases.append(SourceCase(name, (image,), label, site, str(number), original, order=(number, "")))


command = make_command(FACTS, list_cases, "Convert the processed CT and MR at ROOT, which holds SABSCT and CHAOST2.")

if __name__ == "__main__":
    run_as_script(command)
