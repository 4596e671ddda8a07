"""Text as tokens: prepared data sets, the vocabulary, the training stream."""

from allattn.data.dataset import (
    DATASETS,
    SPLITS,
    Dataset,
    Tokens,
    cache_dir,
    default_data_dir,
    prepare,
    prepare_configured,
)
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
    "cache_dir",
    "default_data_dir",
    "prepare",
    "prepare_configured",
]
