"""What is kept in place of tensors: statistics of any number of forwards, in memory of one size."""
