"""SAM-SDG: boxes of a coarse network prompt SAM, four slices per canvas (arXiv 2401.02076), one idea per file."""
