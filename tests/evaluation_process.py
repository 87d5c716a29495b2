"""A process that runs an evaluation until it moves a file to its place, and hangs there: to be killed by a test."""

import sys

from generate_many_process import hang_at_replace

from lr_kernels.evaluation import evaluate

if __name__ == "__main__":
    hang_at_replace(int(sys.argv[2]))
    evaluate(sys.argv[1], progress=False)
