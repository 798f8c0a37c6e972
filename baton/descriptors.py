"""How many file descriptors a long-running process may have: each connection is one."""

import math
import resource
from contextlib import suppress

MANY = 1 << 20  # asked for where there is no limit: no system gives as many as one likes


def allow_descriptors() -> float:
    """Raises this process's limit as far as it may by itself; systems set 1024, for programs that use select().

    Returns the limit that holds then.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return math.inf
    with suppress(ValueError, OSError):  # refused: what there is has to do
        wanted = max(soft, MANY) if hard == resource.RLIM_INFINITY else hard
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    return soft
