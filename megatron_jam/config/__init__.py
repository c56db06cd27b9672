"""Typed settings, the command line, errors and the logger."""
