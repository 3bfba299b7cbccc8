"""`basicsr profile`, and what it shares with the benchmarks: cost, time and memory, stage by stage."""
