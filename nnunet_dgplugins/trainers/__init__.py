"""Where nnU-Net walks in: one file per method, hooks only. Nothing is imported here."""
