"""The plan as a person reads it: sections with a label, within 100 columns, every forecast with the range it may lie in."""

import math
import textwrap
from collections.abc import Sequence, Set
from typing import Any

from raychat.planning.target import Target

WIDTH = 100
LABEL = 10  # columns of a section's name
GIB = 2**30
PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "overhead")
TIMES = {  # parts of a run's time, as the plan calls them
    "startup": "start-up",
    "tokenizer": "tokenizer",
    "tokenizing": "tokenizing",
    "steps": "steps",
    "evaluation": "evaluation",
    "checkpoints": "checkpoints",
    "replay": "replay",
}
LITTLE_PADDING = 1.05
EXCEEDED = {
    "surely": "not enough, even at the least",
    "probably": "probably not enough",
    "possibly": "enough if all goes as expected",
    "no": "enough",
}


def format_plan(plan: dict[str, Any]) -> str:
    """The whole plan, a section after the other."""
    sections = {
        "model": _model(plan["model"]),
        "batch": _batch(plan["batch"], plan["target"]),
        "rates": _rates(plan["rates"]),
        "horizon": _horizon(plan["horizon"]),
        "machine": [_machine(plan["target"])],
        "memory": _memory(plan["memory"], plan["target"]),
        "data": _data(plan["data"]),
        "time": _time(plan),
        "exchange": _exchange(plan["exchange"], plan["target"]),
        "money": _money(plan["money"]),
        "limits": _limits(plan["limits"]),
        "sources": _sources(plan),
    }
    blocks = [section(name, lines) for name, lines in sections.items() if lines]
    return "\n\n".join(blocks)


def duration(seconds: Sequence[float], digits: int = 2) -> str:
    """[low, mid, high] in the unit that suits the middle: `55 (48 to 63) min`."""
    mid = seconds[1]
    unit, name = (1e-3, "ms") if mid < 1 else (1, "s") if mid < 100 else (60, "min") if mid < 7200 else (3600, "h")
    return f"{spread([value / unit for value in seconds], digits)} {name}" if any(seconds) else "0 s"


def spread(values: Sequence[float], digits: int = 2) -> str:
    """`55 (48 to 63)`, or one number where the three are the same; so many digits of the middle, at least."""
    mid = abs(values[1])
    decimals = max(0, digits - 1 - math.floor(math.log10(mid))) if mid else 0
    low, expected, high = (f"{value:,.{decimals}f}" for value in values)
    return expected if low == expected == high else f"{expected} ({low} to {high})"


def dollars(values: Sequence[float]) -> str:
    """[low, mid, high] in dollars, with cents below a hundred."""
    low, mid, high = (usd(value, cents=values[1] < 100) for value in values)
    return mid if low == mid == high else f"{mid} ({low} to {high})"


def usd(value: float, *, cents: bool = True) -> str:
    """`$4.36`."""
    return f"${value:,.2f}" if cents else f"${value:,.0f}"


def gibibytes(count: float) -> str:
    """Memory, in the unit in which torch and nvidia-smi count what a GPU has."""
    return f"{count / GIB:,.1f} GiB"


def plural(number: int, one: str, several: str) -> str:
    """`1 pass`, `8 passes`."""
    return f"{number:,} {one if number == 1 else several}"


def count(value: float) -> str:
    """A large number in three digits: `786M`."""
    for size, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{name}"
    return f"{value:,.3g}"


def target_name(target: Target) -> str:
    """What a plan is made for, in few words: `p4d.24xlarge`, `8 x h100`, `CPU, 2 cores`."""
    if target.device == "cpu":
        return f"CPU, {target.cores} cores"
    if target.machine:
        return target.machine.name if target.machines == 1 else f"{target.machines} x {target.machine.name}"
    return f"{target.workers} x {target.gpu}"


def columns(rows: Sequence[Sequence[str]], left: Set[int] = frozenset()) -> list[str]:
    """`rows` of the same length as lines with aligned columns: to the right, those in `left` to the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            f"{cell:{'<' if i in left else '>'}{width}}"
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def section(name: str, lines: list[str]) -> str:
    """Lines behind a label; long ones go on, indented as they began and two columns more."""
    shown: list[str] = []
    for line in lines:
        indent = " " * (len(line) - len(line.lstrip()))
        shown += textwrap.wrap(line, WIDTH - LABEL, subsequent_indent=indent + "  ", break_on_hyphens=False) or [""]
    labels = [name, *[""] * (len(shown) - 1)]
    return "\n".join(f"{label:<{LABEL}}{line}".rstrip() for label, line in zip(labels, shown, strict=True))


def _model(model: dict[str, Any]) -> list[str]:
    params = model["parameters"]
    heads = f"{model['heads']} heads of {model['head_dim']}"
    if model["kv_heads"] != model["heads"]:
        heads += f" ({model['kv_heads']} for keys and values)"
    return [
        f"depth {model['depth']}, width {model['model_dim']:,}, {heads}, context {model['max_seq_len']:,}, "
        f"windows {model['window_pattern']}, vocabulary {model['vocab_size']:,}",
        f"{params['total']:,} parameters, {params['scaling']:,} of them in the scaling laws; "
        f"{model['flops_per_token']:.4g} FLOPs per token",
        f"blocks {params['transformer_matrices']:,} + lm_head {params['lm_head']:,} + wte {params['wte']:,} + "
        f"values {params['value_embeds']:,} + scalars {params['scalars']:,}",
    ]


def _batch(batch: dict[str, Any], target: dict[str, Any]) -> list[str]:
    workers, on_cpu = target["workers"], target["device"] == "cpu"
    most = "" if batch["rows_per_rank"] * workers == batch["rows"] else "at most "
    ranks = "" if workers == 1 else f", {most}{batch['rows_per_rank']:,} on each device"
    differ = len({size["step_s"][1] for size in batch["sizes"] if size["step_s"]}) > 1
    rows = [["", "a pass", "passes", "memory", "", "a step" if differ else ""]]
    for size in batch["sizes"]:
        shown = differ and size["step_s"] and size["fits"] is not False
        rows.append(
            [
                ">" if size["device_batch_size"] == batch["device_batch_size"] else "",
                f"{size['device_batch_size']:,}",
                f"{size['passes']:,}",
                gibibytes(size["memory_bytes"]),
                {True: "fits", False: "too much", None: ""}[size["fits"]],
                duration([size["step_s"][1]] * 3, digits=3) if shown else "",
            ]
        )
    lines = [
        f"{batch['total_batch_size']:,} tokens = {batch['rows']:,} sequences a step{ranks}: "
        f"{plural(batch['passes'], 'pass', 'passes')} of {batch['device_batch_size']} ({batch['tokens_per_pass']:,} tokens)",
        *columns(rows, left={4}),
    ]
    if batch.get("by_forecast"):
        size = f"--device-batch-size auto: {batch['device_batch_size']}"
        lines.append(f"  {size} is a forecast" + ("" if on_cpu else "; the run tries out what fits its GPU"))
    return [*lines, f"  {batch['impossible']}"] if batch["impossible"] else lines


def _rates(rates: dict[str, Any]) -> list[str]:
    end = f", to {rates['final_lr_frac']:.0%}" if rates["warmdown_steps"] else ""
    exponential = rates["warmup_steps"] and rates["warmup_from"]
    return [
        f"matrix {rates['matrix_lr']:.4g}, embedding {rates['embedding_lr']:.4g}, unembedding "
        f"{rates['unembedding_lr']:.4g}, scalar {rates['scalar_lr']:.4g}; weight decay {rates['weight_decay']:.4g}",
        f"scaled by {rates['lr_scale']:.4g} for the batch; warm-up {rates['warmup_steps']:,} steps, warm-down the last "
        f"{rates['warmdown_steps']:,}{end}",
        *([f"the warm-up rises exponentially from {rates['warmup_from']:.3g} of these rates"] if exponential else []),
    ]


def _horizon(horizon: dict[str, Any]) -> list[str]:
    return [
        f"{horizon['num_iterations']:,} iterations = {horizon['tokens']:,} tokens, "
        f"{horizon['tokens_per_scaling_param']:.1f} per scaling parameter; {horizon['flops']:.4g} FLOPs",
        f"compute-optimal at {horizon['optimal_ratio']:g} tokens per parameter: {horizon['optimal_iterations']:,} "
        f"iterations; this is {horizon['of_optimal']:.2f} times that",
    ]


def _machine(target: dict[str, Any]) -> str:
    if target["device"] == "cpu":
        return f"CPU, {target['cores']} cores" + (f", {target['workers']} workers" if target["workers"] > 1 else "")
    memory = f" with {gibibytes(target['memory_bytes'])}" if target["memory_bytes"] else ""
    text = f"{target['workers']} x {target['gpu']}{memory}"
    if machine := target["machine"]:
        where = f"{machine['name']} ({machine['provider']})" if machine["provider"] else machine["name"]
        text += f": {where}" if target["machines"] == 1 else f": {target['machines']} x {where}"
    return text


def _memory(memory: dict[str, Any], target: dict[str, Any]) -> list[str]:
    there = f" of {gibibytes(memory['there'])}" if memory["there"] else ""
    each = "" if target["workers"] == 1 else " on each device"
    source = f", measured (calculated: {gibibytes(memory['calculated'])})" if memory["measured"] else ""
    verdict = {True: ": fits", False: ": does not fit", None: ""}[memory["fits"]]
    largest = memory["largest_batch"]
    most = f"; at most {largest} a pass" if largest else "" if memory["there"] is None else "; no batch fits"
    how = f"{memory['loss']} loss, {memory['dtype']}" + (", recomputed blocks" if memory["grad_checkpoint"] else "")
    digits = 1 if memory["total"] > 10 * GIB else 2
    lines = [
        f"{gibibytes(memory['total'])}{there}{each}{source}{verdict}{most} ({how})",
        ", ".join(f"{name} {memory['parts'][name] / GIB:,.{digits}f}" for name in PARTS),
    ]
    return [*lines, memory["with_full_loss"]["why"]] if memory["with_full_loss"] else lines


def _data(data: dict[str, Any]) -> list[str]:
    needed = f"{data['corpus']}: {count(data['tokens_needed'])} tokens needed"
    if data["tokens_there"] is None:
        return [f"{needed}; what is there is {data['source']}"]
    there = f"{spread([value / 1e6 for value in data['tokens_there']])}M there"
    lines = [
        f"{needed}, {there}: {spread(data['epochs'])} epochs" if data["epochs"] else f"{needed}, {there}",
        f"{data['packing']} packing: {data['packing_reason']}",
    ]
    if data["shards_needed"]:
        have = f"; {data['shards_there']:,} there" if data["shards_there"] else ""
        lines.append(f"files to see no token twice: {_files(data['shards_by'])}{have}")
    if any(data["kept"].values()):
        kept = [f"{name} {spread([100 * share for share in value])}%" for name, value in data["kept"].items() if value]
        lines.append(f"tokens that packing keeps: {', '.join(kept)}")
    return lines


def _files(shards_by: dict[str, Any]) -> str:
    return ", ".join(
        f"{value[0]:,.0f} to {value[2]:,.0f} {name}" if value[0] != value[2] else f"{value[0]:,.0f} {name}"
        for name, value in shards_by.items()
        if value
    )


def _time(plan: dict[str, Any]) -> list[str]:
    time, horizon = plan["time"], plan["horizon"]
    if time is None:
        gpu = plan["target"]["gpu"]
        return [f"not known, because no speed of {gpu!r} is known: give --mfu, or --gpu with a name of the table"]
    unit, name = (1e3, "k") if time["tok_per_sec"][1] >= 1000 else (1, "")
    speed = f"{spread([value / unit for value in time['tok_per_sec']], digits=3)}{name} tokens/s"
    mfu = f", MFU {spread(time['mfu'])}%" if time["mfu"] else ""
    notes = {
        "steps": f"{horizon['num_iterations']:,} x {duration(time['step_s'], digits=3)}",
        "evaluation": f"{time['evaluations']} x {time['eval_passes']:,} passes, {duration(time['eval_s'])} each"
        if time["evaluations"]
        else "",
    }
    rows = [["", title, duration(time[name]), notes.get(name, "")] for name, title in TIMES.items() if any(time[name])]
    return [f"{duration(time['total'])} in all; {speed}{mfu}", *columns(rows, left={1, 2, 3})]


def _exchange(exchange: dict[str, Any] | None, target: dict[str, Any]) -> list[str]:
    if exchange is None:
        return []
    factor = exchange["padding"]
    padded = f", {factor:.1f} times the least, because units are padded" if factor > LITTLE_PADDING else ""
    sent = f"{exchange['sent_bytes'] / 1e9:.2g} GB{padded}"
    read = spread([value / 1e6 for value in exchange["read_bytes_per_s"]])
    machine = "the machine reads" if target["machines"] == 1 else f"each of {target['machines']} machines reads"
    return [
        f"{duration(exchange['seconds'])} of a step, {exchange['share']:.0%}: each GPU sends {sent}; none of it "
        "hides behind the passes",
        f"{machine} {read} MB/s of tokens",
    ]


def _money(money: dict[str, Any] | None) -> list[str]:
    if money is None:
        return ["not known, as the time is not"]
    hours = f"{spread(money['node_hours'])} machine hours"
    if money["on_demand"] is None and money["spot"] is None:
        return [f"{hours}; {money['price_source']}"]
    hours = f"{spread(money['node_hours'])} hours of {money['machine']}" if money["machine"] else hours
    lines = []
    if money["on_demand"]:
        lines.append(f"{dollars(money['on_demand'])} on demand: {hours} at {usd(money['price'])}")
    if money["spot"]:
        low, high = money["spot_price"]
        rate = usd(low) if low == high else f"{usd(low)} to {usd(high)}"
        replay = f", {duration(money['replay_s'])} of replay expected" if any(money["replay_s"]) else ""
        lines.append(f"{dollars(money['spot'])} spot: {hours} at {rate}{replay}")
    others = [option for option in money["options"] if option["machine"]["name"] != money["machine"]]
    return [*lines, *(_options(others) if others else [])]


def _options(options: list[dict[str, Any]]) -> list[str]:
    """Other machine types that would do."""
    rows = [["", "or on", "", "hours", "on demand", "spot"]]
    for option in options:
        machine = option["machine"]
        rows.append(
            [
                "",
                f"{option['machines']} x {machine['name']}" if option["machines"] > 1 else machine["name"],
                f"({machine['provider']})" if machine["provider"] else "",
                f"{option['node_hours'][1]:.2f}",
                usd(option["on_demand"][1]) if option["on_demand"] else "",
                usd(option["spot"][1]) if option["spot"] else "",
            ]
        )
    return columns(rows, left={1, 2})


def _sources(plan: dict[str, Any]) -> list[str]:
    """What the figures rest on, part by part."""
    lines = [f"data: {plan['data']['source']}"]
    if plan["time"]:
        lines += [f"{TIMES.get(name, name)}: {words}" for name, words in plan["time"]["sources"].items()]
    money = plan["money"]
    if money and (money["on_demand"] or money["spot"]):
        lines += [f"price: {money['price_source']}", *_price_sources(money)]
    return lines


def _price_sources(money: dict[str, Any]) -> list[str]:
    """Source and date of the prices of other machine types, those of one source together."""
    names: dict[str, list[str]] = {}
    for option in money["options"]:
        machine = option["machine"]
        if machine["name"] != money["machine"]:
            date = "of a date that is not known" if machine["as_of"] == "unknown" else f"of {machine['as_of']}"
            names.setdefault(f"{machine['source']}, {date}", []).append(machine["name"])
    return [f"{', '.join(found)}: {source}" for source, found in names.items()]


def _limits(limits: list[dict[str, Any]]) -> list[str]:
    lines = []
    for limit in limits:
        shown = dollars if limit["flag"] == "--budget-usd" else lambda hours: duration([3600 * hour for hour in hours])
        forecast = limit["forecast"]
        if forecast is None:
            lines.append(f"{limit['flag']} {limit['limit']:g}: whether it is enough is not known")
        else:
            lines.append(f"{limit['flag']} {limit['limit']:g}: {EXCEEDED[limit['exceeded']]}: {shown(forecast)}")
    return lines
