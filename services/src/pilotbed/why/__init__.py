"""Why a job has no pilot: what is known is read by ``cli``, what to make of it is in ``situations``."""
