"""The process and the machine it runs on: devices, processes, signals, files, tracking."""
