"""The one door to HTCondor: ads, jobs and expressions; it knows nothing of pilots.

``htcondor2`` and ``classad2`` come with Debian's condor package and are imported when the door is opened, so that
everything above can be tested where they are missing.
"""

from .door import Collector, Identity, PoolError, Schedd, open_door, pool_address, version
from .expression import Expression
from .text import any_of, equals, quote
from .values import AbsurdValue, Ad, Expr, Value

__all__ = [
    "AbsurdValue",
    "Ad",
    "Collector",
    "Expr",
    "Expression",
    "Identity",
    "PoolError",
    "Schedd",
    "Value",
    "any_of",
    "equals",
    "open_door",
    "pool_address",
    "quote",
    "version",
]
