"""One file per source dataset: facts as data at the top, little code; `_common.py` does the work for all of them."""
