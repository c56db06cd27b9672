"""The weights folder: reading, writing, loading, and the plain-torch reference."""
