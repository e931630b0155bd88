"""Words that the page and the Markdown share: headings, key figures, sentences."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean

from raychat.search.report import words
from raychat.search.report.contents import ReportContents
from raychat.search.trial import Outcome

HEADINGS = {"command": {"search": "The final baseline, ready to paste", "run": "This run again, ready to paste"}}
DIFFERENCES = {"search": "Differences from the base", "run": "Differences from the defaults"}
FOUND = {"search": "What was found", "run": "How it went"}
FORECAST = "Forecast and what came"
RANGE = "Between which rates to search"
OPEN = "Time and cost are estimates from the runs above."
TONES = {"confirmed": "good", "finished": "good", "failed": "bad", "no result": "bad", "no baseline": "warn"}


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A key figure."""

    name: str
    text: str
    more: str = ""


def state_tone(contents: ReportContents) -> str:
    """Good, warn or bad."""
    return "quiet" if contents.going_on else TONES.get(contents.state, "warn")


def final_outcomes(contents: ReportContents) -> list[Outcome]:
    """What the runs of the final baseline came to, at the highest rung that it finished; else what there is."""
    own = [run for run in contents.runs if run.trial.arm == contents.winner and run.outcome]
    own = [run for run in own if run.status == "finished"] or own
    highest = max((run.trial.rung for run in own), default=1.0)
    return [run.outcome for run in own if run.outcome and run.trial.rung == highest]


def tiles(contents: ReportContents) -> list[Tile]:
    """The figures of the final baseline, and what all of it took."""
    outcomes = final_outcomes(contents)
    each = f"mean of {len(outcomes)} runs" if len(outcomes) > 1 else ""
    wanted: list[tuple[str, Callable[[Outcome], float | None], Callable[[float | None], str], str]] = [
        ("val_bpb", lambda o: o.val_bpb, words.bpb, each or "bits per byte"),
        ("wall time of a run" if each else "wall time", lambda o: o.wall_s, words.duration, ""),
        ("cost of a run" if each else "cost", lambda o: o.cost_usd, words.dollars, ""),
        ("MFU", lambda o: o.mfu, words.percent, "of peak FLOPS"),
        ("throughput", lambda o: o.tok_per_sec, words.count, "tokens per second"),
        ("peak memory", lambda o: o.peak_memory_bytes, words.memory, ""),
    ]
    found = []
    for name, value, show, more in wanted:
        values = [v for outcome in outcomes if (v := value(outcome)) is not None]
        if values and not (name == "throughput" and found[-1].name == "MFU"):
            found.append(Tile(name=name, text=show(fmean(values)), more=more))
    if contents.kind == "search":
        found.append(Tile(name="runs", text=str(len(contents.runs)), more=ends(contents)))
        whole = words.duration(contents.wall_s)
        spent = Tile(name="the whole search", text=whole, more="of runs, one after the other")
        if contents.cost_usd is not None:
            spent = Tile(name="the whole search", text=words.dollars(contents.cost_usd), more=f"{whole} of runs")
        found.append(spent)
    return found


def ends(contents: ReportContents) -> str:
    """How many runs ended how: `8 finished, 1 OOM`."""
    return ", ".join(f"{number} {status}" for status, number in Counter(r.status for r in contents.runs).most_common())


def interruption_sentence(contents: ReportContents) -> str:
    """What preemptions and other restarts cost."""
    found = contents.interruption
    if found is None:
        return ""
    if not found.restarts:
        return "No run was interrupted: preemption cost nothing."
    lost = found.replayed_s + found.starting_s
    money = f" and {words.dollars(found.cost_usd)}" if found.cost_usd is not None else ""
    share = f" ({lost / contents.wall_s:.0%} of the wall time)" if contents.wall_s else ""
    again, until = words.duration(found.replayed_s), words.duration(found.starting_s)
    return (
        f"{words.plural(found.restarts, 'restart')}, {found.preemptions} of them by preemption, cost "
        f"{words.duration(lost)}{money}{share}: {again} of steps made again, {until} until training went on."
    )


def noise_sentence(contents: ReportContents) -> str:
    """What the column of findings rests on."""
    noise = contents.noise
    if noise is None or noise.sd is None:
        why = f" ({noise.source})" if noise else ""
        return f"The noise of a difference was not measured{why}: nothing is promoted without fresh seeds."
    freedom = words.plural(noise.freedom, "degree")
    return (
        f"Noise: a difference of two equal runs has a standard deviation of {100 * noise.sd:.2g}% of the score, from "
        f"{noise.source} ({freedom} of freedom); with one seed it counts beyond {noise.limit:.1f} of them."
    )
