"""Case table, splits and loaders. Nothing is imported here: the table must be readable without torch."""
