"""Model-parallel training and generation of Joint Autoregressive Mixtures (arXiv 2309.15564)."""

__version__ = "0.1.0"
