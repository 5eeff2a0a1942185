"""Benchmarks of RankTower against named peers: each prints a table, and writes what it measured below var/bench."""
