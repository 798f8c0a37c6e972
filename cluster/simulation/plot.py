"""A simulation as one picture. Needs matplotlib, which only this module imports."""

from pathlib import Path

import matplotlib as mpl
import numpy as np

from cluster.simulation.report import Report, Slo
from cluster.simulation.simulation import Result

mpl.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.ticker import LogLocator

FORMATS = frozenset(FigureCanvasAgg.get_supported_filetypes()) - {"pgf"}  # which needs LaTeX


def save_plot(path: Path, result: Result, report: Report) -> None:
    """Distributions of TTFT and TPOT, and the load and the hit rate over time. The suffix says the format."""
    figure, ((ttft, tpot), (load, hits)) = pyplot.subplots(2, 2, figsize=(11, 7), layout="constrained")
    figure.suptitle(
        f"{report.trace} x {report.rate_scale:g}, {report.policy}: goodput {report.goodput:.1%}, "
        f"{report.hit_rate:.1%} of prompt tokens cached"
    )
    _distribution(ttft, [each.ttft for each in result.outcomes if each.ttft is not None], report.slo.ttft_s, "TTFT, s")
    _distribution(tpot, [each.tpot for each in result.outcomes if each.tpot is not None], report.slo.tpot_s, "TPOT, s")
    _load(load, result)
    _hits(hits, result, report.slo)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _distribution(axes: Axes, values: list[float], limit: float, label: str) -> None:
    scale = "log" if any(values) else "linear"  # answers of one token have no time for each later one
    axes.set(xlabel=label, ylabel="share of requests", xscale=scale, ylim=(0, 1))
    if values:
        axes.plot(np.sort(values), np.linspace(0, 1, len(values)))
    if scale == "log":
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.axvline(limit, color="black", linestyle=":", label=f"limit {limit:g} s")
    axes.legend()
    axes.grid(alpha=0.3)


def _load(axes: Axes, result: Result) -> None:
    seconds = [sample.seconds for sample in result.samples]
    axes.plot(seconds, [sample.num_waiting for sample in result.samples], label="wait in the router")
    axes.plot(seconds, [sample.num_prefilling for sample in result.samples], label="on prefill workers")
    axes.plot(seconds, [sample.num_decoding for sample in result.samples], label="on decode workers")
    axes.set(xlabel="seconds", ylabel="requests")
    axes.legend()
    axes.grid(alpha=0.3)


def _hits(axes: Axes, result: Result, slo: Slo) -> None:
    """In windows of a sixtieth of the time; nothing is drawn where no request came."""
    axes.set(xlabel="seconds", ylabel="share", ylim=(0, 1))
    if not result.outcomes:
        return
    arrived = np.array([each.arrived for each in result.outcomes])
    edges = np.linspace(0.0, arrived[-1] + 1e-9, 61)
    windows = np.digitize(arrived, edges) - 1
    middle = (edges[1:] + edges[:-1]) / 2

    def per_window(values: list[int]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        return np.bincount(windows, values, minlength=60)[:60].astype(np.float64)

    requests = per_window([1] * len(result.outcomes))
    requests[requests == 0.0] = np.nan
    prompts = per_window([each.num_prompt_tokens for each in result.outcomes]) + 0.0 * requests
    cached = per_window([each.cached_tokens for each in result.outcomes])
    kept = per_window([slo.kept(each) for each in result.outcomes])
    axes.plot(middle, cached / prompts, ".-", label="prompt tokens cached")
    axes.plot(middle, kept / requests, ".-", label="goodput")
    axes.legend()
    axes.grid(alpha=0.3)
