"""Memory and time of a way, each case in a process of its own."""
