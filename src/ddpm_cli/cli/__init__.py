"""The command line: parses, calls the core, renders. Everything that prints is in here."""

import sys

if sys.platform == "win32":  # before the modules that need a Unix system are imported
    sys.exit("Error: ddpm runs on Linux and macOS, not on Windows\nHint: Use WSL, the Windows Subsystem for Linux.")
