"""`phalanx scheduler`, which also writes the seconds of each pass (load, plan, commit) to the file it is given."""

import asyncio
import sys
from pathlib import Path

from phalanx_server.loops.measures import PassMeasures
from phalanx_server.loops.schedule import Pass
from phalanx_server.main import configure_logging
from phalanx_server.scheduler_command import run_scheduler
from phalanx_server.settings import Settings


def main() -> None:
    settings, observe = Settings(), PassMeasures.observe
    configure_logging(settings)
    with Path(sys.argv[1]).open("a", buffering=1) as out:

        def write(measures: PassMeasures, done: Pass) -> None:
            out.write(f"{done.seconds:.6f} {done.queued} {len(done.committed.started)}\n")
            observe(measures, done)

        PassMeasures.observe = write  # type: ignore[method-assign]
        asyncio.run(run_scheduler(settings))


if __name__ == "__main__":
    main()
