"""Runs the tests: `python3 scripts/run_tests.py [pytest arguments]`. Sets up `.venv` first if it is missing.

Without `-n` the test files are spread over two processes with one thread each. The exit code is pytest's; no test at
all counts as a failure.
"""

import os
import sys

import bootstrap


def run_tests():
    """Run pytest in the environment and return its exit code."""
    arguments = sys.argv[1:]
    if not any(argument.startswith(('-n', '--numprocesses', '-p', '--pdb')) for argument in arguments):
        # In the order of their names: by default files of few tests come last, and they are the ones that take longest.
        arguments = ['-n', '2', '--dist', 'loadfile', '--no-loadscope-reorder'] + arguments
    os.chdir(bootstrap.ROOT)
    # More threads than cores make small tests many times slower.
    return bootstrap.run(['-m', 'pytest'] + arguments, {'OMP_NUM_THREADS': os.environ.get('OMP_NUM_THREADS', '1')})


if __name__ == '__main__':
    sys.exit(bootstrap.main(run_tests))
