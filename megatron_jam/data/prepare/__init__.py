"""Raw files become documents: readers, layouts, workers, and what survives a kill."""
