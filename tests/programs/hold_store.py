"""A store in a folder for ten minutes, and its port on the output: folder."""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from stores import Rclone

store = Rclone(Path(sys.argv[1])).start()
print(store.port, flush=True)
time.sleep(600)
