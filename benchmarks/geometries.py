"""The sizes that are measured, in one table: the papers' models, and two small ones for a CPU.

benchmarks/attention.py and benchmarks/flex.py take the operation of one layer, benchmarks/train.py,
peers.py and profile.py the whole network, and the tests of the kernels compile the operation at the
papers' sizes. That the rows of the papers' models are those of configs/ is tested. To add a size:
enter a row, and its name in the tuples of the benchmarks that shall accept it.
"""

from typing import NamedTuple


class Geometry(NamedTuple):
    """Sizes of a network and of the block that it reads."""

    depth: int  # layers
    width: int  # D
    heads: int  # H
    limit: int  # L, the largest span; of Transformer-XL the memory of training
    block: int  # T, queries of a row
    persistent: int  # N, pairs of a head

    def of_operation(self) -> tuple[int, int, int, int, int]:
        """H, K, L, T and N of one layer's attention."""
        return self.heads, self.width // self.heads, self.limit, self.block, self.persistent


GEOMETRIES = {
    # small ones for a CPU
    "tiny": Geometry(4, 256, 4, 256, 128, 512),
    "small-8": Geometry(8, 256, 4, 1024, 256, 1024),
    # the papers' models: all-attention, then Transformer-XL
    "enwik8_small": Geometry(18, 512, 8, 8192, 512, 1024),
    "enwik8_large": Geometry(36, 512, 8, 8192, 512, 2048),
    "wikitext103": Geometry(36, 512, 8, 2048, 256, 2048),
    "enwik8_xl": Geometry(12, 512, 8, 512, 512, 0),
    "wikitext103_xl": Geometry(16, 410, 10, 150, 150, 0),
}

# What the benchmarks of the operation accept: every size of the all-attention layer.
OPERATIONS = ("tiny", "small-8", "enwik8_small", "enwik8_large", "wikitext103")
# What the benchmarks of the network accept, which have enwik8's vocabulary.
NETWORKS = ("tiny", "small-8", "enwik8_small")
