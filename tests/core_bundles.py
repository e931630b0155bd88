"""A CORE bundle of invented words: one small task of each kind. And where the real one is, on machines that have it."""

import json
import random
from pathlib import Path
from typing import Any

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "core"
WORDS = ["kalo", "miru", "tesha", "vonpel", "quister", "anding", "pelo", "shami", "rute", "vonka"]

TASKS = """icl_tasks:
- label: choosing
  dataset_uri: a/choosing.jsonl
  num_fewshot: [2]
  icl_task_type: multiple_choice
  continuation_delimiter: "\\nAnswer: "
- label: resolving
  dataset_uri: a/resolving.jsonl
  num_fewshot: [0]
  icl_task_type: schema
- label: continuing
  dataset_uri: b/continuing.jsonl
  num_fewshot: [1]
  icl_task_type: language_modeling
  has_categories: true
"""
BASELINES = """Eval Task,Task Category,Task Type,#shots,#datapoints,Random baseline,Centered Metric?,Description
choosing,words,multiple choice,2,12,25,,"four, of which one"
resolving,words,schema,0,12,50,,
continuing,words,language modeling,1,12,0,,
unused,words,language modeling,1,12,none,,
"""


def write_bundle(folder: Path, items: int = 12) -> Path:
    """A bundle of three tasks with `items` items each, the same on every machine."""
    rng = random.Random(0)

    def phrase(most: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))

    choosing = [
        {"query": phrase(9), "choices": [phrase(4) + f" {n}" for n in range(4)], "gold": rng.randrange(4)}
        for _ in range(items)
    ]
    resolving = []
    for _ in range(items):
        begin = phrase(5)
        options = [f"{begin} {word}" for word in rng.sample(WORDS, 2)]
        resolving.append({"context_options": options, "continuation": phrase(4), "gold": rng.randrange(2)})
    continuing = [{"context": phrase(9) + " ", "continuation": phrase(2), "category": "any"} for _ in range(items)]
    (folder / "eval_data" / "a").mkdir(parents=True)
    (folder / "eval_data" / "b").mkdir()
    (folder / "core.yaml").write_text(TASKS)
    (folder / "eval_meta_data.csv").write_text(BASELINES)
    write_items(folder / "eval_data" / "a" / "choosing.jsonl", choosing)
    write_items(folder / "eval_data" / "a" / "resolving.jsonl", resolving)
    write_items(folder / "eval_data" / "b" / "continuing.jsonl", continuing)
    return folder


def write_items(path: Path, items: list[dict[str, Any]]) -> None:
    """One object a line."""
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
