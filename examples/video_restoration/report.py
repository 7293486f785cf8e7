"""Show what happened: a table in the terminal, three pictures, and a page that explains them."""

import base64
import html
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # before pyplot: there may be no screen

import matplotlib.pyplot as plt
import torch
from data import HELD_OUT, Pairs
from model import RANK

COLOURS = {"lora_alone": "#8a8f98", "copy_frozen": "#d1495b", "copy_trained": "#1b998b"}
SHORT = {"lora_alone": "LoRA alone", "copy_frozen": "copy frozen\n(the defect)", "copy_trained": "copy training"}
DAMAGES = {"twin": "codec smear", "blocks": "4 x 4 blocks"}
SHOWN = {"blocks": (0.05, 0.45), "twin": (0.05, 0.95)}  # shares of the held-out stretch

Figures = dict[str, Any]
Pictures = dict[str, dict[str, torch.Tensor]]

STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; color: #1d2329; background: #fbfbf9; max-width: 68rem;
       margin: 2.5rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin-bottom: .4rem; } h2 { margin-top: 2.4rem; font-size: 1.25rem; }
p.lead { font-size: 1.1rem; color: #47515b; } figure { margin: 1.2rem 0; }
img { width: 100%; border: 1px solid #e4e4de; border-radius: 6px; background: #fff; }
figcaption, .note { color: #5a646e; font-size: .95rem; }
table { border-collapse: collapse; width: 100%; background: #fff; }
th, td { padding: .55rem .7rem; border-bottom: 1px solid #e4e4de; text-align: right; }
th:first-child, td:first-child { text-align: left; } thead th { border-bottom: 2px solid #c9c9c2; font-weight: 600; }
tr.best td { background: #e8f5f2; font-weight: 600; } code { background: #efefea; padding: .1rem .3rem; }
"""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Restoring a film: does the output layer train?</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{style}</style></head><body>
<h1>Restoring a film: does the output layer train?</h1>
<p class="lead">{lead}</p>
<h2>What a person sees</h2>
<figure><img src="{frames}" alt="damaged, restored and true frames side by side"><figcaption>{frames_caption}
</figcaption></figure>
<h2>What the numbers say</h2>
{table}
<p class="note">{table_caption}</p>
<h2>How it was learnt</h2>
<figure><img src="{losses}" alt="loss curves of the three runs"><figcaption>{losses_caption}</figcaption></figure>
<h2>What trained</h2>
<figure><img src="{trained}" alt="trainable parameters and change of the output layer"><figcaption>{trained_caption}
</figcaption></figure>
<h2>How it was done</h2>
{method}
</body></html>
"""


def table_rows(figures: Figures) -> list[list[str]]:
    """Return the table, its heading first."""
    rows = [
        ["", *(f"PSNR, {name} (dB)" for name in DAMAGES.values()), "colour", "trainable parameters", "seconds"],
        ["before", *(f"{figures['psnr_before'][damage]:.1f}" for damage in DAMAGES), "negative", "", ""],
    ]
    for run in figures["runs"]:
        colour = sum(run["colour"].values()) / len(run["colour"])
        rows.append(
            [
                run["title"],
                *(f"{run['psnr'][damage]:.1f}" for damage in DAMAGES),
                f"{colour:.0%}",
                f"{sum(run['trainable'].values()):,}",
                f"{run['seconds']:.0f}",
            ]
        )
    return rows


def print_table(figures: Figures) -> None:
    """Print the table for a terminal."""
    rows = table_rows(figures)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    print("\nheld-out frames")
    for row in rows:
        print("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))))
    verdict = "bit for bit the same" if figures["fresh_process_equal"] else "DIFFERENT"
    print(f"restored again in a fresh process from the saved adapter: {verdict}")


def write_report(out: Path, figures: Figures, held_out: dict[str, Pairs], pictures: Pictures) -> None:
    """Draw the pictures and write the page that holds them all."""
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    draw_frames(out / "frames.png", figures, held_out, pictures)
    draw_losses(out / "losses.png", figures)
    draw_trained(out / "trained.png", figures)
    images = {name: _embedded(out / f"{name}.png") for name in ("frames", "losses", "trained")}
    page = PAGE.format(style=STYLE, table=_html_table(table_rows(figures)), **images, **_texts(figures))
    (out / "report.html").write_text(page, encoding="utf-8")


def draw_frames(path: Path, figures: Figures, held_out: dict[str, Pairs], pictures: Pictures) -> None:
    """Draw held-out frames: damaged, restored by the three runs, and true."""
    rows = [(damage, share) for damage, shares in SHOWN.items() for share in shares]
    titles = ["what comes in", *SHORT.values(), "the truth"]
    figure, axes = plt.subplots(len(rows), len(titles), figsize=(3.1 * len(titles), 2.68 * len(rows)), squeeze=False)
    for row, (damage, share) in enumerate(rows):
        pairs = held_out[damage]
        frame = int(share * len(pairs.true))
        shown = [pairs.damaged, *(pictures[key][damage] for key in SHORT), pairs.true]
        levels = [figures["psnr_before"][damage], *(run["psnr"][damage] for run in figures["runs"]), None]
        for column, (frames, level) in enumerate(zip(shown, levels)):
            axis = axes[row, column]
            axis.imshow(frames[frame].permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            axis.set_xlabel("" if level is None else f"{level:.1f} dB")
        axes[row, 0].set_ylabel(DAMAGES[damage])
    for axis, title, colour in zip(axes[0], titles, ["#1d2329", *COLOURS.values(), "#1d2329"]):
        axis.set_title(title, color=colour, fontweight="bold")
    _save(figure, path)


def draw_losses(path: Path, figures: Figures) -> None:
    """Draw the loss of the three runs, smoothed."""
    figure, axis = plt.subplots(figsize=(9, 4.2))
    for run in figures["runs"]:
        # The first two runs do the same thing: a dashed line on top of a thick one lets both be seen.
        style = {"lora_alone": {"linewidth": 5, "alpha": 0.55}, "copy_frozen": {"linestyle": "--"}}.get(run["key"], {})
        axis.plot(_smooth(run["losses"]), label=run["title"], color=COLOURS[run["key"]], **{"linewidth": 2, **style})
    axis.set(yscale="log", xlabel="training step", ylabel="loss (log scale)")
    axis.legend(frameon=False)
    axis.grid(alpha=0.25)
    _save(figure, path)


def draw_trained(path: Path, figures: Figures) -> None:
    """Draw how many parameters each run trains, and how far its output layer moved."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.4), width_ratios=[1.5, 1])
    names = [SHORT[run["key"]] for run in figures["runs"]]
    lora, copied = zip(*(_trainable_parts(run) for run in figures["runs"]))
    left.barh(names, lora, color="#8fa7c4", label="LoRA in the attention layers")
    left.barh(names, copied, left=lora, color="#1b998b", label="copy of proj_out")
    left.xaxis.set_major_formatter("{x:,.0f}")
    left.set(xlabel="trainable parameters", xlim=(0, 1.25 * max(map(sum, zip(lora, copied)))))
    left.legend(frameon=False, loc="upper right")
    moved = [100 * run["output_layer_moved"] for run in figures["runs"]]
    bars = right.barh(names, moved, color=list(COLOURS.values()))
    right.bar_label(bars, [f"{value:.0f} %" for value in moved], padding=4)
    right.set(xlabel="change of the output layer's weights", yticks=[], xlim=(0, 1.2 * max(moved) + 1e-6))
    for axis in (left, right):
        axis.invert_yaxis()
    _save(figure, path)


def _texts(figures: Figures) -> dict[str, str]:
    """Return the sentences of the page, with the figures of this very run."""
    frozen, trained = figures["runs"][1], figures["runs"][2]
    gain = {damage: trained["psnr"][damage] - frozen["psnr"][damage] for damage in DAMAGES}
    base, plan, inverted = figures["base"], figures["plan"], figures["psnr_inverted"]
    same = "bit for bit equal" if figures["fresh_process_equal"] else "NOT equal"
    quick = " This was a quick run of a few steps: the pictures come out poor." if figures["quick"] else ""
    return {
        "lead": "A small video transformer has only ever seen black-and-white film. Now it shall restore a damaged "
        "colour negative. Its last layer, <code>proj_out</code>, knows no colour, so the adapter asks for a trained "
        'copy of it: <code>modules_to_save=["proj_out"]</code>. If the copy trains, the film comes back in colour; '
        f"if it is silently left frozen, it stays grey.{quick}",
        "frames_caption": "Frames that no run was trained on. The upper rows came in as 4 x 4 blocks, the lower ones "
        "through a codec that smeared them (that clip ships with the films); all as colour negatives. LoRA alone "
        "makes a coarse grey positive of the negative. With the copy frozen the picture is the same, although the "
        "configuration asked for more. With the copy training, the man has skin, a red bow tie and blue blinds. "
        "What the codec smeared beyond recognition, the mouth in the lower rows, no run brings back.",
        "table_caption": f"The training copy wins {gain['blocks']:.1f} dB on blocks and {gain['twin']:.1f} dB on "
        "smear over the frozen one. PSNR measures closeness to the true frames: more is better, and 3 dB halve the "
        "squared error. Who inverts the negatives by hand and restores nothing gets "
        f"{inverted['blocks']:.1f} and {inverted['twin']:.1f} dB: no run was told that they are negatives, so most of "
        "the way is to develop them, and only what lies above is damage undone. Colour is how colourful the "
        "restored frames are, relative to the true ones. Seconds are those of training.",
        "losses_caption": "The same frames in the same order for all three. The curves of LoRA alone and of the "
        "frozen copy lie on each other: a copy that does not train is no help at all.",
        "trained_caption": "Left: what the optimiser was given. Right: how far the output layer in use ended up "
        "from the base's, as a share of its size. With the defect, only such a count shows what is wrong.",
        "method": f"<p>The base is a <code>CogVideoXTransformer3DModel</code> with {base['parameters']:,} "
        f"parameters. In {plan['base']['steps']} steps it learnt to undo 4 x 4 pixelation of a film in black and "
        f"white ({base['psnr_before']:.1f} dB before, {base['psnr_after']:.1f} dB after). Then each run took "
        f"{plan['adapter']['steps']} steps on the first frames of another film, with the base frozen; the last "
        f"{HELD_OUT} frames were held out. LoRA has rank {RANK} and sits in the attention layers. The defect is "
        "reproduced by freezing the copy by hand.</p><p>The last run's adapter was saved with "
        "<code>save_lora_adapter</code> and loaded with <code>load_lora_adapter</code> in a fresh process; the "
        f"frames restored there are {same} to those before saving. All of it took {figures['seconds']:.0f} s with "
        f"{figures['threads']} threads.</p>",
    }


def _trainable_parts(run: Figures) -> tuple[int, int]:
    """Return how many trainable parameters are LoRA's, and how many the copy's."""
    in_copy = sum(count for name, count in run["trainable"].items() if ".modules_to_save." in name)
    return sum(run["trainable"].values()) - in_copy, in_copy


def _smooth(losses: list[float], keep: float = 0.85) -> list[float]:
    """Return a running average, since single steps see different crops."""
    smooth, average = [], losses[0]
    for loss in losses:
        average = keep * average + (1 - keep) * loss
        smooth.append(average)
    return smooth


def _html_table(rows: list[list[str]]) -> str:
    """Return the table as HTML, the last row marked."""
    head, *body = [[html.escape(cell) for cell in row] for row in rows]
    lines = ["<table><thead><tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr></thead><tbody>"]
    for row in body:
        mark = ' class="best"' if row is body[-1] else ""
        lines.append(f"<tr{mark}>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>")
    return "\n".join([*lines, "</tbody></table>"])


def _embedded(path: Path) -> str:
    """Return a picture as a data URL, so that the page is one file."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")


def _save(figure: plt.Figure, path: Path) -> None:
    """Write a drawing to a file and forget it."""
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
