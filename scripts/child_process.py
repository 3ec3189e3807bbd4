"""Processes that a script starts, which end when it does, whatever ends it."""
import contextlib
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor


def ends_with_script():
    """Ended from outside, a script leaves by its finally clauses, which end what it started."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


@contextlib.contextmanager
def threads(n):
    """A pool of so many.  When the script is ended it is left at once: what they wait for ends with the
    server that the finally clauses outside of it stop."""
    pool = ThreadPoolExecutor(n)
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


def stop(process, patience_s=30, with_group=False):
    """with_group: what it started goes too; it has a session of its own (start_new_session).  One that
    ends what it starts has none, so that it goes with the script that started it."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(patience_s)
    if with_group:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()


def run(words, timeout_s, patience_s=30):
    """(status, what it printed, what it complained).  TimeoutExpired has what it printed so far."""
    process = subprocess.Popen([str(w) for w in words], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, start_new_session=True)
    try:
        text, problem = process.communicate(timeout=max(0.01, timeout_s))
    except BaseException as e:
        stop(process, patience_s, with_group=True)
        text, problem = process.communicate()
        if isinstance(e, subprocess.TimeoutExpired):
            e.stdout, e.stderr = text, problem
        raise
    return process.returncode, text, problem
