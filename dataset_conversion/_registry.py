"""Every converter: name after ``dgplugins convert`` -> module and one line of help."""

from __future__ import annotations

import importlib
from typing import Any

CONVERTERS = {
    "prostate-saml": ("Dataset501_ProstateSAML", "Six-site prostate MR, the SAML download (Processed_data_nii)."),
    "prostate-maxstyle": (
        "Dataset502_ProstateMaxStyle",
        "The same prostates as MaxStyle repackaged them (reorganized).",
    ),
    "prostate-desam": ("Dataset503_ProstateDeSAM", "The same prostates as the DeSAM authors released them (raw_data)."),
    "abdomen-ctmr": ("Dataset504_AbdomenCTMR", "Four abdominal organs in CT and MR (SABSCT, CHAOST2)."),
    "brats": ("Dataset505_BraTS2019", "BraTS 2019 brain tumours; one tag per slice, or masks."),
    "prostate-decathlon": ("Dataset506_ProstateDecathlon", "Medical Decathlon Task05, T2 and ADC; tags or masks."),
    "mnms": ("Dataset507_MnMs", "M&Ms, cardiac cine MR of four vendors; few labels (--target, --ratio)."),
    "scgm": ("Dataset508_SCGM", "Spinal cord grey matter of four sites, four raters; few labels."),
    "luad-histoseg": ("Dataset509_LUADHistoSeg", "LUAD-HistoSeg, lung tissue patches with tags; two or four classes."),
    "bcss-wsss": ("Dataset510_BCSSWSSS", "BCSS-WSSS, breast tissue patches with tags; two or four classes."),
    "wsss4luad": ("Dataset511_WSSS4LUAD", "WSSS4LUAD, lung tissue patches with tags; two or three classes."),
    "prostate-npy": ("Dataset512_ProstateNPY", "The same prostates as .npy slices (Domain1 to Domain6), for SAM-SDG."),
    "prostate-public": (
        "Dataset513_ProstatePublic",
        "Prostates from the public sources: NCI-ISBI 2013, I2CVB, PROMISE12.",
    ),
    "simulated-vendors": ("Dataset514_SimulatedVendors", "Four SIMULATED vendors on ACDC hearts (SimA to SimD)."),
    "slice-tree": ("Dataset516_SliceTree", "PNG slices in {train,val}/{T2,ADC,GT}, one root per fold; tags or masks."),
    "patch-folder": ("Dataset519_PatchFolder", "Your own RGB patches with a CSV of tags; any number of classes."),
}


def load_converter(name: str) -> Any:
    """Import and return the module of a converter; it has ``FACTS`` and ``command``.

    Args:
        name: a key of :data:`CONVERTERS`.
    """
    return importlib.import_module(f"dataset_conversion.{CONVERTERS[name][0]}")
