"""`python -P -m trainer RUN/job.json [--resume]`: run the job of a run folder. Started by the planner, or by hand."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path


def main() -> int:
    """Exit code: 0 done, 1 an error a user can mend, 128 + signal when stopped by one."""
    parser = argparse.ArgumentParser(prog="python -P -m trainer", description="Run the job of a run folder.")
    parser.add_argument("job", type=Path, help="RUN/job.json; the run's files are written beside it")
    parser.add_argument("--resume", action="store_true", help="go on from the newest whole checkpoint")
    arguments = parser.parse_args()
    # A fork after the tokenizer's threads started would only print a warning; nothing here needs them.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from presets.errors import PlanError
    from presets.text import printable, printable_lines
    from trainer.process import growing_segments, quiet_waiting

    quiet_waiting()
    growing_segments()

    try:
        from trainer.loop import Stopped, train

        # The folder may lie behind a link of its user's; job.json may not be one, or the run would write elsewhere.
        train(arguments.job.parent.resolve(), resume=arguments.resume, owns_process=True)
    except Stopped as stopped:
        return 128 + stopped.signal_number
    except KeyboardInterrupt:  # before the run listens to signals, while it imports and loads
        folder = shlex.quote(str(arguments.job.parent))
        print(printable(f"stopped while it started; go on with: plan --resume {folder}"), file=sys.stderr)
        return 130
    except PlanError as reason:
        print(printable_lines(f"Error: {reason}"), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
