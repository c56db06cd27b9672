"""Processes that begin with torch and Megatron imported: forks of one server.

Importing them takes seconds, and hundreds of tests need fresh processes.
"""

import multiprocessing

PRELOADED = [
    "megatron_jam.config.cli",
    "megatron_jam.evaluation.perplexity",
    "megatron_jam.parallel.fused",
    "megatron_jam.training.loop",
]
"""Every other module of the package is under one of these or imports in no time."""

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(PRELOADED)
