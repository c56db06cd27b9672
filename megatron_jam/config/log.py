"""The package's one logger. Rank 0 speaks; the other ranks speak from WARNING up."""

import logging
import os
import sys
import warnings

# Megatron-Core warns of every optional package that is not there, on every rank; which fused parts
# are in use is said once by the run itself.
warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
# Megatron-Core calls collectives by names that torch means to rename.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
# Megatron-Core imports it; a CUDA build of torch then warns wherever it sees a toolkit but no GPU.
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)

logger = logging.getLogger("megatron_jam")


def configure_logging() -> None:
    """Send the logger to standard error, one plain line a record."""
    if logger.handlers:
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logger.addHandler(handler)
    logger.propagate = False
    logger.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
