"""Which of the paths that a user names are URLs of a storage bucket."""

import os


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a URL such as gs://bucket/folder, and not a file or folder."""
    return "://" in os.fspath(path)
