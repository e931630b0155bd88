"""What ends a run from outside its training: limits of time, money and patience; and the errors that end it on Ray."""

from raychat.errors import RaychatError
from raychat.training.session import Session


class RunFailedError(RaychatError):
    """Training failed again and again, or machines did not come; the last checkpoint is good."""

    exit_code = 1


class WorkerError(RaychatError):
    """A RaychatError of a worker, told by the driver."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def limit_reached(session: Session) -> bool:
    """Whether the run may cost or last no longer, and says so. While it trains, the loop looks at this itself."""
    money = session.config.money
    if money.budget_usd == -1 and money.max_hours == -1:
        return False
    so_far = session.ledger()
    if money.budget_usd != -1 and so_far.cost_usd is not None and so_far.cost_usd >= money.budget_usd:
        session.echo(f"--budget-usd {money.budget_usd:g} is spent: stopping")
        return True
    if money.max_hours != -1 and so_far.wall_s >= money.max_hours * 3600:
        session.echo(f"--max-hours {money.max_hours:g} are over: stopping")
        return True
    return False


def check_wait(session: Session, waited_s: float, *, fewest: int) -> None:
    """Give up a wait of `waited_s` seconds for the machines of the `fewest` workers that will do, when it is too long.

    Raises:
        RunFailedError: it is.
    """
    limit = session.config.cluster.max_wait
    if limit != -1 and waited_s > limit * 3600:
        raise RunFailedError(
            f"The machines for {fewest} workers did not come within --max-wait {limit:g} hours. The same command "
            "goes on from the newest checkpoint; --min-workers lets it go on with fewer."
        )
