"""The published methods, one folder each, in PyTorch and NumPy; nothing here knows nnU-Net."""
