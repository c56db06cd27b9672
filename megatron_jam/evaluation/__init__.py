"""Perplexity by modality."""
