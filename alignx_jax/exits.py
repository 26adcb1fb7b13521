"""What the program's exit codes say, to people and to what starts it again (docs/multihost.md)."""

OK = 0
"""Done."""
USER = 1
"""Something to mend: the last line on stderr says what; the same command would stop there again."""
PEER_LOST = 69
"""Another process of the same run is gone; the same command continues."""
DIVERGED = 70
"""Training cannot go on: a loss or gradient is not finite, or a loss does not reach the model."""
STORAGE = 74
"""Something could not be read or written."""
INTERRUPTED = 75
"""Told to stop, saved, and ended; the same command continues."""
