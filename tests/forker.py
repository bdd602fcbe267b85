"""A fork server for tests that kill runs: imports what a run needs once, then forks a process for each run.

It reads one JSON line a request on its standard input, {"run": FOLDER, "resume": bool}, and answers with the child's
process id, then with its wait status when it has ended. No torch operation runs here, so that no thread is lost in a
fork.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path


def main() -> None:
    """Serve until standard input ends."""
    from trainer.process import quiet_waiting

    quiet_waiting()
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import accelerate  # noqa: F401
    import peft  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: F401

    from trainer import loop

    print("ready", flush=True)
    for request in sys.stdin:
        asked = json.loads(request)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                loop.train(Path(asked["run"]), resume=asked["resume"])
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        print(child, flush=True)
        print(os.waitpid(child, 0)[1], flush=True)


if __name__ == "__main__":
    main()
