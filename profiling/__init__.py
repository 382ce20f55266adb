"""Helpers to see where time and memory go: NVTX ranges (`profiling.nvtx`) and CUDA memory (`profiling.memory`)."""
