"""WSSS4LUAD, lung adenocarcinoma of two sources (Han et al., challenge of 2021): tumour, stroma and normal tissue.

Tree: ``1.training/<patient>-<x>-<y>-[1, 0, 0].png``, ``2.validation/{img,mask}/<patch>.png`` and
``3.testing/{img,mask}/<patch>.png``, whose masks may be missing. Pictures have different sizes; the released D-CAM code
makes all of them 224 x 224 by nearest neighbour, pictures too. Value 3 of the masks is background, left out.
"""

from __future__ import annotations

import re
from functools import partial

from dataset_conversion._command import run_as_script
from dataset_conversion._patch_command import dataset_name as name_of
from dataset_conversion._patch_command import make_patch_command
from dataset_conversion._patches import PatchFacts, Tissue

FACTS = PatchFacts(
    command="wsss4luad",
    dataset_id=511,
    name="WSSS4LUAD",
    site="WSSS4LUAD",
    tissues=(
        Tissue("tumour", "tumour", (0, 64, 128)),
        Tissue("stroma", "stroma", (64, 128, 0)),
        Tissue("normal", "normal", (243, 152, 0)),
    ),
    patient=re.compile(r"(?P<patient>TCGA-\w{2}-\w{4}|\d+)-"),
    folders={
        "train": ("1.training", "training", "train"),
        "val": ("2.validation", "validation", "val"),
        "test": ("3.testing", "testing", "test"),
    },
    reference="https://wsss4luad.grand-challenge.org/",
    licence="as the challenge says",
)
dataset_name = partial(name_of, FACTS)
command = make_patch_command(FACTS, "Convert WSSS4LUAD at ROOT (its folder, or the one above): tags for training.")

if __name__ == "__main__":
    run_as_script(command)
