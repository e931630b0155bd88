"""A range test of the rates: one short run on Ray in which all of them rise exponentially, and between which to search."""

from collections.abc import Callable

from raychat.config import Config
from raychat.on_ray import driver
from raychat.on_ray.limits import WorkerError
from raychat.search.range_plot import draw
from raychat.search.range_run import is_over, lines, range_config, recorded
from raychat.search.range_test import FILE, RangeTest
from raychat.search.rate_range import NoRange
from raychat.tracking.summary import DIVERGED, Summary

PICTURE = "lr_range.png"
Echo = Callable[[str], None]
Train = Callable[..., Summary | None]
"""driver.run, or what stands for it"""


def run(
    config: Config, *, steps: int, least: float, most: float, echo: Echo, train: Train = driver.run
) -> RangeTest | None:
    """Make the test of `config`, or go on with it; say, keep and draw what it found. None when it was stopped before.

    Raises:
        RaychatError: it cannot be made, or finds no range; the picture is there then all the same.
    """
    test = driver.with_absolute_paths(range_config(config, steps=steps, least=least, most=most))
    if is_over(test):
        echo(f"the range test is there already: {test.run_dir} (--fresh behind -- makes it again)")
    elif not _trained(test, train, echo):
        echo("the range test was stopped: the same command goes on with it")
        return None
    found = recorded(config, test, least=least, most=most)
    found.write(test.run_dir / FILE)
    draw(found, test.run_dir / PICTURE, title=f"{config.model_tag}: loss under rising rates")
    for line in lines(config, found):
        echo(line)
    echo(f"  picture    {test.run_dir / PICTURE}")
    echo(f"  report     python jobs/report.py {test.model_tag}")
    if found.refusal:
        raise NoRange(found.refusal)
    return found


def _trained(test: Config, train: Train, echo: Echo) -> bool:
    """Train to the end, whether that is the horizon or a loss that is no number; False when it was stopped before."""
    try:  # of the steps a point each is in the picture
        summary = train(test, echo=lambda line: None if line.startswith("step ") else echo(line))
    except WorkerError as error:
        if DIVERGED not in str(error):
            raise
        echo(f"the test is over: {error}")
        return True
    return summary is None or summary.status == "finished"
