"""What protects the process and its secrets before anything else is imported, or runs.

It imports only what the interpreter has loaded by itself, not even `__future__`: until `protect` returns, any other
import could run a file of the working directory.
"""

import os
import sys

HOME = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))  # noqa: PTH120 - see above
"""The directory that holds the package."""


def protect() -> None:
    """Import nothing from the working directory, and leave no core dump.

    `python -m` searches the working directory first, so that a `structlog.py` in it would be run. It is taken off the
    search path, and the directory that holds this package comes last: a clone must hide no package either.

    A core dump holds the memory, with all secrets. The limit is for dumps into files; a program that the kernel pipes
    dumps to gets one anyway, so that it holds none of the memory (core(5), "Controlling which mappings are written").
    Processes that this one starts inherit both. The process stays dumpable (`PR_SET_DUMPABLE`): otherwise nobody could
    look into it with py-spy, or read its /proc.
    """
    last = {_working_directory(), HOME}
    sys.path[:] = [*(place for place in sys.path if os.path.realpath(place) not in last), HOME]
    import resource  # noqa: PLC0415 - only now

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        with open("/proc/self/coredump_filter", "w") as mappings:  # noqa: PTH123 - see above
            mappings.write("0")
    except OSError:  # a sandbox without it
        pass


def _working_directory() -> str:
    try:
        return os.path.realpath(os.getcwd())  # noqa: PTH109 - see above
    except OSError:  # it was deleted
        return ""
