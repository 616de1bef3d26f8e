"""LUAD-HistoSeg, lung adenocarcinoma of one hospital (Han et al., Medical Image Analysis 2022): four tissues.

Tree: ``{train or training}/<patient>-<x>-<y>-[1 0 0 1].png`` and ``{val,test}/{img,mask}/<patient>-<x>-<y>.png``,
224 x 224 pixels at 10x. Flags and mask values follow the order below. The released D-CAM code remaps the test masks
for two classes wrongly: necrosis keeps value 1 and counts as stroma, stroma is left out. Here test masks are remapped
by name, as validation masks are.
"""

from __future__ import annotations

import re
from functools import partial

from dataset_conversion._command import run_as_script
from dataset_conversion._patch_command import dataset_name as name_of
from dataset_conversion._patch_command import make_patch_command
from dataset_conversion._patches import PatchFacts, Tissue

FACTS = PatchFacts(
    command="luad-histoseg",
    dataset_id=509,
    name="LUADHistoSeg",
    site="LUAD",
    tissues=(
        Tissue("tumour", "TE", (205, 51, 51)),
        Tissue("necrosis", "NEC", (0, 255, 0)),
        Tissue("lymphocyte", "LYM", (65, 105, 225)),
        Tissue("stroma", "TAS", (255, 165, 0)),
    ),
    patient=re.compile(r"(?P<patient>\d+)-\d+-\d+"),
    folders={"train": ("train", "training"), "val": ("val",), "test": ("test",)},
    reference="https://github.com/ChuHan89/WSSS-Tissue",
    licence="as the download says",
    white=True,
)
dataset_name = partial(name_of, FACTS)
command = make_patch_command(FACTS, "Convert LUAD-HistoSeg at ROOT (its folder, or the one above): tags for training.")

if __name__ == "__main__":
    run_as_script(command)
