"""Looking at the numbers of a training run: statistics, why a step overflowed, and where."""
