"""`python -m moeisr_basicsr` is the `basicsr` command."""

import sys

from moeisr_basicsr.cli import main

if __name__ == '__main__':
    sys.exit(main())
