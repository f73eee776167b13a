"""The pilot: its start-up script, the files it fetches, and the web stage area that holds them."""
