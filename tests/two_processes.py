"""The ends of processes that the fixture `together` started."""

import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import pytest


def outputs(processes, seconds=600):
    """What each process wrote, as pairs (stdout, stderr), when all have ended.

    The test fails when one has not ended after so many seconds, with what that one wrote and where it stood.
    """
    ends, late = time.monotonic() + seconds, []

    def output(process):
        try:
            return process.communicate(timeout=max(0.0, ends - time.monotonic()))
        except subprocess.TimeoutExpired:
            late.append(process)
            process.send_signal(signal.SIGABRT)  # faulthandler writes the stack of every thread
            return process.communicate()

    with ThreadPoolExecutor(len(processes)) as readers:  # none waits for the reader of a full pipe
        found = list(readers.map(output, processes))
    for process in late:
        index = processes.index(process)
        written = "\n".join(found[index])
        pytest.fail(f"process {index} of {len(processes)} had not ended after {seconds} s; it wrote:\n{written}")
    return found
