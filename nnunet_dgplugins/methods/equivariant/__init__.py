"""Weak supervision from slice tags by cross-modality equivariant constraints (Patel and Dolz, MedIA 2022)."""
