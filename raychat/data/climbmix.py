"""The ClimbMix corpus: 400 billion tokens of web text, shuffled, in 6,543 parquet files of about 100 MB.

Its last file is the validation split of every run, however few files a run downloads, so that runs compare.
"""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from raychat.data.download import Job, download_all
from raychat.errors import ConfigError, DataError
from raychat.planning.text import CLIMBMIX_SHARDS, climbmix_files

BASE_URL = "https://huggingface.co/datasets/karpathy/climbmix-400b-shuffle/resolve/main"
LAST_SHARD = CLIMBMIX_SHARDS
SHARD_BYTES = 100e6

shards_needed = climbmix_files


def shard_names(num_data_shards: int) -> list[str]:
    """Names of the first `num_data_shards` - 1 files and of the last of all, which validates.

    Raises:
        ConfigError: fewer than 1.
        DataError: more than there are.
    """
    if num_data_shards < 1:
        raise ConfigError(f"--num-data-shards={num_data_shards} is no number of files. Use 2 or more.")
    if num_data_shards > LAST_SHARD + 1:
        raise DataError(
            f"--num-data-shards={num_data_shards} is more than the {LAST_SHARD + 1} files of climbmix. "
            f"Use {LAST_SHARD + 1} or less."
        )
    return [f"shard_{index:05d}.parquet" for index in (*range(num_data_shards - 1), LAST_SHARD)]


def fetch(
    base_dir: Path,
    num_data_shards: int,
    *,
    base_url: str = BASE_URL,
    attempts: int = 6,
    backoff_s: float = 1.0,
    echo: Callable[[str], None],
) -> Path:
    """Download what is missing of `shard_names(num_data_shards)`; the directory `base_dir/corpora/climbmix`.

    The directory may hold more files, of earlier runs: `shard_names` says which ones to use.
    """
    folder = base_dir / "corpora" / "climbmix"
    names = [name for name in shard_names(num_data_shards) if not (folder / name).exists()]
    if names:
        echo(f"climbmix: downloading {len(names)} of {num_data_shards} files to {folder}")
        download_all(
            [Job(url=f"{base_url}/{name}", target=folder / name) for name in names],
            label="climbmix",
            total_bytes=len(names) * SHARD_BYTES,
            validate=check_parquet,
            attempts=attempts,
            backoff_s=backoff_s,
            echo=echo,
        )
    return folder


def check_parquet(path: Path) -> None:
    """Raise DataError unless `path` has the footer of a parquet file, which is its end."""
    try:
        pq.read_metadata(path)
    except pa.ArrowInvalid as error:
        raise DataError(f"{path} is not a whole parquet file: {error}") from None
