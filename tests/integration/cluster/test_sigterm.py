"""SIGTERM is heard by the loop of an actor, which runs outside the main thread."""

import signal
import subprocess
import sys

PROGRAM = """
import asyncio, os, signal, threading
from cluster.sigterm import SigtermWatch

async def main():
    heard = asyncio.Event()
    watch = SigtermWatch(heard.set)
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(heard.wait(), 20)
        heard.clear()
    watch.close()
    os.write(1, b"left in order")
    os.kill(os.getpid(), signal.SIGTERM)

thread = threading.Thread(target=lambda: asyncio.run(main()))
thread.start()
thread.join()
signal.pause()
"""


def test_sigterm_is_heard_each_time_and_ends_the_process_only_afterwards() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, timeout=60, check=False)
    assert done.stdout == b"left in order", done.stderr
    assert done.returncode == -signal.SIGTERM
