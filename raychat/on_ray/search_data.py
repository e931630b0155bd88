"""The data of a search: made once for all trials that can share them, before the first of these starts.

Packing, and how much of an open-ended corpus is used, follow from the length of a run. So that trials of different
lengths read the same rows and are judged on the same text, the longest run decides for all.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from raychat.config import Config
from raychat.data.prepare import TokenData, prepare
from raychat.on_ray.shards import make_on_ray
from raychat.planning import recipe

CLIMBMIX = "climbmix"


class SharedData:
    """Prepares data where they are missing, and says what a trial must be told to use them."""

    def __init__(
        self,
        longest: Sequence[Config],
        *,
        with_gpus: bool,
        echo: Callable[[str], None],
        make: Callable[..., TokenData] = prepare,
    ) -> None:
        """`longest`: every configuration of the search that can be, at its full horizon."""
        self._echo, self._with_gpus, self._make = echo, with_gpus, make
        self._longest: dict[tuple[Any, ...], Config] = {}
        for config in longest:
            other = self._longest.get(_key(config))
            if other is None or recipe(config).tokens > recipe(other).tokens:
                self._longest[_key(config)] = config
        self._ready: dict[tuple[Any, ...], dict[str, Any]] = {}

    def settings(self, config: Config) -> dict[str, Any]:
        """Flags with which `config` uses the shared data, which are there when this returns.

        Raises:
            DataError: a corpus or tokenizer that cannot be used.
            ConfigError: data that cannot be prepared with these settings.
        """
        key = _key(config)
        if key not in self._ready:
            run = self._longest.get(key, config)
            run = replace(run, run=replace(run.run, model_tag=f".{run.model_tag}-data"))  # it is no run that was begun
            data = self._make(run, with_gpus=self._with_gpus, maker=make_on_ray, echo=self._echo)
            found: dict[str, Any] = {"packing": data.manifest.spec.packing}
            if data.corpus.name == CLIMBMIX and config.data.num_data_shards == -1:
                found["num_data_shards"] = len(data.corpus.train) + 1
            self._ready[key] = found
        return dict(self._ready[key])


def _key(config: Config) -> tuple[Any, ...]:
    """Settings that decide which data a run reads, its length apart."""
    data, model = config.data, config.model
    return (*(getattr(data, name) for name in sorted(vars(data))), model.vocab_size, model.max_seq_len)
