"""Whether a weights folder is still what was written."""

from pathlib import Path

from megatron_jam.config.errors import UsageError
from megatron_jam.weights.folder import WeightsFolder
from megatron_jam.weights.load import check_tensors
from megatron_jam.weights.stream import tensor_sha256


def verify(path: Path) -> int:
    """Check index, shapes, vocabulary, and the hash of every tensor.

    Returns:
        How many tensors there are.

    Raises:
        UsageError: something is missing, unknown or changed; the message names it.
    """
    folder = WeightsFolder(path)
    check_tensors(folder)
    recorded = folder.provenance.get("sha256", {})
    for name in folder.names:
        if name not in recorded:
            raise UsageError(f"{path}: provenance.json has no sha256 of {name}")
        if tensor_sha256(folder.read(name)) != recorded[name]:
            raise UsageError(
                f"{path}: {name} is not what was written, by its sha256: make or copy it again"
            )
    return len(folder.names)
