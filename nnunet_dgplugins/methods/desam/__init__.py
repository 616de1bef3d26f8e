"""DeSAM: Decoupled Segment Anything Model (Gao et al., MICCAI 2024, arXiv 2306.00499), one idea per file."""
