"""Long runs: does the lead outlive the transformer's own induction heads?

The plan is in docs/history/protocol.md, "Long runs". Each run is evaluated twenty times
(``_half``: ten) on a million bytes, copy events apart, and has a checkpoint at each evaluation. The
rows of the plan, in its order, the projected FSN being the better one of the first row::

    python -m train ladder --config=configs/long.py --seeds=1,2 \
      --arms=enwik8_fsn_pocket,enwik8_projected_pocket,enwik8_transformer_pocket,enwik8_shifted_pocket
    python -m train ladder --config=configs/long.py --seeds=1 \
      --arms=enwik8_base_pocket,enwik8_modes_pocket

    python -m train ladder --config=configs/ladder.py --seeds=1,2 --arms=projected_1m,transformer_1m
    python -m train ladder --config=configs/ladder.py --seeds=1 \
      --arms=fsn_1m,shifted_1m,base_1m,modes_1m

    python -m train ladder --config=configs/long.py --seeds=1,2,3 \
      --arms=enwik8_projected_1m_half,enwik8_transformer_1m_half,enwik8_shifted_1m_half

    python -m train ladder --config=configs/long.py --seeds=1 \
      --arms=pycode_projected_1m,pycode_transformer_1m

    python -m train ladder --config=configs/ladder.py --seeds=1,2 \
      --arms=projected_500k,transformer_500k,shifted_500k

Arms here: ``enwik8_KIND_pocket``, the pocket rung with five times its budget (100M characters, 1.1
epochs); ``enwik8_KIND_1m_half``, the 1m rung of the ladder with half its budget (50M characters);
and ``pycode_KIND_1m``, the 1m rung on Python source (100M characters, 2.9 epochs). The kinds are
explained in configs/enwik8.py.
"""

from ml_collections import ConfigDict

from configs import check_arm, enwik8, ladder, pycode

EVERY = 1220
"""Steps between evaluations of an enwik8 arm: 5.0 million characters."""
ARMS = (
    *(f"enwik8_{kind}_pocket" for kind in enwik8.KINDS),
    *(f"enwik8_{kind}_1m_half" for kind in enwik8.KINDS),
    *(f"pycode_{kind}_1m" for kind in enwik8.KINDS),
)


def get_config(arm: str = "enwik8_fsn_pocket") -> ConfigDict:
    """A long run; see ``ARMS``."""
    check_arm(arm, ARMS)
    corpus, model = arm.split("_", maxsplit=1)
    if corpus == "pycode":
        config = pycode.on_pycode(ladder.get_config(model))
        config.name = f"{arm}_long"
    elif model.endswith("_half"):
        config = ladder.get_config(model.removesuffix("_half"))
        evaluate_every_5m(config, ladder.EVALUATIONS // 2)
        config.name = arm
    else:
        config = enwik8.get_config(model)
        evaluate_every_5m(config, ladder.EVALUATIONS)
        config.name = f"{arm}_long"
    return config


def evaluate_every_5m(config: ConfigDict, evaluations: int) -> None:
    """Sets the length to so many times 5.0M characters, each with an evaluation at its end."""
    config.training.num_steps = EVERY * evaluations
    config.evaluation.every = config.checkpoints.every = EVERY
    config.evaluation.num_tokens = enwik8.LONG_VALIDATION
