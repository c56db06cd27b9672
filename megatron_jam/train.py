"""Train a weights folder: `torchrun --nproc_per_node N -m megatron_jam.train --config RUN.yaml`.

Without torchrun it runs on one rank. A run that was interrupted goes on from its last checkpoint.
"""

import sys
from collections.abc import Callable, Mapping

from megatron_jam.config.cli import one_line_errors, tell_torchrun
from megatron_jam.config.log import configure_logging, logger
from megatron_jam.config.signals import catch_signals


def main() -> None:
    """Parse, build, run; exit with EXIT_REQUEUE after a stop on request (training/stop.py)."""
    catch_signals()
    # Imported here: saving a checkpoint spawns a process, which imports this file again.
    from megatron_jam.config.run import load_run_config
    from megatron_jam.evaluation.perplexity import measure_sets
    from megatron_jam.evaluation.sampled_sheet import SampledSheet
    from megatron_jam.models.jam import check_layout
    from megatron_jam.parallel.world import start_world, stop_world
    from megatron_jam.training.health import Unhealthy
    from megatron_jam.training.loop import Training
    from megatron_jam.training.losses import Losses
    from megatron_jam.training.preflight import CopiesDiffer
    from megatron_jam.training.step import ForwardBackward
    from megatron_jam.training.stop import EXIT_REQUEUE, StopRequested
    from megatron_jam.weights.folder import WeightsFolder

    configure_logging()
    with one_line_errors():
        config = load_run_config()
        folder = WeightsFolder(config.weights)
        check_layout(folder.config, config.parallel, config.fp8)
        # Longer than the run's own watch, which says who is late.
        patience = 2 * config.health.hang_seconds / 60 or 60 * 24 * 365
        world = start_world(config.parallel, timeout_minutes=patience)

        def validate(step: ForwardBackward, poll: Callable[[], None]) -> Mapping[str, Losses]:
            return measure_sets(
                step,
                config.validation,
                folder,
                world,
                context_length=config.context_length,
                micro_batch_size=config.micro_batch_size,
                isolate_documents=config.data.isolate_documents,
                poll=poll,
            )

        try:
            sheet = SampledSheet(config, writes=world.rank == 0)
            Training(config, folder, world, validate, [sheet]).run()
        except StopRequested as reason:
            stop_world()
            tell_torchrun(f"no failure: asked to stop by {reason}; the next start goes on")
            sys.exit(EXIT_REQUEUE)
        except (Unhealthy, CopiesDiffer) as reason:
            logger.info("stopped: %s", reason)
            tell_torchrun(f"stopped: {reason}")
            sys.exit(1)
        stop_world()


if __name__ == "__main__":
    main()
