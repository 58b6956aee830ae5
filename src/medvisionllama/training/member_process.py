"""`python -m medvisionllama.training.member_process`: train one further member of a run.

What to train comes as a line of JSON on standard input. When that closes, whoever started this has ended or wants
it to end: the run is saved, and the exit code is 130. Other codes: 0 trained, 2 something to fix (one line on
standard error).
"""

import _thread
import json
import signal
import sys
import threading
import time
from io import FileIO

from medvisionllama.config import Config
from medvisionllama.errors import MedVisionLlamaError
from medvisionllama.training.fit import fit_since
from medvisionllama.training.interrupts import INTERRUPTED, SECONDS_TO_SAVE, sigterm_as_ctrl_c


def main() -> int:
    """Train as standard input says, and return the exit code."""
    # A shell script's background jobs inherit that Ctrl-C is ignored, and so is what `_end_with` then does.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sigterm_as_ctrl_c()
    # Without a buffer: a thread that waits for one would keep Python from ending.
    channel = FileIO(sys.stdin.fileno(), closefd=False)
    request = json.loads(channel.readline())
    try:
        threading.Thread(target=_end_with, args=(channel,), daemon=True).start()
        result = fit_since(
            Config.model_validate(request["config"]),
            started=time.monotonic() - max(0.0, time.time() - request["began"]),
            resume=request["resume"],
            is_member=True,
            # A queue may tell every process of a job to end; that whoever started this then closes the input is no
            # second wish.
            echo_seconds=SECONDS_TO_SAVE,
        )
    except KeyboardInterrupt:
        return INTERRUPTED
    except MedVisionLlamaError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0 if result.finished else INTERRUPTED


def _end_with(channel: FileIO) -> None:
    while channel.read(1):
        pass
    # As Ctrl-C would: the loop saves after its step.
    _thread.interrupt_main()


if __name__ == "__main__":
    sys.exit(main())
