"""Table and picture of `benchmarks.papers.alignment`, from its JSON alone."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks import probe

__all__ = ["plot", "table"]

COLOURS = {"M, gradient steps": "#D55E00", "S, gradient steps": "#0072B2",
           "M, default RMSProp": "#E69F00", "S, default RMSProp": "#56B4E9"}  # fmt: skip


def table(body: dict[str, Any]) -> str:
    """Markdown: means over layers and seeds at three T, with the damping factor and the reference's own cosine with
    the gradient in brackets."""
    shown = [body["steps"].index(t) for t in (1, 10, body["steps"][-1])]
    lines = []
    for state, curves in body["states"].items():
        head = ["local steps", "cosine with", *(f"T = {body['steps'][n]}" for n in shown)]
        rows = []
        for c in curves:
            cells = [f"{mean(c['mean'][n]):.2f}" for n in shown]
            if c["reference"] != "gradient":
                cells = [f"{cell} ({c['factors'][n]:g}; {c['reference and gradient'][n]:.2f})"
                         for cell, n in zip(cells, shown, strict=True)]  # fmt: skip
            rows.append([c["solver"], c["reference"], *cells])
        lines.append(f"\n{state}: cosine (damping factor; cosine of the reference with the gradient)\n")
        lines.append(probe.table(head, rows, numbers=False))
    return "\n".join(lines)


def plot(path: Path, body: dict[str, Any]) -> None:
    """A row for each layer, a column for each reference; dotted at the first state, solid at the last."""
    from matplotlib.lines import Line2D

    sizes = body["model"].split("-")
    references = list(dict.fromkeys(c["reference"] for curves in body["states"].values() for c in curves))
    figure = probe.figure(11, 11.5, dpi=100)
    axes = figure.subplots(len(sizes) - 1, len(references), sharex=True, sharey=True)
    for number, curves in enumerate(body["states"].values()):
        for c in curves:
            for layer in range(len(sizes) - 1):
                ax = axes[layer][references.index(c["reference"])]
                colour, style = COLOURS[c["solver"]], (":", "-")[number]
                ax.plot(body["steps"], [row[layer] for row in c["mean"]], style, color=colour, linewidth=1.7)
                if number:
                    low, high = ([row[layer] for row in c[end]] for end in ("low", "high"))
                    ax.fill_between(body["steps"], low, high, color=colour, alpha=0.15, linewidth=0)
    for column, reference in enumerate(references):
        axes[0][column].set_title(f"with {reference}" + (" step" if column else ""), fontsize=11)
        axes[-1][column].set_xlabel("local steps T")
    for layer in range(len(sizes) - 1):
        axes[layer][0].set_ylabel(f"layer {layer + 1}: {sizes[layer]}-{sizes[layer + 1]}\ncosine")
        for ax in axes[layer]:
            ax.set(xscale="log", ylim=(0, 1.03), xticks=[1, 2, 5, 10, 20, 50], yticks=[0, 0.25, 0.5, 0.75, 1])
            ax.set_xticklabels(["1", "2", "5", "10", "20", "50"])
            ax.minorticks_off()
            ax.grid(color="#dddddd", linewidth=0.6)
            ax.spines[["top", "right"]].set_visible(False)
    handles = [Line2D([], [], color=colour, label=name) for name, colour in COLOURS.items()]
    dotted, solid = body["states"]
    handles += [Line2D([], [], color="#333333", linestyle=":", label=dotted),
                Line2D([], [], color="#333333", linestyle="-", label=solid)]  # fmt: skip
    figure.legend(handles=handles, loc="outside upper center", ncol=6, frameon=False, fontsize=9)
    probe.save(figure, path)
