"""Faces of the csrc extension, each beside its plain-torch reference."""
