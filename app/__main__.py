"""`python -m diffusion_tokred.app`: the command `tokred app`."""

import sys

from diffusion_tokred.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "app")
    main()
