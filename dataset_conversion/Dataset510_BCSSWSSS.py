"""BCSS-WSSS, breast cancer patches made from BCSS (Amgad et al., Bioinformatics 2019; Han et al., MedIA 2022): TCGA.

Tree: ``{train or training}/<slide>_xmin<x>_ymin<y>_MPP-0.2500+<index>[1101].png`` and
``{val,test}/{img,mask}/<slide>_..._MPP-0.2500+<index>.png``, 224 x 224 pixels; the index may be missing. Flags and mask
values follow the order below, which is not that of LUAD-HistoSeg. ``TCGA-A1-A0SK-DX1`` is a slide of patient
TCGA-A1-A0SK.
"""

from __future__ import annotations

import re
from functools import partial

from dataset_conversion._command import run_as_script
from dataset_conversion._patch_command import dataset_name as name_of
from dataset_conversion._patch_command import make_patch_command
from dataset_conversion._patches import PatchFacts, Tissue

FACTS = PatchFacts(
    command="bcss-wsss",
    dataset_id=510,
    name="BCSSWSSS",
    site="BCSS",
    tissues=(
        Tissue("tumour", "TUM", (255, 0, 0)),
        Tissue("stroma", "STR", (0, 255, 0)),
        Tissue("lymphocyte", "LYM", (0, 0, 255)),
        Tissue("necrosis", "NEC", (153, 0, 255)),
    ),
    patient=re.compile(r"(?P<patient>TCGA-\w{2}-\w{4})-DX\w+"),
    folders={"train": ("train", "training"), "val": ("val",), "test": ("test",)},
    reference="https://github.com/ChuHan89/WSSS-Tissue",
    licence="as the download says",
)
dataset_name = partial(name_of, FACTS)
command = make_patch_command(FACTS, "Convert BCSS-WSSS at ROOT (its folder, or the one above): tags for training.")

if __name__ == "__main__":
    run_as_script(command)
