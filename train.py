"""`ebm train`, for launchers: accelerate launch train.py [--config FILE] [key=value ...]"""

import sys

from ebm.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
