"""What running a model on data tells the quantizers: statistics, learned codes and levels, scaled channels."""
