"""Start a store, and end it when standard input closes, which the kernel does even where pytest is killed with -9.

Portable, and without preexec_fn, which Python 3.12 warns of in threaded programs.
"""

import os
import subprocess
import sys
import threading

store = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
threading.Thread(target=lambda: os._exit(store.wait() or 1), daemon=True).start()
sys.stdin.buffer.read()
store.kill()
store.wait()
