"""Prostate T2 MR from the public sources behind the six sites: NCI-ISBI 2013, I2CVB and PROMISE12.

NCI-ISBI 2013 (module ``_nci_isbi``): DICOM below ``Prostate3T-01-0001`` and ``ProstateDx-01-0001``, masks
``{Training,Leaderboard,Test}/<subject>.nrrd``. I2CVB (``_i2cvb``): DICOM in ``Patient 383/T2W`` and
``Patient 383/GT/prostate``. PROMISE12 (``_promise12``): ``CaseNN.mhd``, ``CaseNN_segmentation.mhd``.
Masks are put on the grid of their image by physical coordinates.
"""

from __future__ import annotations

from pathlib import Path

import click

from dataset_conversion import _i2cvb, _nci_isbi, _promise12
from dataset_conversion._command import make_command, run_as_script
from dataset_conversion._facts import Facts, Listing, Request, Site
from nnunet_dgplugins.errors import UserError

FACTS = Facts(
    command="prostate-public",
    dataset_id=513,
    name="ProstatePublic",
    sites=(
        Site("RUNMC", ("A", "ISBI", "A-ISBI", "Prostate3T", "Prostate-3T")),
        Site("BMC", ("B", "ISBI_1.5", "B-ISBI_1.5", "ProstateDx", "PROSTATE-DIAGNOSIS")),
        Site("I2CVB", ("C", "C-I2CVB", "Siemens")),
        Site("UCL", ("D", "D-UCL")),
        Site("BIDMC", ("E", "E-BIDMC")),
        Site("HK", ("F", "F-HK")),
        Site("PROMISE12"),
        # not among the six sites: other scanner, and the hospital of site A once more
        Site("I2CVB-GE", ("GE",), default=False),
        Site("RUNMC-PROMISE12", default=False),
    ),
    channel_names={"0": "T2"},
    labels={"background": 0, "prostate": 1},
    mapping={0: 0, 1: 1, 2: 1},
    zone_labels={"background": 0, "PZ": 1, "TZ": 2},
    zone_mapping={0: 0, 1: 1, 2: 2},
    splits=("kfold", "desam"),
    neighbours=True,
    reference="https://www.cancerimagingarchive.net/, https://zenodo.org/records/162231, https://promise12.grand-challenge.org/",
    licence="as the sources (NCI-ISBI 2013, I2CVB, PROMISE12): research use",
)


def list_cases(root: Path, request: Request, listing: Listing) -> None:
    """List the cases of each download: those named by their options, or all that lie below the root."""
    named = {"nci_isbi": request.nci_isbi, "i2cvb": request.i2cvb, "promise12": request.promise12}
    roots = named if any(named.values()) else dict.fromkeys(named, root)
    for folder in filter(None, roots.values()):
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder.")
    if roots["nci_isbi"] is not None:
        _nci_isbi.list_cases(roots["nci_isbi"], listing)
    if roots["i2cvb"] is not None:
        _i2cvb.list_cases(roots["i2cvb"], listing)
    if roots["promise12"] is not None:
        _promise12.list_cases(roots["promise12"], request.site_map, FACTS, listing)
    elif request.site_map is not None:
        raise UserError("--site-map says the sites of PROMISE12's cases; name its folder with --promise12.")


_folder = click.Path(path_type=Path)
command = make_command(
    FACTS,
    list_cases,
    "Convert prostates from public sources: ROOT holds them all, or name each with its option.",
    click.option("--nci-isbi", type=_folder, metavar="DIR",
                 help="NCI-ISBI 2013: DICOM of Prostate-3T and PROSTATE-DIAGNOSIS, and the NRRD masks."),
    click.option("--i2cvb", type=_folder, metavar="DIR", help="I2CVB: folders Patient N below Siemens and GE."),
    click.option("--promise12", type=_folder, metavar="DIR", help="PROMISE12: the training data."),
    click.option("--site-map", type=click.Path(path_type=Path, dir_okay=False),
                 help="CSV or JSON with the site of each case of PROMISE12. [default: one site, PROMISE12]"),
    roots=("nci_isbi", "i2cvb", "promise12"),
)  # fmt: skip

if __name__ == "__main__":
    run_as_script(command)
