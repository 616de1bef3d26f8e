"""EPL: confidence-aware cross pseudo supervision (Yao et al., AAAI 2022, arXiv 2201.08657), one idea per file."""
