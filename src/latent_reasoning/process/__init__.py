"""What a process shares with the machine: device and GPUs, memory, signals, other processes."""
