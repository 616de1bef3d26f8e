"""D-CAM (Yi et al., MICCAI 2025) on multi-layer pseudo-supervision (Han et al., MedIA 2022), one idea per file."""
