"""How much faster is an incremental refit of the probe than a fit from scratch, and does it predict as well?

A window of 4096 rows with two 2560-wide hidden states; each update replaces 512 rows. The reference, on the same rows
in the same run, is the plain scikit-learn pipeline: randomised PCA twice, StandardScaler, Ridge. It runs on BLAS's
default number of threads and on one, which is what the refit uses. Prints tables and writes results/probe_refit.json
and figures/probe_refit.svg.

The rows are synthetic. Groups of two share a prompt. A hidden state is a point in a random 512-dimensional subspace,
with standard deviations falling as i^-0.6 (variances over a range of 1800), far from zero, plus white noise in all
dimensions with a hundredth of the leading standard deviation. The chance of a reward is the logistic function of ten
leading coordinates of each hidden state and of one entropy.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import click
import matplotlib as mpl
import numpy as np
import sklearn
from matplotlib import pyplot as plt
from rich.console import Console
from rich.table import Table
from sklearn.compose import ColumnTransformer
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import ThreadpoolController, threadpool_info

from poise.value.estimators.features import ENTROPY_MEANS, NUM_ENTROPIES, FeatureMatrix, Floats, Label
from poise.value.estimators.probe.incremental import IncrementalFitter

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from tests.support.reference_probe import training_data  # noqa: E402

COMPONENTS = (32, 64)
ALPHA = 100.0
RANK = 512
NUM_SIGNALS = 10


class Source:
    """Labelled groups of two."""

    def __init__(self, width: int, seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        rank = min(RANK, width)
        scale = 10 * np.arange(1, rank + 1) ** -0.6
        self.directions = [
            (np.linalg.qr(self.random.standard_normal((width, rank)))[0] * scale).T.astype(np.float32) for _ in range(2)
        ]
        self.signals = self.random.standard_normal((2, min(NUM_SIGNALS, rank))) / 3

    def groups(self, num_rows: int) -> list[Label]:
        num, rank = num_rows // 2, len(self.directions[0])
        latents = [
            np.repeat(self.random.standard_normal((num, rank), np.float32), 2, axis=0),
            self.random.standard_normal((2 * num, rank), np.float32),
        ]
        hidden = []
        for latent, directions in zip(latents, self.directions, strict=True):
            noise = self.random.standard_normal((2 * num, directions.shape[1]), np.float32)
            hidden.append(3 + latent @ directions + np.float32(0.1) * noise)
        entropies = self.random.standard_gamma(2, (2 * num, NUM_ENTROPIES)).astype(np.float32)
        logits = 0.2 * (2 - entropies[:, ENTROPY_MEANS[0]])
        for latent, signal in zip(latents, self.signals, strict=True):
            logits += latent[:, : len(signal)] @ signal
        rewards = (self.random.random(2 * num) < 1 / (1 + np.exp(-logits))).astype(np.float32)
        return [
            Label("run", 0, str(i), "d", FeatureMatrix(*(x[i : i + 2].copy() for x in (*hidden, entropies))), r)
            for i, r in ((i, rewards[i : i + 2].copy()) for i in range(0, 2 * num, 2))
        ]


def plain_columns(rows: FeatureMatrix) -> Floats:
    return np.concatenate([rows.prompt_hidden, rows.response_hidden, rows.entropies[:, ENTROPY_MEANS]], axis=1)


def plain_fit(columns: Floats, targets: Floats, width: int) -> object:
    """Fit the pipeline as a user of scikit-learn writes it."""
    prompt, response = (PCA(min(k, width - 1), svd_solver="randomized", random_state=0) for k in COMPONENTS)
    reduce = ColumnTransformer(
        [("prompt", prompt, slice(0, width)), ("response", response, slice(width, 2 * width))], remainder="passthrough"
    )
    return make_pipeline(reduce, StandardScaler(), Ridge(alpha=ALPHA)).fit(columns, targets)


@dataclass(frozen=True)
class Update:
    """One update of the window."""

    ours_s: float
    rebuilt: bool
    reference_s: float
    reference_one_thread_s: float
    ours_brier: float
    reference_brier: float


def measure(
    window_rows: int, width: int, new_rows: int, num_updates: int, *, every: int = 1
) -> tuple[list[Update], float]:
    """Return the updates and the seconds of the first fit. The reference fits every `every`-th update."""
    source = Source(width)
    groups, held_out = source.groups(window_rows), source.groups(4096)
    asked, _ = training_data(held_out)
    asked_columns, rewards = plain_columns(asked), np.concatenate([group.rewards for group in held_out])
    fitter = IncrementalFitter(("prompt_hidden", "response_hidden", "entropy"), *COMPONENTS, ALPHA)
    started_s = time.perf_counter()
    fitter.fit(groups)
    first_s = time.perf_counter() - started_s
    updates, threads = [], ThreadpoolController()
    for update in range(num_updates):
        groups = groups[new_rows // 2 :] + source.groups(new_rows)
        started_s = time.perf_counter()
        probe = fitter.fit(groups)
        ours_s = time.perf_counter() - started_s
        reference_s = reference_one_thread_s = reference_brier = float("nan")
        if update % every == 0:
            rows, targets = training_data(groups)
            columns = plain_columns(rows)  # not timed: a user of scikit-learn would keep the rows in this form
            started_s = time.perf_counter()
            plain = plain_fit(columns, targets, width)
            reference_s = time.perf_counter() - started_s
            with threads.limit(limits=1):
                started_s = time.perf_counter()
                plain_fit(columns, targets, width)
                reference_one_thread_s = time.perf_counter() - started_s
            reference_brier = float(np.mean((np.clip(plain.predict(asked_columns), 0, 1) - rewards) ** 2))
        ours_brier = float(np.mean((probe.predict(asked) - rewards) ** 2))
        rebuilt = fitter.num_fits_since_rebuild == 0
        updates.append(Update(ours_s, rebuilt, reference_s, reference_one_thread_s, ours_brier, reference_brier))
    return updates, first_s


def kept_bytes(width: int, num_rows: int) -> int:
    """Return the bytes that a fitter keeps between fits; see poise.value.estimators.probe.incremental."""
    columns = sum(width if width <= 128 else k + 48 for k in COMPONENTS)
    return (8 * num_rows + 16 * width) * columns


def row_of(window_rows: int, width: int, updates: list[Update], first_s: float) -> dict[str, float]:
    compared = [update for update in updates if update.reference_s == update.reference_s]
    return {
        "window_rows": window_rows,
        "width": width,
        "num_updates": len(updates),
        "num_rebuilds": sum(update.rebuilt for update in updates),
        "reference_ms": 1e3 * statistics.median(update.reference_s for update in compared),
        "reference_one_thread_ms": 1e3 * statistics.median(update.reference_one_thread_s for update in compared),
        "first_fit_ms": 1e3 * first_s,
        "refit_ms": 1e3 * statistics.median(update.ours_s for update in updates),
        "refit_mean_ms": 1e3 * statistics.fmean(update.ours_s for update in updates),
        "speedup": statistics.median(update.reference_s / update.ours_s for update in compared),
        "speedup_over_one_thread": statistics.median(
            update.reference_one_thread_s / update.ours_s for update in compared
        ),
        "speedup_in_total": statistics.median(update.reference_s for update in compared)
        / statistics.fmean(update.ours_s for update in updates),
        "ours_brier": statistics.fmean(update.ours_brier for update in compared),
        "reference_brier": statistics.fmean(update.reference_brier for update in compared),
        "brier_gap": statistics.fmean(update.ours_brier - update.reference_brier for update in compared),
        "brier_gap_largest": max((u.ours_brier - u.reference_brier for u in compared), key=abs),
        "kept_bytes": kept_bytes(width, window_rows),
        "window_bytes": 4 * window_rows * (2 * width + NUM_ENTROPIES + 1),
    }


def show(title: str, rows: list[dict[str, float]]) -> None:
    table = Table(title=title)
    columns = {
        "rows": "window_rows",
        "width": "width",
        "scikit-learn ms": "reference_ms",
        "1 thread ms": "reference_one_thread_ms",
        "first fit ms": "first_fit_ms",
        "refit ms": "refit_ms",
        "mean ms": "refit_mean_ms",
        "speedup": "speedup",
        "in total": "speedup_in_total",
        "on 1 thread": "speedup_over_one_thread",
        "Brier gap": "brier_gap",
    }
    for head in (*columns, "kept MB", "window MB"):
        table.add_column(head, justify="right")
    for row in rows:
        cells = [f"{row[key]:+.5f}" if key == "brier_gap" else f"{row[key]:.4g}" for key in columns.values()]
        table.add_row(*cells, *(f"{row[key] / 1e6:.1f}" for key in ("kept_bytes", "window_bytes")))
    Console(width=150).print(table)


def plot(by_rows: list[dict[str, float]], by_width: list[dict[str, float]], path: Path) -> None:
    mpl.rcParams["svg.hashsalt"] = "poise"
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    for axis, rows, key, label in (
        (axes[0], by_rows, "window_rows", "window, rows"),
        (axes[1], by_width, "width", "width of a hidden state"),
    ):
        for series, name, marker in (
            ("reference_ms", "scikit-learn, from scratch", "s"),
            ("first_fit_ms", "first fit", "^"),
            ("refit_ms", "refit", "o"),
        ):
            axis.plot([row[key] for row in rows], [row[series] for row in rows], marker=marker, label=name)
        axis.set(xscale="log", yscale="log", xlabel=label)
        axis.set_xticks([row[key] for row in rows], [str(row[key]) for row in rows])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("ms")
    axes[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def machine() -> dict[str, object]:
    return {
        "processor": next(
            (
                line.split(":")[1].strip()
                for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")
            ),
            platform.processor(),
        ),
        "blas_threads": max(pool["num_threads"] for pool in threadpool_info()),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "scikit_learn": sklearn.__version__,
    }


@click.command()
@click.option("--updates", default=24, show_default=True, help="Updates in the main measurement.")
def main(updates: int) -> None:
    """Compare incremental refits with scikit-learn."""
    main_row = row_of(4096, 2560, *measure(4096, 2560, 512, updates))
    show("512 new rows an update", [main_row])
    by_rows = [row_of(n, 2560, *measure(n, 2560, n // 8, 9, every=3)) for n in (512, 1024, 2048, 4096, 8192)]
    show("growth with the window, an eighth of it new", by_rows)
    by_width = [row_of(4096, d, *measure(4096, d, 512, 9, every=3)) for d in (256, 512, 1024, 2048, 4096)]
    show("growth with the width", by_width)
    plot(by_rows, by_width, HERE / "figures/probe_refit.svg")
    result = {
        "figures": {key: main_row[key] for key in ("speedup", "speedup_in_total", "brier_gap")},
        "machine": machine(),
        "rows": [main_row, *by_rows, *by_width],
    }
    path = HERE / "results/probe_refit.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"speedup {main_row['speedup']:.1f}, brier_gap {main_row['brier_gap']:+.5f}: {path}")


if __name__ == "__main__":
    main()
