"""Where the bridge for nnU-Net's trainer lookup lies, for those who set ``nnUNet_extTrainer`` by hand.

``export nnUNet_extTrainer=$(python -m nnunet_dgplugins.ext)`` in a shell, :func:`register` from Python.
"""

from __future__ import annotations

import os
from pathlib import Path

from nnunet_dgplugins.errors import UserError

VARIABLE = "nnUNet_extTrainer"
SWITCH_OFF = "DGPLUGINS_NO_AUTOLOAD"


def ext_path() -> Path:
    """Return the bridge folder: beside the package when installed, in ``startup/`` of a source tree.

    Raises:
        UserError: neither place has it.
    """
    root = Path(__file__).resolve().parent.parent
    installed = [root, *(Path(p) for p in _site_folders())]
    for folder in [place / "_nnunet_dgplugins_ext" for place in installed] + [
        root / "startup" / "_nnunet_dgplugins_ext"
    ]:
        if (folder / "nnunet_dgplugins_bridge.py").is_file():
            return folder
    raise UserError(f"The bridge folder _nnunet_dgplugins_ext is missing beside {root}: reinstall nnunet_dgplugins.")


def register() -> None:
    """Append the bridge folder to ``nnUNet_extTrainer`` of this process; the user's own entries stay first."""
    entries = [entry for entry in os.environ.get(VARIABLE, "").split(os.pathsep) if entry]
    if str(ext_path()) not in entries:
        os.environ[VARIABLE] = os.pathsep.join([*entries, str(ext_path())])


def _site_folders() -> list[str]:
    # an editable install keeps the package in its checkout and the bridge in site-packages
    import sysconfig

    paths = sysconfig.get_paths()
    return [paths["purelib"], paths["platlib"]]


if __name__ == "__main__":
    print(ext_path())
