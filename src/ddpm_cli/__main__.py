"""`python -m ddpm_cli` is `ddpm`."""

from ddpm_cli.cli.app import main

main()
