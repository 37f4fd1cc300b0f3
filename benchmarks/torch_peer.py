"""The peer in PyTorch: x-transformers, driven line by line by ``benchmarks.table``.

Run by the Python of its own environment (``benchmarks/requirements-torch.txt``). It reads one JSON
object with the sizes and answers with its number of parameters; then it answers every line with the
seconds of one step, until its input ends.
"""

import importlib.metadata
import json
import sys
import time
from typing import Any

import torch  # type: ignore[import-not-found]
import x_transformers  # type: ignore[import-not-found]


def build(sizes: dict[str, Any]) -> torch.nn.Module:
    """Builds a transformer: RoPE, SwiGLU, RMSNorm, no biases, fused attention."""
    decoder = x_transformers.Decoder(
        dim=sizes["width"],
        depth=sizes["num_layers"],
        heads=sizes["num_heads"],
        attn_dim_head=sizes["width"] // sizes["num_heads"],
        attn_flash=True,
        rotary_pos_emb=True,
        rotary_emb_dim=sizes["width"] // sizes["num_heads"],
        use_rmsnorm=True,
        ff_swish=True,
        ff_glu=True,
        ff_no_bias=True,
        ff_mult=sizes["feedforward_width"] / sizes["width"],
    )
    return x_transformers.TransformerWrapper(
        num_tokens=sizes["vocab_size"],
        max_seq_len=sizes["context"],
        use_abs_pos_emb=False,
        attn_layers=decoder,
    )


def optimizers_of(model: torch.nn.Module, matrices: str) -> list[torch.optim.Optimizer]:
    """Returns AdamW for all (``adam``), or Muon for the blocks' matrices and AdamW for the rest."""
    blocks = [p for p in model.attn_layers.parameters() if matrices == "muon" and p.ndim == 2]
    turned = {id(p) for p in blocks}
    rest = [p for p in model.parameters() if id(p) not in turned]
    adam = torch.optim.AdamW(rest, lr=1e-3, foreach=True)
    return [adam, torch.optim.Muon(blocks, lr=1e-3)] if blocks else [adam]


def main() -> None:
    """Runs steps on request from standard input."""
    sizes = json.loads(sys.stdin.readline())
    torch.manual_seed(0)
    torch.set_num_threads(sizes["threads"])
    model = build(sizes)
    shape = (sizes["batch_size"], sizes["context"] + 1)
    windows = torch.randint(0, sizes["vocab_size"], shape)
    optimizers = optimizers_of(model, sizes["optimizer"])

    def train() -> None:
        logits = model(windows[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()

    def forward() -> None:
        with torch.inference_mode():
            model(windows[:, :-1])

    work = {"train": train, "forward": forward}[sizes["measure"]]
    work()
    params = sum(p.numel() for p in model.parameters())
    versions = {name: importlib.metadata.version(name) for name in ("torch", "x-transformers")}
    print(json.dumps({"params": params, "versions": versions}), flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        work()
        print(time.perf_counter() - began, flush=True)


if __name__ == "__main__":
    main()
