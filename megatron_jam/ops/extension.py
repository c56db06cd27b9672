"""Loads the compiled extension, whose import registers the operators `torch.ops.megatron_jam.*`."""

try:
    from megatron_jam import _C  # noqa: F401
except ImportError as error:
    raise ImportError(
        "the compiled extension megatron_jam._C is missing or was built for another torch: "
        f"run `make setup` in the repository ({error})"
    ) from error
