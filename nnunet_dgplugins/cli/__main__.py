"""``python -m nnunet_dgplugins.cli``."""

from nnunet_dgplugins.cli.main import main

if __name__ == "__main__":
    main()
