"""FLOPs and memory of a run on paper."""
