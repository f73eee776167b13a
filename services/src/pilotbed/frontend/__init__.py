"""The frontend: keeps pilots queued where idle jobs could use them (constant pressure)."""
