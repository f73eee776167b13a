"""How a tool ends whose output people send through others."""

from __future__ import annotations

import os
import select
import signal
import sys
from collections.abc import Callable
from typing import NoReturn


def run(main: Callable[[], int]) -> NoReturn:
    """Exit with what ``main`` returns.

    When nobody reads its output any more, as behind ``| head``, quietly with 141, as programs in C do.
    """
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        # What is in the buffer has to go somewhere: Python complains of it at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    sys.exit(code)


def _nobody_reads() -> bool:
    """Whether it was standard output that broke, and not a connection."""
    looked = select.poll()
    looked.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in looked.poll(0))
