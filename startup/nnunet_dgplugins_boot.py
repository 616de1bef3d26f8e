"""Run by Python's start-up file: tells nnU-Net where the trainers' bridge lies.

Kept free of imports beyond ``os`` (already loaded by Python itself), because it runs at every start of Python.
``DGPLUGINS_NO_AUTOLOAD=1`` switches it off; then set ``nnUNet_extTrainer`` to ``python -m nnunet_dgplugins.ext``.
"""

import os

_VARIABLE = "nnUNet_extTrainer"


def register() -> None:
    """Append the bridge folder beside this file to ``nnUNet_extTrainer``; entries of the user stay first."""
    if os.environ.get("DGPLUGINS_NO_AUTOLOAD", "").lower() in ("1", "true", "t", "yes"):
        return
    folder = os.path.join(os.path.dirname(os.path.abspath(__file__)), "_nnunet_dgplugins_ext")
    entries = [entry for entry in os.environ.get(_VARIABLE, "").split(os.pathsep) if entry]
    if folder not in entries:
        os.environ[_VARIABLE] = os.pathsep.join([*entries, folder])


register()
