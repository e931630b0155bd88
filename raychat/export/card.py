"""The model card of a Hugging Face directory: what the model is, what it was trained on, what that cost, how good it is."""

from collections.abc import Mapping
from typing import Any

from raychat.data.tokenizer import Tokenizer
from raychat.model import GPTConfig

UNKNOWN = "not measured"

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- raychat
---

# {name}

A base language model of {parameters} parameters, trained with raychat. It continues text; it has not been taught to answer
or to follow instructions, and what it says may be false, biased or offensive.

| | |
|---|---|
{rows}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(PATH, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(PATH, trust_remote_code=True)
inputs = tokenizer("The largest city of Japan is", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0], skip_special_tokens=True))
```

`trust_remote_code` runs `modeling_raychat.py` of this directory: read it first. The code keeps no cache of keys and values, so
a generated token costs a pass over the whole context. Every text begins with `<|bos|>`, which the tokenizer adds; names
of special tokens within a text are read as plain text. The model was trained on rows of {sequence_len} tokens.

raychat itself reads this directory too: `python jobs/sample.py --path PATH`.
{tasks}"""


def model_card(shapes: GPTConfig, tokenizer: Tokenizer, facts: Mapping[str, Any]) -> str:
    """The card in Markdown; what `facts` do not hold is said to be not measured."""
    rows = {
        "shape": f"{shapes.n_layer} blocks, {shapes.n_embd:,} channels, {shapes.n_head} heads ({shapes.n_kv_head} for keys "
        f"and values), windows {shapes.window_pattern}",
        "vocabulary": f"{tokenizer.vocab_size:,} tokens",
        "data": _data(facts),
        "tokens": _text(facts.get("tokens"), ","),
        "steps": _text(facts.get("step"), ","),
        "FLOPs": _text(facts.get("flops"), ".4g"),
        "val_bpb": _text(facts.get("val_bpb"), ".4f"),
        "CORE": _text(facts.get("core_metric"), ".4f"),
        "cost": _text(facts.get("cost_usd"), ",.2f", "$"),
        "hardware": (facts.get("resolved") or {}).get("hardware") or UNKNOWN,
        "commit": facts.get("commit") or UNKNOWN,
    }
    return CARD.format(
        name=facts.get("model_tag") or "raychat model",
        parameters=_text(facts.get("parameters"), ","),
        rows="\n".join(f"| {name} | {_cell(value)} |" for name, value in rows.items()),
        sequence_len=f"{shapes.sequence_len:,}",
        tasks=_tasks(facts.get("core_tasks")),
    )


def _data(facts: Mapping[str, Any]) -> str:
    corpus, mark = facts.get("corpus"), facts.get("data_fingerprint")
    return f"{corpus} (fingerprint {mark})" if corpus else UNKNOWN


def _tasks(tasks: Mapping[str, float] | None) -> str:
    if not tasks:
        return ""
    rows = "\n".join(f"| {_cell(name)} | {value:.4f} |" for name, value in sorted(tasks.items()))
    return f"\n## CORE by task (centred accuracy)\n\n| task | |\n|---|---|\n{rows}\n"


def _text(value: float | None, form: str, before: str = "") -> str:
    return UNKNOWN if value is None else before + format(value, form)


def _cell(text: str) -> str:
    """Text that cannot end its cell of a table."""
    return text.replace("|", "\\|").replace("\n", " ")
