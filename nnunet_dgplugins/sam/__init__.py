"""SAM as a part: model table, weights in safe mode, encoder with taps, preprocessing, the embedding store."""
