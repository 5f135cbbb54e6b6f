"""Convert published FAR checkpoints to a pipeline folder, and back; `--help` says how."""

import sys

from diffusers_far.convert_published import main

if __name__ == "__main__":
    sys.exit(main())
