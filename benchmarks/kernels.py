"""Times the kernels: `python benchmarks/kernels.py --json benchmarks/results/kernels-<machine>.json`."""

from vlmprune.kernels.bench import main

if __name__ == "__main__":
    raise SystemExit(main())
