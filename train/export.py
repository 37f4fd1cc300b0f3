"""``python -m train export RUN FOLDER``: writes a trained model in the hub's layout.

The folder holds ``model.safetensors``, ``config.json`` and a model card, and a sampler that runs
without this package: ``sampler.jax_export`` (StableHLO for CPU, CUDA and TPU) and ``sample.py``.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
from jax import Array

from fsn_jax.generate import sample_token
from fsn_jax.hub import Pretrained
from train.errors import UserError
from train.files import new_folder, user_path, writing
from train.hub import write_model
from train.load import load
from train.program import Arguments, start_jax

PLATFORMS = ("cpu", "cuda", "tpu")
SAMPLER, SCRIPT = "sampler.jax_export", "sample.py"


def export_sampler(trained: Pretrained) -> bytes:
    """Serializes the model, its parameters and the sampling of tokens as one program.

    It takes ``(window int32[context], length int32[], seed uint32[], drawn int32[], temperature
    float32[], top_k int32[], top_p float32[])`` and returns the window, int32[context], with all
    positions from ``length`` on sampled. Token i uses the key ``fold_in(key(seed), i)``, where
    ``drawn`` tokens were sampled before. The tokens equal those of ``fsn_jax.generate.generate``.
    """
    context = trained.context
    # By way of the host: the program must not hold the mesh of the machine that exports it.
    variables = {"params": jax.tree.map(jnp.asarray, jax.device_get(trained.params))}

    def sample(
        window: Array,
        length: Array,
        seed: Array,
        drawn: Array,
        temperature: Array,
        top_k: Array,
        top_p: Array,
    ) -> Array:
        key = jax.random.key(seed)
        segments = trained.separator is not None
        cache: Any = trained.model.apply(
            variables, 1, context, segments=segments, method="empty_cache"
        )
        Carry = tuple[Array, Array | None, Any]

        def body(carry: Carry, position: Array) -> tuple[Carry, Array]:
            token, document, cache = carry
            ids = None
            if document is not None:
                document += token == trained.separator
                ids = document[None, None]
            extended: Any = trained.model.apply(
                variables, token[None, None], cache, segment_ids=ids, method="extend"
            )
            logits, cache = extended
            new = sample_token(
                logits[:, 0],
                jax.random.fold_in(key, drawn + position - length),
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
            )[0]
            token = jnp.where(position < length, window[position], new)
            return (token, document, cache), token

        document = jnp.int32(0) if segments else None
        _, rest = jax.lax.scan(body, (window[0], document, cache), jnp.arange(1, context))
        return jnp.concatenate([window[:1], rest])

    window = jax.ShapeDtypeStruct((context,), jnp.int32)
    scalars = (jnp.int32, jnp.uint32, jnp.int32, jnp.float32, jnp.int32, jnp.float32)
    settings = (jax.ShapeDtypeStruct((), dtype) for dtype in scalars)
    exported = jax.export.export(jax.jit(sample), platforms=PLATFORMS)(window, *settings)
    return bytes(exported.serialize())


def program(argv: Sequence[str]) -> None:
    """Runs the program with the arguments of its command line."""
    p = Arguments(prog="python -m train export", description=__doc__)
    p.add_argument("run", help="a run's folder, for instance runs/quickstart")
    p.add_argument("folder", help="a new folder to write to")
    p.add_checkpoint_options("best")
    p.add_argument("--no_sampler", action="store_true", help="leave the sampler out")
    options = p.parse_args(argv[1:])
    folder = user_path("the folder", options.folder)
    if folder.exists():
        raise UserError(f"{folder} is there already; remove it or name another folder")
    start_jax()
    trained = load(options.run, which=options.checkpoint, data_path=options.data_path)
    sampler = None if options.no_sampler else export_sampler(trained.language_model)
    with writing("the folder", folder), new_folder(folder) as made:
        write_model(trained, made, with_sampler=sampler is not None)
        if sampler is not None:
            (made / SAMPLER).write_bytes(sampler)
            shutil.copyfile(Path(__file__).with_name("standalone_sample.py"), made / SCRIPT)
    for file in sorted(folder.iterdir()):
        print(f"{file.stat().st_size:>12,} bytes  {file}")
