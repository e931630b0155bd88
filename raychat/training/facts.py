"""What a run says of itself to files and to MLflow: settings without credentials, recipe, data."""

import dataclasses
import hashlib
import json
from typing import Any

from raychat.config import Config
from raychat.data.prepare import TokenData
from raychat.planning import Recipe
from raychat.training.secrets import Secrets
from raychat.uris import public_uri

FORMAT = 1


class RunFacts:
    """The facts of one run."""

    def __init__(self, config: Config, recipe: Recipe, data: TokenData, secrets: Secrets) -> None:
        self.config, self.recipe, self.data, self._secrets = config, recipe, data, secrets

    def settings(self) -> dict[str, Any]:
        """The settings, without credentials in URIs, nor in URIs within a command."""
        settings = self.config.public()
        return {key: self._secrets.hide(value) if isinstance(value, str) else value for key, value in settings.items()}

    def for_file(self, resolved: dict[str, Any] | None) -> dict[str, Any]:
        """The content of config.json; `resolved` is what was chosen on the machine, once that is known."""
        flat = self.settings()
        return {
            "format": FORMAT,
            "fingerprint": hashlib.sha256(json.dumps(flat, sort_keys=True).encode()).hexdigest()[:16],
            "data_fingerprint": self.data.manifest.fingerprint,
            "config": flat,
            "recipe": dataclasses.asdict(self.recipe),
            "corpus_files": self.data.corpus_files,
            "resolved": resolved,
        }

    def for_tracking(self) -> dict[str, Any]:
        """What MLflow is told besides metrics: name, params and the dataset."""
        return {
            "run_name": self.config.run.run or self.config.model_tag,
            "params": self.settings() | dataclasses.asdict(self.recipe),
            "dataset": {
                "name": public_uri(self.data.corpus.name),
                "source": public_uri(self.config.data.corpus or self.data.corpus.name),
                "digest": self.data.manifest.fingerprint,
            },
        }
