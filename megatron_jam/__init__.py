"""Model-parallel training and generation for Joint Autoregressive Mixture models (arXiv 2309.15564)."""

__version__ = "0.1.0"
