"""The glideinWMS 3.10 protocol between a frontend and a factory: ads, names, encryption, stage references.

Pure values and functions, without HTCondor: factory and frontend meet here and nowhere else, ``pilotbed.pool``
carries the ads. JSON and text only: nothing that arrives is ever unpickled.
"""


class ProtocolError(Exception):
    """An ad that breaks the protocol; the message names the attribute and what is wrong with it."""
