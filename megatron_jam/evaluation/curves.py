"""Pictures of a run, drawn from its metrics.jsonl alone."""

import base64
import html
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megatron_jam.config.errors import UsageError
from megatron_jam.config.files import publish, temporary_name, write_text_atomically
from megatron_jam.training.metrics import AVERAGE, METRICS, duration, read_metrics, stated

COLORS = plt.get_cmap("tab10").colors  # type: ignore[attr-defined]
FEW = 50
STYLES = ("-", "--", ":", "-.")
"""Of the first, second, ... run where several are drawn together."""


@dataclass(frozen=True, kw_only=True)
class Curves:
    """What one run measured, by step."""

    name: str
    train: list[dict[str, Any]]
    validation: list[dict[str, Any]]

    @classmethod
    def read(cls, run: Path) -> "Curves":
        """Those of a run's folder.

        Raises:
            UsageError: it has no metrics.jsonl, or nothing stands in it.
        """
        path = run / METRICS
        if not path.is_file():
            raise UsageError(f"{run} has no {METRICS}: name the output folder of a training run")
        try:
            lines = read_metrics(path)
        except ValueError as error:
            raise UsageError(f"{path} is damaged: {error}") from error
        train = [line for line in lines if line["kind"] == "train"]
        if not train:
            raise UsageError(f"{path} has no training steps yet: nothing to draw")
        validation = [line for line in lines if line["kind"] == "validation"]
        return cls(name=run.resolve().name, train=train, validation=validation)

    def of(self, name: str, key: str = "") -> tuple[list[int], list[float]]:
        """Steps and values of a number, or of one entry of a map of numbers."""
        pairs = [
            (line["step"], line[name][key] if key else line[name])
            for line in self.train
            if (line.get(name, {}).get(key) if key else line.get(name)) is not None
        ]
        return [step for step, _ in pairs], [value for _, value in pairs]

    def keys(self, name: str) -> list[str]:
        """Entries that a map of numbers has in any step, in their order."""
        return list(dict.fromkeys(key for line in self.train for key in line.get(name, {})))

    def perplexities(self, set_name: str) -> tuple[list[int], list[float]]:
        """Steps and perplexities of a validation set."""
        measured = [(x["step"], x["perplexity"]) for x in self.validation if x["set"] == set_name]
        known = [(step, perplexity["all"]) for step, perplexity in measured if "all" in perplexity]
        return [step for step, _ in known], [value for _, value in known]

    @property
    def sets(self) -> list[str]:
        """Validation sets, with their average if they have one."""
        return list(dict.fromkeys(line["set"] for line in self.validation))


def draw(runs: Sequence[Curves]) -> Figure:
    """All panels, of one run or of several over one another."""
    panels: list[tuple[str, Callable[[Axes, Curves, str], None], bool]] = [
        ("loss by kind of token, nats", _by_kind, False),
        ("loss by data set, nats", _by_set, False),
        ("validation perplexity", _perplexities, True),
        ("norm of the gradient and its parts", _norms, True),
        ("learning rate", _rate, False),
        ("tokens a second and rank", _tokens, False),
        ("a step's time, ms", _times, False),
        ("peak memory of a rank, GB", _memory, False),
    ]
    figure, grid = plt.subplots(2, 4, figsize=(20, 9), layout="constrained")
    for axes, (title, panel, is_log) in zip(grid.flat, panels, strict=True):
        for run, style in zip(runs, STYLES, strict=False):
            panel(axes, run, style)
        axes.set_title(title, fontsize=11, loc="left")
        axes.set_xlabel("step", fontsize=9)
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.tick_params(labelsize=8)
        if axes.has_data():
            axes.set_yscale("log" if is_log else "linear")
            for line in axes.get_lines():
                if len(line.get_xdata()) <= FEW:  # a single one would not be seen
                    line.set_marker(".")
            if axes.get_legend_handles_labels()[1]:
                axes.legend(fontsize=8)
        else:
            axes.text(0.5, 0.5, "nothing measured", ha="center", transform=axes.transAxes)
    names = ", ".join(f"{run.name} ({style})" for run, style in zip(runs, STYLES, strict=False))
    figure.suptitle(names if len(runs) > 1 else runs[0].name, fontsize=13)
    return figure


def _by_kind(axes: Axes, run: Curves, style: str) -> None:
    _lines(axes, run, "loss_by_modality", style)
    axes.plot(*run.of("loss"), style, color="black", label=_label("all", style), linewidth=2)


def _by_set(axes: Axes, run: Curves, style: str) -> None:
    _lines(axes, run, "loss_by_set", style)


def _perplexities(axes: Axes, run: Curves, style: str) -> None:
    for number, name in enumerate(run.sets):
        color = "black" if name == AVERAGE else COLORS[number % len(COLORS)]
        steps, values = run.perplexities(name)
        axes.plot(steps, values, style, color=color, label=_label(name, style))


def _norms(axes: Axes, run: Curves, style: str) -> None:
    _lines(axes, run, "grad_norm_by_part", style)
    axes.plot(*run.of("grad_norm"), style, color="black", label=_label("whole", style), linewidth=2)


def _rate(axes: Axes, run: Curves, style: str) -> None:
    axes.plot(*run.of("learning_rate"), style, color=COLORS[0])


def _tokens(axes: Axes, run: Curves, style: str) -> None:
    _from_zero(axes, *run.of("tokens_per_second_per_rank"), style)


def _times(axes: Axes, run: Curves, style: str) -> None:
    names = run.keys("seconds")
    if style == STYLES[0] and names:
        steps, _ = run.of("seconds", names[0])
        parts = [
            [1e3 * line["seconds"][n] for line in run.train if "seconds" in line] for n in names
        ]
        labels = [name.replace("_", "-") for name in names]
        axes.stackplot(steps, *parts, labels=labels, alpha=0.7)
    elif names:
        steps, seconds = run.of("seconds_per_step")
        axes.plot(steps, [1e3 * each for each in seconds], style, color="black")


def _memory(axes: Axes, run: Curves, style: str) -> None:
    steps, values = run.of("peak_memory_bytes")
    _from_zero(axes, steps, [each / 1e9 for each in values], style)


def _from_zero(axes: Axes, steps: list[int], values: list[float], style: str) -> None:
    if steps:
        axes.plot(steps, values, style, color=COLORS[0])
        axes.set_ylim(0, 1.1 * axes.dataLim.ymax)


def _lines(axes: Axes, run: Curves, name: str, style: str) -> None:
    for number, key in enumerate(run.keys(name)):
        color = COLORS[number % len(COLORS)]
        axes.plot(*run.of(name, key), style, color=color, label=_label(key, style))


def _label(name: str, style: str) -> str | None:
    return name if style == STYLES[0] else None


def save_png(figure: Figure, path: Path) -> None:
    """Write the figure, whole or not at all."""
    temporary = temporary_name(path)
    figure.savefig(temporary, format="png", dpi=110)
    publish(temporary, path)


def save_html(figure: Figure, runs: Sequence[Curves], path: Path) -> None:
    """Write one self-contained page: the figure, and a table of each run's last figures."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    picture = base64.b64encode(buffer.getvalue()).decode()
    tables = "\n".join(_table(run) for run in runs)
    title = html.escape(", ".join(run.name for run in runs))
    text = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1500px; padding: 0 1em }}
img {{ width: 100% }}
table {{ border-collapse: collapse; margin: 1em 0 2em }}
th, td {{ border-bottom: 1px solid #ddd; padding: .2em 1em .2em 0; text-align: left }}
</style></head>
<body><h1>{title}</h1>
<img alt="curves of losses, perplexities, gradients, rates, speed, times and memory"
 src="data:image/svg+xml;base64,{picture}">
{tables}
</body></html>
"""
    write_text_atomically(path, text)


def _table(run: Curves) -> str:
    rows = "\n".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
        for name, value in summary(run).items()
    )
    return f"<h2>{html.escape(run.name)}</h2>\n<table>\n{rows}\n</table>"


def summary(run: Curves) -> dict[str, str]:
    """A run's last and middle figures, to read."""
    last = run.train[-1]
    speeds = sorted(run.of("tokens_per_second_per_rank")[1])
    kinds = _pairs(last.get("loss_by_modality", {}), ".3f")
    parts = _pairs(last.get("grad_norm_by_part", {}), ".3g")
    found = {
        "steps": f"{last['step']:,}",
        "loss": f"{stated(last['loss'], '.4f')} ({kinds})",
        "gradient": f"{stated(last['grad_norm'], '.3g')} ({parts})",
    }
    if "tokens" in last:
        found["tokens"] = f"{last['tokens']:,}"
    if speeds:
        found["median speed"] = f"{speeds[len(speeds) // 2]:,.0f} tokens/s and rank"
        found["last step's speed"] = (
            f"{last['tflops']:.3g} TFLOP/s a rank ({last['tflops_full']:.3g} with whole score"
            f" matrices), MFU {stated(last['mfu'], '.1%')}"
        )
        found["peak memory of a rank"] = f"{last['peak_memory_bytes'] / 1e9:.2f} GB"
        found["time left at the end of the log"] = duration(last["seconds_left"])
    for name in run.sets:
        steps, values = run.perplexities(name)
        best = min(range(len(values)), key=values.__getitem__)
        found[f"validation {name}"] = (
            f"perplexity {values[-1]:.2f} at step {steps[-1]:,}; lowest {values[best]:.2f} at step"
            f" {steps[best]:,}"
        )
    return found


def _pairs(values: Mapping[str, float], form: str) -> str:
    return ", ".join(f"{name} {value:{form}}" for name, value in values.items())
