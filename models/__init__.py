"""What is learned: data, networks, distillation, pruning and evaluation, and *the* preprocessing."""
