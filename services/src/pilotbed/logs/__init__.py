"""pilotbed-log: shows that what the collector has of the nodes' journals is what came in.

``journals`` reads the nodes' journals, record by record; ``chain`` writes a line for every few of them, each with the
hash of the line before, and finds what does not fit; ``cli`` is the command.
"""
