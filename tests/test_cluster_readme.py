"""cluster/README.md against what it speaks of: Ray's commands and options, files, prices."""

import re
from pathlib import Path

import cluster_checks as checks
import yaml

from raychat.planning.prices import load_prices

ROOT = Path(__file__).resolve().parents[1]
CLUSTER = ROOT / "cluster"
NODE_SH = CLUSTER / "node.sh"


def commands():
    """What stands in code blocks, and between backquotes."""
    text = (CLUSTER / "README.md").read_text()
    return [line.strip() for line in text.splitlines() if line.startswith("    ")] + re.findall(r"`([^`\n]+)`", text)


def test_the_commands_of_the_readme_exist_with_these_options():
    from ray.scripts.scripts import cli

    checked = 0
    for line in commands():
        for words in re.findall(r"(?:^|[ '/])ray ((?:job )?[a-z-]+)((?: [^|;&]*)?)", line.split(" #")[0]):
            command = cli
            for word in words[0].split():
                assert word in command.commands, line
                command = command.commands[word]
            options = {
                option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)
            }
            for given in re.findall(r"(?<!\S)--?[a-z][a-z-]*", words[1].split(" -- ")[0].split(" '")[0]):
                assert given in options, line
            checked += 1
    assert checked >= 15


def test_the_readme_names_files_that_are_there():
    text = (CLUSTER / "README.md").read_text()
    for name in set(re.findall(r"\bcluster/[\w./-]+\w", text)) - {"cluster/node.sh"}:
        assert (ROOT / name).exists(), name
    for name in re.findall(r"\]\((?!https://)([^)#:]+)", text):
        assert (CLUSTER / name).resolve().exists(), name
    for used in re.findall(r"node\.sh (\w+)", text):
        assert re.search(rf"(?m)^  {used}\)", NODE_SH.read_text()), used


def test_the_readme_has_the_prices_of_the_table_and_the_machines_of_the_files():
    prices, rows = load_prices(), {}
    for line in (CLUSTER / "README.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 4 and cells[0].strip("`") in prices:
            rows[cells[0].strip("`")] = tuple(cells[2:])
    used = {
        checks.machine_type(name, group["node_config"])
        for name in ("aws", "gcp")
        for group in yaml.safe_load((CLUSTER / f"{name}.yaml").read_text())["available_node_types"].values()
    }
    assert set(rows) == used
    for name, (on_demand, spot) in rows.items():
        machine = prices[name]
        low_high = " to ".join(f"{price:g}" for price in machine.spot) if machine.spot else ""
        assert (float(on_demand), spot.replace("never", "")) == (machine.on_demand, low_high), name
