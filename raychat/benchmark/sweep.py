"""Many configurations, one after the other, each in a process of its own: no case warms up another, or keeps its memory."""

import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from raychat.checks import did_you_mean, require
from raychat.config import Config

COLUMNS = (
    ("tok_s_median", "tok/s", "{:,.0f}"),
    ("tok_s_best", "best", "{:,.0f}"),
    ("step_ms_median", "step ms", "{:,.1f}"),
    ("tok_per_cpu_s", "tok/CPU s", "{:,.0f}"),
    ("first_step_at_s", "first step s", "{:.1f}"),
    ("peak_rss_mb", "peak MiB", "{:,.0f}"),
    ("peak_gpu_mb", "GPU MiB", "{:,.0f}"),
    ("mfu", "MFU %", "{:.1f}"),
    ("mfu_causal", "causal %", "{:.1f}"),
    ("loss_first", "first loss", "{:.4f}"),
    ("loss_last", "last loss", "{:.4f}"),
)


def cases(axes: Sequence[str]) -> list[dict[str, str]]:
    """All combinations of the settings in `axes`, each as `depth=4,6`.

    Raises:
        ConfigError: one is not of that form, or no setting.
    """
    values: dict[str, list[str]] = {}
    known = Config().flat()
    for axis in axes:
        name, equals, listed = axis.partition("=")
        name = name.lstrip("-").replace("-", "_")
        require(
            bool(equals) and bool(listed.strip(",")),
            f"--sweep {axis!r} gives no values: write it as depth=4,6 or compile=on,off.",
        )
        require(name in known, f"--sweep {axis!r}: there is no setting {name!r}{did_you_mean(name, known)}.")
        values[name] = [value for value in listed.split(",") if value]
    return [dict(zip(values, combination, strict=True)) for combination in itertools.product(*values.values())]


def flags_of(case: Mapping[str, str]) -> list[str]:
    """A case as flags of the command line; a setting that is on or off is given, or not."""
    flags = []
    for name, value in case.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(Config().flat()[name], bool):
            require(
                value.lower() in ("true", "false", "on", "off"), f"--sweep {name}={value}: write {name}=false,true."
            )
            flags += [flag] if value.lower() in ("true", "on") else []
        else:
            flags += [flag, value]
    return flags


def measure(case: Mapping[str, str], command: Sequence[str], echo: Callable[[str], None]) -> dict[str, Any]:
    """The result of `command` with the flags of `case`; of one that failed, its `error`. What it prints goes to `echo`."""
    last = ""
    command = [sys.executable, *command, *flags_of(case)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            for line in process.stdout or ():
                if last := line.rstrip("\n") or last:
                    echo(f"  {last}" if not last.startswith("{") else "  done")
            code = process.wait()
        finally:
            process.kill()  # a sweep that is interrupted leaves nothing behind
    if code:
        return {"case": dict(case), "error": last or f"exit code {code}"}
    return {"case": dict(case), **json.loads(last)}


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """The results as a table in Markdown, the figures that a case has; failed ones say why."""
    names = list(results[0]["case"])
    shown = [column for column in COLUMNS if any(result.get(column[0]) is not None for result in results)]
    lines = [names + [title for _, title, _ in shown], ["---"] * len(names) + ["---:"] * len(shown)]
    for result in results:
        case = [str(result["case"][name]) for name in names]
        if "error" in result:
            lines.append([*case, result["error"].replace("|", "/"), *[""] * (len(shown) - 1)])
        else:
            values = [(result.get(key), form) for key, _, form in shown]
            lines.append(case + ["" if value is None else form.format(value) for value, form in values])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
