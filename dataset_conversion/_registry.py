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
    "mnms": ("Dataset507_MnMs", "M&Ms, cardiac cine MR of four vendors; few labels (--target, --ratio)."),
    "scgm": ("Dataset508_SCGM", "Spinal cord grey matter of four sites, four raters; few labels."),
    "simulated-vendors": ("Dataset514_SimulatedVendors", "Four SIMULATED vendors on ACDC hearts (SimA to SimD)."),
}


def load_converter(name: str) -> Any:
    """Import and return the module of a converter; it has ``FACTS`` and ``command``.

    Args:
        name: a key of :data:`CONVERTERS`.
    """
    return importlib.import_module(f"dataset_conversion.{CONVERTERS[name][0]}")
