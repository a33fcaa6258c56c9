"""The `moray` command: mounts the commands and turns errors into one line and an exit code.

Exit codes: 0 done, 1 failed, 2 wrong usage (flags, config). Nothing heavy is imported before a command runs.
"""

import sys

import typer

from cluster.cli import (
    balance,
    bench,
    chat,
    checkpoint,
    drain,
    generate,
    logits,
    role,
    router,
    scale,
    status,
    template,
    up,
)
from cluster.cli.failure import report
from wire.errors import MorayError

app = typer.Typer(
    name="moray",
    help="Serve DeepSeek-V3.2 from a cluster in which every expert is a stateless service.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("up")(up.up)
app.command("down")(up.down)
app.command("status")(status.status)
app.command("scale")(scale.scale)
app.command("drain")(drain.drain)
app.command("role")(role.role)
app.command("rebalance")(scale.rebalance)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.command("logits")(logits.logits)
app.command("router")(router.router)
app.command("balance")(balance.balance)
app.add_typer(bench.app, name="bench")
app.add_typer(checkpoint.app, name="checkpoint")
app.add_typer(template.app, name="template")


def main() -> None:
    """Runs the command line; ends the process with its exit code."""
    try:
        app()
    except MorayError as error:
        sys.exit(report(error))
    except ValueError as error:
        # The model's errors (model/errors.py) are ValueErrors; anything else shows where it came from.
        if type(error).__module__ != "model.errors":
            raise
        sys.exit(report(error))
