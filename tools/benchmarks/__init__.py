"""The parts of `mindvlm-benchmark`: workloads, the contenders' processes, and the comparisons."""
