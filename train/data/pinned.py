"""The two corpora whose every byte is known: sources of their files, hashes of their splits."""

import dataclasses
from collections.abc import Mapping

from train.data.fetch import PackageFile, PinnedFile, UrlArchive


@dataclasses.dataclass(frozen=True)
class Pinned:
    """A corpus of pinned files.

    Attributes:
      files: what it is made of.
      splits: number of bytes and SHA-256 of each split.
    """

    files: tuple[PinnedFile, ...]
    splits: Mapping[str, tuple[int, str]]


ENWIK8_MEMBER = "enwik8"  # in enwik8.zip

ENWIK8 = Pinned(
    files=(
        PinnedFile(
            name="enwik8",
            size=100_000_000,
            sha256="2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8",
            sources=(
                UrlArchive("https://mattmahoney.net/dc/enwik8.zip", member=ENWIK8_MEMBER),
                # Two projects publish the same file with their source.
                PackageFile(
                    "mingru-pytorch",
                    "0.2.1",
                    "fc9b278b4e04db930a5cd4cdab36e2713b1d6e14084269b161d4f133819e758d",
                    member="mingru_pytorch-0.2.1/data/enwik8.gz",
                ),
                PackageFile(
                    "native-sparse-attention-pytorch",
                    "0.2.3",
                    "7b9481bb52ee565d5098868c7345285e88342248915ff8e3e62f7fe945be2da0",
                    member="native_sparse_attention_pytorch-0.2.3/data/enwik8.gz",
                ),
            ),
        ),
    ),
    splits={
        "train": (90_000_000, "f8978bd9ca51fbea387d5145d310652ab39904bcbc8ab2647932c8c2e0539e64"),
        "validation": (
            5_000_000, "16b8b889f05ebeb5684d497d49383e8e55eb3634cee2f9a023dcab68cbf64f17"),
        "test": (5_000_000, "86f62c0adeb6c27763f308b8913bec743626421a4d2b4010f1e177a40eef7750"),
    },
)  # fmt: skip

_WHEELS = """
sympy        1.14.0  6_299_353 e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5
ansible-core 2.19.14 2_426_850 d518d0e96fa75bedfe9b0a96d5b158aa712d092961824c115140c8677b88ff06
twisted      26.10.0 3_251_703 3732f42af218925a0fe78d6668db55853f7fb532245a89a2669babe7d3000fa8
django       5.2.19  8_319_631 5965d974a5218a2b68a11dd1276434707f23886525c23f0598eccedaf4f4ca00
networkx     3.6.1   2_068_504 d47fbf302e7d9cbbb9e2555a0d267983d2aa476bac30e90dfbe5669bd57f3762
"""
"""Name, version, number of bytes and SHA-256 of the pure wheels of pycode."""


def _wheel(line: str) -> PinnedFile:
    """Returns a pure wheel under its usual file name."""
    name, version, size, sha256 = line.split()
    filename = f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    return PinnedFile(filename, int(size), sha256, (PackageFile(name, version, sha256),))


PYCODE = Pinned(
    files=tuple(map(_wheel, _WHEELS.strip().splitlines())),
    splits={
        "train": (34_470_152, "8aef727368f851dd19d23495bbbf1937f6dd84b02241fb573c3b2d38f467f881"),
        "validation": (
            1_750_584, "fb79718dff7db9dd189c7e021bd2af61a6f612df8f8db266532aab3e562eaf82"),
        "test": (2_108_955, "7549c345fea53eef8f01ca79bd6f3169cc8c6629039832384bd781ebbb28a6a2"),
    },
)  # fmt: skip

PINNED: dict[str, Pinned] = {"enwik8": ENWIK8, "pycode": PYCODE}
