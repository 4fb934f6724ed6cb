"""The command line: parses options, calls the core, shows the results. Only this package prints."""

import sys

if sys.platform == "win32":  # before importing modules that need Unix
    sys.exit("Error: ddpm runs on Linux and macOS, not on Windows\nHint: Use WSL, the Windows Subsystem for Linux.")
