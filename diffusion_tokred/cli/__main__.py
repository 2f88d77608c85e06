"""`python -m diffusion_tokred.cli`: the `tokred` command."""

from . import main

main()
