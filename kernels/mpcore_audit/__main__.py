"""Makes the audit: `python -m mpcore_audit`."""

import sys

from mpcore_audit.command import main

# the processes that compile import `command`, and never this
if __name__ == "__main__":
    sys.exit(main())
