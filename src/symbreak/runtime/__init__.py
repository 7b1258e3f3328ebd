"""What long work needs of a machine: files, processes, memory, finished parts."""
