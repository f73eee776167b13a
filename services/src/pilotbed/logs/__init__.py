"""pilotbed-log: every node's journal in one place, and what shows that it is there as it came in.

``upload`` sends a node's journal to the collector. There ``journals`` reads those of all nodes, record by record;
``chain`` writes a line for every few of them, each with the hash of the line before, and finds what does not fit;
``cli`` is the command.
"""
