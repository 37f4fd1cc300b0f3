"""``python -m train heads RUN ...``: what the attention heads of trained models attend to.

Mean attention weights on windows of the validation split, the same for all runs, FSNs and
transformers alike. A repeat is an earlier token that ends the same two characters. A head copies if
it attends to repeats and couples to their successors (an FSN with its delay), or attends to the
tokens after repeats (an induction head of a transformer). Prints a table; writes JSON and, beside
it, the table and a figure.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fsn_jax import FSNConfig
from fsn_jax.base_layer import attention_entropy
from fsn_jax.causal import attention_weights
from fsn_jax.readings import attention_targets, trace_attention
from train.analysis.figures import legend_above, panels
from train.analysis.kinds import kind_of, styles
from train.analysis.windows import add_window_options, check_alike, validation_windows
from train.config import ModelConfig
from train.files import check_json_output, default_output, write_result
from train.load import TrainedModel, load
from train.program import Arguments, start_jax
from train.provenance import provenance
from train.tables import text_table

TITLES = {
    "itself": "itself",
    "previous": "the token before",
    "repeat": "repeats of two characters",
    "after_repeat": "tokens after such repeats",
}
"""Of the fields of ``AttentionTargets``."""


def head_names(config: ModelConfig) -> list[str]:
    """Returns what the heads of a layer are called."""
    similarity = config.similarity_heads if isinstance(config, FSNConfig) else 0
    return [
        f"head {h + 1}{' (similarity)' if h < similarity else ''}" for h in range(config.num_heads)
    ]


def even_attention(tokens: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    """Returns weights that are the same for all tokens that each can attend to, [B, 1, L, L]."""
    nothing = jnp.zeros((tokens.shape[0], 1, tokens.shape[1], 0))
    return attention_weights(nothing, nothing, segment_ids)


@jax.jit
def measure_attention(
    attention: jax.Array, tokens: jax.Array, segment_ids: jax.Array | None = None
) -> dict[str, Any]:
    """Computes entropy, relative entropy and targets of each head, from weights ``[B, H, L, L]``.

    The entropy, in nats, is a mean over the tokens that have a choice; relative to the logarithm of
    the number of tokens that each can attend to it is from 0 to 1.
    """
    entropy = attention_entropy(attention)
    most = attention_entropy(even_attention(tokens, segment_ids))
    choice = most > 0
    relative = entropy / jnp.where(choice, most, 1.0)
    return {
        "attention_entropy": entropy.mean(axis=(0, 2), where=choice),
        "relative_entropy": relative.mean(axis=(0, 2), where=choice),
        "attention_to": attention_targets(attention, tokens, segment_ids)._asdict(),
    }


def rounded(values: Any) -> Any:
    """Returns arrays, in a tree, as lists of numbers of five decimals."""
    return jax.tree.map(lambda x: np.round(np.asarray(x, np.float64), 5).tolist(), values)


def measure(
    folders: Sequence[str],
    *,
    checkpoint: str = "latest",
    num_windows: int = 64,
    length: int = 0,
    data_path: str = "",
) -> dict[str, Any]:
    """Reads the heads of runs and returns the content of the JSON file.

    Raises:
      UserError: a run cannot be loaded, or the runs have different data, segments or contexts that
        are too short.
    """
    every = [load(folder, which=checkpoint, data_path=data_path) for folder in folders]
    check_alike(every)
    shortest = min(every, key=lambda trained: trained.experiment.data.context)
    tokens, segment_ids = validation_windows(shortest, num_windows, length)
    even = attention_targets(even_attention(tokens, segment_ids), tokens, segment_ids)
    return {
        "kind": "heads",
        "split": "validation",
        "windows": num_windows,
        "length": tokens.shape[1],
        "provenance": provenance(shortest.corpus),
        "even_attention": {place: share for place, (share,) in rounded(even._asdict()).items()},
        "runs": [read_heads(trained, tokens, segment_ids) for trained in every],
    }


_trace = jax.jit(trace_attention, static_argnums=0)
"""Of the module, so that the seeds of an arm share one program."""


def read_heads(
    trained: TrainedModel, tokens: jax.Array, segment_ids: jax.Array | None
) -> dict[str, Any]:
    """Returns what the heads of one run attend to, as plain values."""
    variables = {"params": jax.device_get(trained.params)}
    layers = _trace(trained.model, variables, tokens, segment_ids)
    return {
        "name": trained.experiment.name,
        **trained.source,
        "model": kind_of(trained.experiment.to_dict()["model"]),
        "heads": head_names(trained.experiment.model),
        "layers": [rounded(measure_attention(layer, tokens, segment_ids)) for layer in layers],
    }


def table_text(result: dict[str, Any]) -> str:
    """Formats one line a head, and one for even attention."""
    rows: list[tuple[str, ...]] = [("run", "layer", "head", *TITLES, "entropy")]
    even = (f"{result['even_attention'][target]:.3f}" for target in TITLES)
    rows.append(("even attention", "-", "-", *even, "1.000"))
    for run in result["runs"]:
        for number, layer in enumerate(run["layers"], 1):
            for head, name in enumerate(run["heads"]):
                shares = (f"{layer['attention_to'][target][head]:.3f}" for target in TITLES)
                entropy = f"{layer['relative_entropy'][head]:.3f}"
                rows.append((run["run"], str(number), name, *shares, entropy))
    return (
        f"{result['windows']} windows of {result['length']} characters of validation; mean weights "
        f"over the tokens that have\nsuch targets, and entropy relative to the logarithm of what a "
        f"token can attend to\n\n{text_table(rows)}"
    )


def draw(result: dict[str, Any], target: Path) -> None:
    """Draws the weight of each head by layer, a panel for each target but the token itself."""
    shown = list(TITLES)[1:]
    runs = result["runs"]
    looks = styles([(run["run"], run["model"]) for run in runs])
    with panels(target, 1, len(shown), figsize=(11, 3.4), sharey=True) as axes:
        for axis, place in zip(axes, shown, strict=True):
            for index, (run, style) in enumerate(zip(runs, looks, strict=True)):
                share = np.array([layer["attention_to"][place] for layer in run["layers"]])
                x = np.arange(1, len(share) + 1) + 0.15 * (index - (len(runs) - 1) / 2)
                similarity = np.array(["similarity" in name for name in run["heads"]])
                dots = {"color": style.colour, "ms": 5, "ls": ""}
                axis.plot(x, share[:, ~similarity][:, :1], "o", label=style.label, **dots)
                axis.plot(x, share[:, ~similarity][:, 1:], "o", **dots)
                if similarity.any():
                    label = f"{style.label}, similarity head"
                    axis.plot(x, share[:, similarity][:, :1], "o", label=label, mfc="none", **dots)
                    axis.plot(x, share[:, similarity][:, 1:], "o", mfc="none", **dots)
            even = result["even_attention"][place]
            axis.axhline(even, color="0.4", lw=1, ls="--", label="even attention")
            axis.set_title(TITLES[place])
            axis.set_xlabel("layer")
            axis.set_xticks(range(1, max(len(run["layers"]) for run in runs) + 1))
        axes[0].set_ylabel("mean attention weight of a head")
        axes[0].set_ylim(0, 1)
        legend_above(axes[0])


def program(argv: Sequence[str]) -> None:
    """Runs the program with the arguments of its command line."""
    p = Arguments(prog="python -m train heads", description=__doc__)
    p.add_argument("runs", nargs="+", help="folders of runs with checkpoints")
    p.add_argument("--output", help="a .json; else heads.json with the runs")
    p.add_checkpoint_options("latest")
    add_window_options(p, windows=64)
    options = p.parse_args(argv[1:])
    output = check_json_output(options.output or default_output(options.runs, "heads.json"))
    start_jax()
    result = measure(
        options.runs,
        checkpoint=options.checkpoint,
        num_windows=options.windows,
        length=options.length,
        data_path=options.data_path,
    )
    drawn = functools.partial(draw, result)
    write_result(output, result, table_text(result), drawn, indent=None)
