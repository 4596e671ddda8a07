"""Text as tokens: prepared data sets, the vocabulary, the training stream."""

from allattn.data.dataset import DATASETS, SPLITS, Dataset, Tokens, default_data_dir, prepare
from allattn.data.stream import Batch, Stream, TokenSource
from allattn.data.vocabulary import Vocabulary

__all__ = [
    "DATASETS",
    "SPLITS",
    "Batch",
    "Dataset",
    "Stream",
    "TokenSource",
    "Tokens",
    "Vocabulary",
    "default_data_dir",
    "prepare",
]
