"""The scale ladder on enwik8: ``python -m train ladder --config=configs/ladder.py --arms=ARMS``.

One arm, a kind of model at a rung, is a config too: ``--config=configs/ladder.py:fsn_4m``. The
kinds are explained in ``configs/enwik8.py``. All arms of a rung have the same number of parameters
within 1%, the same batches and the same budget: about 100 characters a parameter. Up to the 1m rung
a CPU will do, for instance ``--arms=fsn_60k,transformer_60k``, and a step has 16 windows of 256
characters; above it an accelerator is wanted, and a step has 64 windows of 512. Every rung has
``fsn``, ``projected`` and ``transformer``; those of the long runs (``configs/long.py``), 500k and
1m, have all kinds.

======  ==========  ======  ===================  ==========  ===========  =============
rung    parameters  layers  characters (epochs)  FLOPs, fsn  projected    transformer
======  ==========  ======  ===================  ==========  ===========  =============
60k     0.06M       4       5.7M (0.06)          7.4e12      4.3e12       3.0e12
120k    0.12M       4       12.3M (0.1)          2.6e13      1.6e13       1.2e13
pocket  0.23M       4       20.5M (0.2)          6.6e13      4.5e13       3.5e13
500k    0.5M        5       50M (0.6)            3.3e14      2.3e14       1.8e14
1m      1.0M        6       100M (1.1)           1.1e15      7.3e14       6.9e14
2m      2.0M        8       203M (2.3)           5.8e15      3.3e15       3.1e15
4m      4.0M        8       400M (4.4)           1.9e16      1.2e16       1.1e16
8m      8.0M        10      800M (8.9)           6.7e16      4.8e16       4.4e16
16m     16.0M       12      1599M (18)           2.4e17      1.8e17       1.7e17
======  ==========  ======  ===================  ==========  ===========  =============

FLOPs are of the whole training, forward and backward, counted by ``flops_per_token``. The pocket
arms are those of ``configs/enwik8.py``, the others the same designs at another width and depth, the
projected FSN from the 1m rung on with one head a phase; the width of the feed-forward gives a rung
its size. Learning rates are those tuned at the pocket rung, times (width of the pocket rung /
width) on wider ones, for all arms alike, and not tuned again.
"""

import dataclasses
import functools
from typing import Any

from ml_collections import ConfigDict

from configs import check_arm, enwik8
from fsn_jax import TransformerConfig
from fsn_jax.config import match_parameters
from train.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    TrainingConfig,
    experiment,
)

CHARACTERS_PER_PARAMETER = 100
EVALUATIONS = 20


@dataclasses.dataclass(frozen=True)
class Rung:
    """A size that all arms have.

    Attributes:
      num_params: aimed at.
      num_layers: blocks.
      width: N of an FSN and D of a transformer.
      num_heads: H of the transformer; an FSN has half as many.
      heads_per_phase: J of the projected FSN: one from 1m on, as it lost nothing and costs less
        (docs/protocol.md).
      batch_size: B.
      context: L.
      validation: bytes of that split at each evaluation.
      kinds: kinds of models, of configs/enwik8.py.
    """

    num_params: int
    num_layers: int
    width: int
    num_heads: int
    heads_per_phase: int = 1
    batch_size: int = 64
    context: int = 512
    validation: int = enwik8.LONG_VALIDATION
    kinds: tuple[str, ...] = ("fsn", "projected", "transformer")


CPURung = functools.partial(
    Rung,
    heads_per_phase=enwik8.PROJECTED_POCKET.heads_per_phase,
    batch_size=16,
    context=256,
    validation=enwik8.VALIDATION,
)
LongCPURung = functools.partial(CPURung, validation=enwik8.LONG_VALIDATION, kinds=enwik8.KINDS)
POCKET = CPURung(
    enwik8.TRANSFORMER_POCKET.num_params(),
    enwik8.TRANSFORMER_POCKET.num_layers,
    enwik8.TRANSFORMER_POCKET.width,
    enwik8.TRANSFORMER_POCKET.num_heads,
)
RUNGS = {
    "60k": CPURung(60_000, 4, 32, 4),
    "120k": CPURung(120_000, 4, 48, 4),
    "pocket": POCKET,
    "500k": LongCPURung(500_000, 5, 96, 4),
    "1m": LongCPURung(1_000_000, 6, 112, 4, heads_per_phase=1),
    "2m": Rung(2_000_000, 8, 136, 4),
    "4m": Rung(4_000_000, 8, 192, 6),
    "8m": Rung(8_000_000, 10, 240, 6),
    "16m": Rung(16_000_000, 12, 312, 6),
}
ARMS = tuple(f"{kind}_{name}" for name, rung in RUNGS.items() for kind in rung.kinds)


def model_of(arm: str) -> ModelConfig:
    """The model of an arm: the pocket one, or the same design at the rung's size."""
    kind, name = arm.split("_")
    pocket = enwik8.POCKET[kind]
    if name == "pocket":
        return pocket
    rung = RUNGS[name]
    if isinstance(pocket, TransformerConfig):
        wide = dataclasses.replace(
            pocket, num_layers=rung.num_layers, width=rung.width, num_heads=rung.num_heads
        )
        return match_parameters(wide, rung.num_params)
    num_heads = rung.num_heads * pocket.num_heads // POCKET.num_heads
    growth = rung.width / num_heads / pocket.phases_per_head
    of_projected: dict[str, Any] = {
        "heads_per_phase": rung.heads_per_phase,
        "score_phases": round(pocket.score_phases * growth),
    }
    return match_parameters(
        dataclasses.replace(
            pocket,
            num_layers=rung.num_layers,
            num_phases=rung.width,
            num_heads=num_heads,
            **(of_projected if kind == "projected" else {}),
        ),
        rung.num_params,
    )


def get_config(arm: str = "fsn_pocket") -> ConfigDict:
    """An arm of a rung; see ``ARMS``."""
    check_arm(arm, ARMS)
    name = f"ladder_{arm}"
    rung = RUNGS[arm.split("_")[1]]
    if rung is POCKET:
        config = enwik8.get_config(arm)
        config.name = name
        return config
    per_step = rung.batch_size * rung.context
    per_dispatch = 10
    every = per_dispatch * round(
        rung.num_params * CHARACTERS_PER_PARAMETER / per_step / per_dispatch / EVALUATIONS
    )
    tuned = enwik8.OPTIMIZER
    return experiment(
        name,
        model=model_of(arm),
        data=DataConfig(name="enwik8", context=rung.context),
        optimizer=dataclasses.replace(
            tuned,
            peak_learning_rate=tuned.peak_learning_rate * min(1.0, POCKET.width / rung.width),
        ),
        training=TrainingConfig(
            batch_size=rung.batch_size,
            num_steps=every * EVALUATIONS,
            steps_per_dispatch=per_dispatch,
            log_every=per_dispatch,
        ),
        evaluation=EvaluationConfig(
            every=every, num_tokens=rung.validation, copy_depth=enwik8.COPY_DEPTH
        ),
        checkpoints=CheckpointConfig(every=every),
    )
