"""How long a configuration takes, whether it fits, and which one to choose."""
