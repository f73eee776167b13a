"""The certificate: what the checks of a grid came to, as JSON and as a page, and what changed between two of them.

``report`` is the data, ``page`` the page, ``cli`` is ``pilotbed-certificate``. The checks themselves are tests
(tests/certification); the suite runs them and writes the report.
"""
