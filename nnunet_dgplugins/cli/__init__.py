"""The ``dgplugins`` command: one small file per sub-command, imported only when it is called."""

from nnunet_dgplugins.cli.main import main

__all__ = ["main"]
