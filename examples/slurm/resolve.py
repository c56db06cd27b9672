"""A run's settings as training will see them, checked for a number of ranks, without torch.

    python examples/slurm/resolve.py settings|folder RANKS --config RUN.yaml [--OVERRIDE VALUE ...]

Prints the settings as YAML, or the run's folder alone.
"""

import sys

from megatron_jam.config.cli import one_line_errors
from megatron_jam.config.errors import UsageError
from megatron_jam.config.run import RunConfig, load_run_config


def resolve(ranks: int, arguments: list[str]) -> RunConfig:
    """The settings that `arguments` give.

    Raises:
        UsageError: a setting is unknown or wrong, or the layout does not fit the ranks.
    """
    config = load_run_config(arguments)
    config.parallel.check_micro_batches(config.num_micro_batches(ranks))
    return config


def main() -> None:
    """Parse, resolve, print."""
    with one_line_errors():
        match sys.argv[1:]:
            case ["settings", ranks, *arguments]:
                print(resolve(int(ranks), arguments).as_yaml(), end="")
            case ["folder", ranks, *arguments]:
                print(resolve(int(ranks), arguments).output)
            case _:
                raise UsageError(__doc__.splitlines()[2].strip())


if __name__ == "__main__":
    main()
