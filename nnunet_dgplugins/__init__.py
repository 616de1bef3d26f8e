"""Domain generalisation, weak and semi-supervised methods as native nnU-Net v2 trainers."""

__version__ = "0.1.0"
